"""data/: order, packing, crops, the documents of each stage."""

import json
import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import batches, instruct, units
from llama import Llama, LlamaConfig, next_token_loss
from tokenizer import Tokenizer, units_to_text


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_draws_every_item_once(n, epoch, seed):
    drawn = [batches.order(i, n, seed) for i in range(epoch * n, (epoch + 1) * n)]
    assert sorted(item for item, _ in drawn) == list(range(n))
    assert {number for _, number in drawn} == {epoch}


def test_epochs_and_seeds_differ():
    def epoch(number, seed):
        return [batches.order(i, 40, seed)[0] for i in range(40 * number, 40 * number + 40)]

    assert epoch(0, 0) != epoch(1, 0) and epoch(0, 0) != epoch(0, 1)


documents = st.lists(st.integers(2, 30).flatmap(
    lambda n: st.tuples(st.lists(st.integers(3, 99), min_size=n, max_size=n),
                        st.lists(st.booleans(), min_size=n, max_size=n))), min_size=1, max_size=12)


@given(documents)
def test_packing_keeps_every_document_whole(docs):
    packed = batches.pack(docs, 30)
    found = []
    for r in range(len(packed.ids)):
        for d in range(int(packed.docs[r].max()) + 1):
            here = packed.docs[r] == d
            assert packed.positions[r][here].tolist() == list(range(int(here.sum())))
            found.append((packed.ids[r][here].tolist(), packed.mask[r][here].tolist()))
    assert sorted(found) == sorted((ids, [False] + mask[1:]) for ids, mask in docs)
    assert not packed.mask[packed.docs < 0].any()


@settings(deadline=None, max_examples=10)
@given(documents)
def test_packed_loss_equals_padded_loss(docs):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=100, dim=16, n_layers=2, n_heads=2, hidden_dim=32)).double()
    packed = batches.pack(docs, 64)
    total, count = 0.0, 0
    for ids, mask in docs:  # one document at a time, nothing packed
        n = sum(mask[1:])
        total += next_token_loss(model, torch.tensor([ids]), torch.tensor([mask])).item() * n
        count += n
    assert next_token_loss(model, *packed).item() == pytest.approx(total / max(count, 1), rel=1e-5)


def test_ranks_share_the_documents_of_a_step():
    examples = list(range(20))

    def render(example, draw):
        return [example + 3, 1], [False, True]

    def drawn(world, rank, step):
        packs = batches.documents(render, examples, 0, 8, 16, 2, rank, world)(step)
        return sorted(i - 3 for p in packs for i in p.ids[p.positions == 0][p.docs[p.positions == 0] >= 0].tolist())

    for step in (0, 3):
        assert sorted(drawn(2, 0, step) + drawn(2, 1, step)) == drawn(1, 0, step)


def test_crops_are_the_frames_their_labels_say(tmp_path):
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for i, n in enumerate((4000, 12000, 30001)):
        frames = (n - 400) // 320 + 1
        wav = np.zeros(n, np.float32)
        for t in range(frames):
            wav[320 * t] = t / 100  # every frame begins with its own number
        paths.append(tmp_path / f"{i}.wav")
        soundfile.write(paths[-1], wav, 16000, subtype="FLOAT")
        labels.append(np.arange(frames))
    for step in range(4):
        for crop in batches.crops(paths, labels, 20, int(rng.integers(9)), 6, 2)(step):
            assert crop.wav.shape == (3, 320 * 19 + 400) and crop.labels.shape == (3, 20)
            assert torch.allclose(crop.wav[:, ::320][:, :20] * 100, crop.labels.float(), atol=1e-4)


# ---- documents of each stage, from a small hand-made corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows, unit_rows = [], []

    def add(text, split, speaker, kind):
        rows.append({"id": str(len(rows)), "wav": "x.wav", "text": text, "speaker": speaker, "split": split,
                     "kind": kind})
        unit_rows.append({"id": rows[-1]["id"], "units": [len(rows) % 10, 3, 7], "durations": [1, 2, 3]})

    for speaker in (0, 1):
        add("What is one plus one?", "train", speaker, "question")
    add("One plus one is two.", "train", 0, "answer")
    add("What is one plus one?", "rendition", 2, "question")
    add("What is two plus two?", "heldout", 1, "question")
    add("Tom sees a dog.", "train", 1, "statement")
    add("Anna sees a cow.", "heldout", 1, "statement")
    dialogues = [{"question": "What is one plus one?", "answer": "One plus one is two.", "split": "train"},
                 {"question": "Add one and one.", "answer": "One plus one is two.", "split": "train"},
                 {"question": "What is two plus two?", "answer": "Two plus two is four.", "split": "heldout"}]
    for name, table in (("manifest", rows), ("units", unit_rows), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@pytest.fixture(scope="module")
def tok(corpus, tmp_path_factory):
    return Tokenizer.train(instruct.sentences(corpus, "train"), tmp_path_factory.mktemp("tok"), 700, 10)


def test_nothing_held_out_is_in_training_examples(corpus):
    seen = repr([instruct.sentences(corpus, "train"), instruct.cross_modal(corpus, "train"),
                 instruct.exchanges(corpus, "train"), instruct.exchanges(corpus, "rendition")])
    assert "two plus two" not in seen.lower() and "cow" not in seen
    assert "Add one and one" in seen


def test_exchanges_pair_a_heard_question_with_the_models_own_voice(corpus):
    (e,) = instruct.exchanges(corpus, "train")
    assert (len(e.question_units), len(e.answer_units)) == (2, 1)
    (r,) = instruct.exchanges(corpus, "rendition")
    assert r.question == e.question and r.question_units != e.question_units
    (h,) = instruct.exchanges(corpus, "heldout")
    assert h.answer == "Two plus two is four." and h.answer_units == []


def test_the_mask_covers_the_answer_and_nothing_else(corpus, tok):
    (e,) = instruct.exchanges(corpus, "train")
    for k in range(40):
        ids, mask = instruct.render_chain(tok, e, random.Random(k), standard=0.5)
        first = mask.index(True)
        assert all(mask[first:]) and tok.human not in ids[first:] and tok.speechgpt == ids[first - 2]
        parts = tok.parse(ids[first:])
        assert parts.complete and (parts.ta == e.answer or parts.ua in e.answer_units)
        assert parts.tq in ("", e.question)


def test_only_the_own_voice_is_learned_to_speak(corpus, tok):
    for pair in instruct.pairs(corpus, "train"):
        spoken = 0
        for k in range(30):
            ids, mask = instruct.render_cross_modal(tok, pair, random.Random(k))
            answer = [i for i, m in zip(ids, mask) if m]
            spoken += tok.sosp in answer
            assert tok.parse(answer).ta == pair.text or tok.parse(answer).ua == pair.units
        assert (spoken > 0) == (pair.speaker == instruct.OWN_VOICE)


def test_speech_documents_train_every_token(corpus, tok):
    pair = instruct.pairs(corpus, "train")[0]
    ids, mask = instruct.render_speech(tok, pair, random.Random(0))
    assert tok.decode(ids[1:]).replace(" ", "") == units_to_text(pair.units) and all(mask)


@pytest.mark.parametrize("line, said", [("{", "line 1"), ("[]", "needs the keys"), ('{"id": 1}', "needs the keys")])
def test_a_broken_manifest_is_one_line(tmp_path, line, said):
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        units.read_manifest(tmp_path)


def test_a_corpus_without_units_says_which_stage_to_run(corpus, tmp_path):
    (tmp_path / "manifest.jsonl").write_text((corpus / "manifest.jsonl").read_text())
    with pytest.raises(FileNotFoundError, match="run the stage"):
        units.read_units(tmp_path)
    (tmp_path / "units.jsonl").write_text("")
    with pytest.raises(ValueError, match="run stage units again"):
        units.read_units(tmp_path)
