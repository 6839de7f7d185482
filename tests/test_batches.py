"""data/: order, packing, crops, the documents of each stage."""

import json
import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import audio, batches, documents, units
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


document_lists = st.lists(
    st.integers(2, 30).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(3, 99), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=12,
)


@given(document_lists)
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
@given(document_lists)
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
        return sorted(
            i - 3 for p in packs for i in p.ids[p.positions == 0][p.docs[p.positions == 0] >= 0].tolist()
        )

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


def test_perturbed_crops_play_at_other_rates_and_their_labels_go_along(tmp_path):
    n, path = 60_000, tmp_path / "ramp.wav"  # every sample tells its own place
    soundfile.write(path, np.arange(n, dtype=np.float32) / n, 16000, subtype="FLOAT")
    labels, rates = np.arange((n - 400) // 320 + 1), []
    for step in range(20):
        (crop,) = batches.crops([path], [labels], 20, 0, 4, 1, perturb=0.3)(step)
        for wav, label in zip(crop.wav.double() * n, crop.labels):
            rates.append(((wav[-1000] - wav[0]) / (len(wav) - 1000)).item())
            middle = wav[200::320][:20]
            assert (
                middle - (320 * label + 200)
            ).abs().max() <= 161  # the recording's frame around that sample
    assert 0.74 < min(rates) < 0.8 and 1.25 < max(rates) < 1.35  # exp(0.3) = 1.35
    short = tmp_path / "short.wav"
    soundfile.write(short, np.ones(4000, np.float32) / 2, 16000, subtype="FLOAT")
    for step in range(9):
        (crop,) = batches.crops([short], [np.arange(12)], 20, 0, 4, 1, perturb=0.3)(step)
        assert crop.wav.shape == (4, 320 * 19 + 400) and crop.labels.shape == (4, 20)
        assert torch.allclose(crop.wav, torch.tensor(0.5), atol=1e-3)
        assert set(crop.labels.unique().tolist()) <= {*range(12)}


# ---- documents of each stage, from a small hand-made corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows, unit_rows = [], []

    def add(text, split, speaker, kind):
        rows.append(
            {
                "id": str(len(rows)),
                "wav": "x.wav",
                "text": text,
                "speaker": speaker,
                "split": split,
                "kind": kind,
            }
        )
        unit_rows.append({"id": rows[-1]["id"], "units": [len(rows) % 10, 3, 7], "durations": [1, 2, 3]})

    for speaker in (0, 1):
        add("What is one plus one?", "train", speaker, "question")
    add("One plus one is two.", "train", 0, "answer")
    add("What is one plus one?", "rendition", 2, "question")
    add("What is two plus two?", "heldout", 1, "question")
    add("Tom sees a dog.", "train", 1, "statement")
    add("Anna sees a cow.", "heldout", 1, "statement")
    dialogues = [
        {
            "question": "What is one plus one?",
            "answer": "One plus one is two.",
            "split": "train",
            "family": "plus",
        },
        {
            "question": "Add one and one.",
            "answer": "One plus one is two.",
            "split": "train",
            "family": "more",
        },
        {"question": "What is two plus two?", "answer": "Two plus two is four.", "split": "heldout"},
    ]
    for name, table in (("manifest", rows), ("units", unit_rows), ("dialogues", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@pytest.fixture(scope="module")
def tok(corpus, tmp_path_factory):
    return Tokenizer.train(documents.sentences(corpus, "train"), tmp_path_factory.mktemp("tok"), 700, 10)


def test_nothing_held_out_is_in_training_examples(corpus):
    everything = dict.fromkeys(documents.KINDS, 1.0)
    seen = repr([documents.examples(corpus, "train", everything), documents.exchanges(corpus, "rendition")])
    assert "two plus two" not in seen.lower() and "cow" not in seen
    assert "Add one and one" in seen


def test_exchanges_pair_a_heard_question_with_the_models_own_voice(corpus):
    e, unspoken = documents.exchanges(corpus, "train")
    assert (len(e.question_units), len(e.answer_units)) == (2, 1)
    assert (len(unspoken.question_units), len(unspoken.answer_units)) == (0, 1)
    r, _ = documents.exchanges(corpus, "rendition")
    assert r.question == e.question and r.question_units != e.question_units
    (h,) = documents.exchanges(corpus, "heldout")
    assert h.answer == "Two plus two is four." and h.answer_units == []


def test_the_mask_covers_the_answer_and_nothing_else(corpus, tok):
    e, _ = documents.exchanges(corpus, "train")
    for k in range(40):
        ids, mask = documents.render(
            tok, documents.Example(("chain", "standard")[k % 2], e), random.Random(k), 0.1
        )
        first = mask.index(True)
        assert all(mask[first:]) and tok.human not in ids[first:] and tok.speechgpt == ids[first - 2]
        parts = tok.parse(ids[first:])
        assert parts.complete and (parts.ta == e.answer or parts.ua in e.answer_units)
        assert parts.tq in ("", e.question)


def test_only_the_own_voice_is_learned_to_speak(corpus, tok):
    found = documents.examples(corpus, "train", {"asr": 0.5, "tts": 0.5})
    assert {e.of.speaker for e in found if e.kind == "asr"} == {0, 1}
    assert {e.of.speaker for e in found if e.kind == "tts"} == {documents.OWN_VOICE}
    for example in found:
        ids, mask = documents.render(tok, example, random.Random(0))
        answer = [i for i, m in zip(ids, mask) if m]
        assert (tok.sosp in answer) == (example.kind == "tts")
        assert tok.parse(answer).ta == example.of.text or tok.parse(answer).ua == example.of.units


def test_a_recording_of_one_frame_has_one_at_every_pace(tmp_path):
    audio.save(tmp_path / "a.wav", np.full(400, 0.1))
    heard = units.map_speech(
        tmp_path,
        [{"wav": "a.wav", "rate": rate, "pitch": 1.0} for rate in (0.5, 1.0, 2.0)],
        len,
        torch.device("cpu"),
        "",
    )
    assert heard == [800, 400, 400]


def test_a_killed_extraction_does_nothing_twice(tmp_path):
    corpus, work = tmp_path / "corpus", tmp_path / "work"
    work.mkdir()
    rows = [
        {"id": str(i), "wav": f"{i}.wav", "text": "", "speaker": i % 2, "split": "train"} for i in range(6)
    ]
    for row in rows:
        audio.save(corpus / row["wav"], np.full(4000, 0.1))
    (corpus / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "perturbed.jsonl").write_text("of other units")
    calls = []

    def extractor(wav, last=10**6):
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(len(wav))
        return [len(calls)], [1]

    def extract(*perturb, last=10**6):
        units.extract(corpus, lambda wav: extractor(wav, last), torch.device("cpu"), work, perturb, portion=1)

    for last in (3, 8):  # in the middle of the one, then of the other
        with pytest.raises(KeyboardInterrupt):
            extract(0.2, 0.1, last=last)
        assert len(calls) == last
    extract(0.2, 0.1)
    assert len(calls) == 9 and calls[:6] == [4000] * 6 and 4000 not in calls[6:]
    assert [row["id"] for row in units.read_units(corpus)] == [row["id"] for row in rows]
    assert [row["id"] for row in units.read_perturbed(corpus)] == ["0", "2", "4"] and not any(work.iterdir())
    extract(0.0, 0.0)
    assert not (corpus / "perturbed.jsonl").exists() and not any(work.iterdir())
    others = [json.dumps(row) + "\n" for row in rows if row["speaker"] != units.OWN_VOICE]
    (corpus / "manifest.jsonl").write_text("".join(others))
    extract(0.2, 0.1)
    assert len(units.read_units(corpus)) == 3 and units.read_perturbed(corpus) == []


def test_played_crops_keep_each_label_with_its_sound(tmp_path):
    steps = np.repeat(np.arange(20), 5)  # a tone for each label
    wav = 0.3 * np.sin(2 * np.pi * np.cumsum(np.repeat(300 + 150 * steps, 320)) / 16000)
    audio.save(tmp_path / "x.wav", np.pad(wav, (0, 80)))
    paths, labels, perturb = [tmp_path / "x.wav"] * 4, [steps] * 4, [(0.15, 0.0)] * 4
    batch_at = batches.played_crops(paths, labels, perturb, np.ones(4), 60, 0, 4, 1)
    right = total = 0
    for step in range(5):
        (crops,) = batch_at(step)
        assert crops.wav.shape == (4, 320 * 59 + 400) and crops.labels.shape == (4, 60)
        for x, heard in zip(crops.wav, crops.labels):
            for t in range(60):
                if heard[t] >= 0:
                    hertz = (
                        torch.fft.rfft(x[320 * t : 320 * t + 400] * torch.hann_window(400), 4096)
                        .abs()
                        .argmax()
                    )
                    right += abs(float(hertz) * 16000 / 4096 - 300 - 150 * int(heard[t])) < 90
                    total += 1
    assert total > 900 and right > 0.9 * total
    again, other = batch_at(3)[0], batches.played_crops(paths, labels, perturb, np.ones(4), 60, 1, 4, 1)(3)[0]
    assert torch.equal(again.wav, batch_at(3)[0].wav) and not torch.equal(again.wav, other.wav)
    (long,) = batches.played_crops(paths, labels, [(0.0, 0.0)] * 4, np.ones(4), 150, 0, 4, 1)(
        0
    )  # than there is
    assert (
        (long.labels[:, :100] >= 0).all()
        and (long.labels[:, 100:] == -1).all()
        and (long.wav[:, 32080:] == 0).all()
    )


def test_played_crops_are_drawn_by_their_weights_and_shared_between_ranks(tmp_path):
    for i in range(3):
        audio.save(tmp_path / f"{i}.wav", np.full(2000, 0.1 * i))
    paths, labels = [tmp_path / f"{i}.wav" for i in range(3)], [np.full(6, i) for i in range(3)]

    def drawn(rank, world):
        weights, perturb = np.array([1.0, 0.0, 3.0]), [(0.1, 0.1)] * 3
        batch_at = batches.played_crops(paths, labels, perturb, weights, 4, 0, 8, 2, rank, world)
        return [crops.labels[:, 0] for step in range(50) for crops in batch_at(step)]

    alone = torch.cat(drawn(0, 1))
    assert len(alone) == 400 and not (alone == 1).any() and 0.65 < (alone == 2).float().mean() < 0.85
    halves = [torch.cat(pair) for pair in zip(drawn(0, 2), drawn(1, 2))]
    assert torch.equal(torch.cat(halves), alone)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_warp_finds_the_frames_that_were_played_faster_and_slower(steps, first):
    wanted = np.random.default_rng(0).normal(size=(first + sum(steps) + 1, 8))
    way = first + np.cumsum([0, *steps])
    found, apart = units.warp(wanted[way], wanted)
    assert found.tolist() == way.tolist() and abs(apart) < 1e-4


def test_warp_has_no_way_through_what_is_too_short():
    wanted = np.random.default_rng(0).normal(size=(40, 8))
    assert units.warp(wanted[:3], wanted)[1] == np.inf
    way, apart = units.warp(wanted + 0.1, wanted)
    assert way.tolist() == list(range(40)) and abs(apart - 0.08) < 1e-3


def test_the_own_voice_at_another_rate_is_only_listened_to(corpus, tmp_path):
    for name in ("manifest", "units", "dialogues"):
        (tmp_path / f"{name}.jsonl").write_text((corpus / f"{name}.jsonl").read_text())
    assert units.read_perturbed(tmp_path) == []
    rows = [
        row | {"units": [9, 8], "durations": [3, 3], "rate": 1.1, "pitch": 0.9}
        for row in units.read_units(corpus)
        if row["split"] == "train" and row["speaker"] == documents.OWN_VOICE
    ]
    keys = ("id", "units", "durations", "rate", "pitch")
    (tmp_path / "perturbed.jsonl").write_text(
        "".join(json.dumps({k: row[k] for k in keys}) + "\n" for row in rows)
    )
    assert units.read_perturbed(tmp_path) == rows and len(rows) == 2
    perturbed = [documents.Pair([9, 8], row["text"], documents.SOMEBODY) for row in rows]
    for kind, times in (("asr", 1), ("tts", 0)):
        found = [e.of for e in documents.examples(tmp_path, "train", {kind: 1.0})]
        assert all(found.count(pair) == times for pair in perturbed)
    e, _ = documents.exchanges(tmp_path, "train")
    before, _ = documents.exchanges(corpus, "train")
    assert e.question_units == [*before.question_units, [9, 8]] and e.answer_units == before.answer_units
    for split in ("rendition", "heldout"):
        assert documents.exchanges(tmp_path, split) == documents.exchanges(corpus, split)
        assert documents.pairs(tmp_path, split) == documents.pairs(corpus, split)


def test_what_is_there_to_be_read_aloud_is_not_answered_in_text(corpus, tmp_path):
    for name in ("manifest", "units"):
        (tmp_path / f"{name}.jsonl").write_text((corpus / f"{name}.jsonl").read_text())
    row = {
        "question": "Please say: One plus one is two.",
        "answer": "One plus one is two.",
        "split": "train",
        "family": documents.READING,
    }
    (tmp_path / "dialogues.jsonl").write_text(
        (corpus / "dialogues.jsonl").read_text() + json.dumps(row) + "\n"
    )
    reads = {
        kind: row["question"] in {e.of.question for e in documents.examples(tmp_path, "train", {kind: 1.0})}
        for kind in ("t2t", "t2s", "t2t/reading")
    }
    assert reads == {"t2t": False, "t2s": True, "t2t/reading": True}


def test_every_kind_has_its_share_and_every_example_its_turn(corpus):
    mix = {"asr": 0.6, "tts": 0.1, "s2t": 0.2, "text": 0.1}
    found = documents.examples(corpus, "train", mix)
    for kind, share in mix.items():
        assert abs(sum(e.kind == kind for e in found) - share * len(found)) < 1
    alone = {kind: documents.examples(corpus, "train", {kind: 1.0}) for kind in mix}
    for kind, examples in alone.items():
        assert all(e in found for e in examples) and {e.kind for e in examples} == {kind}


def test_a_question_is_heard_only_where_it_was_spoken(corpus):
    asked = {
        kind: {e.of.question for e in documents.examples(corpus, "train", {kind: 1.0})}
        for kind in ("s2s", "s2t", "t2s", "t2t", "chain", "standard")
    }
    spoken = {"What is one plus one?"}
    assert asked == dict.fromkeys(asked, spoken) | dict.fromkeys(
        ("t2s", "t2t"), spoken | {"Add one and one."}
    )


def test_a_family_may_have_a_share_of_its_own(corpus):
    found = documents.examples(corpus, "train", {"t2t": 0.5, "t2t/plus": 0.5})
    assert {e.kind for e in found} == {"t2t"}
    assert sum(e.of.family == "plus" for e in found) == 3 * sum(e.of.family == "more" for e in found) > 0
    for kind in ("t2t/minus", "asr/plus", "text/plus", "tts/plus", "speech/plus"):
        with pytest.raises(ValueError, match=f"nothing of kind '{kind}'"):
            documents.examples(corpus, "train", {kind: 1.0})


@pytest.mark.parametrize(
    "mix",
    [
        {"asr": 0},
        {"asr": "much"},
        {"song": 1.0},
        {"song/plus": 1.0},
        {},
        {"asr": 1e-9},
        {"asr": float("nan")},
    ],
)
def test_a_mix_that_cannot_be_is_one_line(corpus, mix):
    with pytest.raises(ValueError, match="mix: "):
        documents.examples(corpus, "train", mix)


def test_a_kind_without_examples_is_refused_in_train_and_left_out_elsewhere(corpus, tmp_path):
    for name in ("manifest", "units"):
        rows = (corpus / f"{name}.jsonl").read_text().splitlines()
        keep = [row for row in rows if json.loads(row)["id"] not in ("2",)]  # the only spoken answer
        (tmp_path / f"{name}.jsonl").write_text("\n".join(keep))
    (tmp_path / "dialogues.jsonl").write_text((corpus / "dialogues.jsonl").read_text())
    with pytest.raises(ValueError, match="nothing of kind 's2s'"):
        documents.examples(tmp_path, "train", {"s2s": 1.0})
    assert {e.kind for e in documents.examples(tmp_path, "heldout", {"s2s": 0.5, "s2t": 0.5})} == {"s2t"}


def test_speech_documents_train_every_token(corpus, tok):
    (example, *_) = documents.examples(corpus, "train", {"speech": 1.0})
    ids, mask = documents.render(
        tok, example, random.Random(0), noise=0.5
    )  # what is spoken is never disturbed
    assert tok.decode(ids[1:]).replace(" ", "") == units_to_text(example.of.units) and all(mask)


def test_misheard_units_are_as_many_as_asked_for_and_stay_reduced():
    units_ = [i % 10 for i in range(10_000)]
    heard = documents.mishear(units_, 0.1, 1000, random.Random(0))
    assert 0.88 < len(heard) / len(units_) < 0.92 and all(a != b for a, b in zip(heard, heard[1:]))
    assert 0.08 < sum(u >= 10 for u in heard) / len(units_) < 0.12
    assert documents.mishear(units_, 0.0, 1000, random.Random(0)) == units_
    assert documents.mishear([5], 1.0, 1000, random.Random(0)) == [5]  # never silence


@pytest.mark.parametrize(
    "line, said", [("{", "line 1"), ("[]", "needs the keys"), ('{"id": 1}', "needs the keys")]
)
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
