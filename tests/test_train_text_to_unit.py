"""train_text_to_unit.py: whose recordings it learns from, its batches, what it speaks of the dialogues."""

import json
import random
from itertools import permutations

import pytest
import torch

import train_text_to_unit as t2u
from data import documents
from run import Run
from text_to_unit import Search, Stack, TextToUnit, TextToUnitConfig, Vocabulary
from tokenizer import Tokenizer
from train import Stage3

UNITS = 12
WORDS = {"one": [1, 2, 3], "two": [4, 5], "three": [6, 7, 8], "four": [9, 10]}


def spell(text: str) -> list[int]:
    return [unit for word in text.split() for unit in [0, *WORDS[word]]]


@pytest.fixture
def run(tmp_path) -> Run:
    """A run as far as its units and its tokenizer: each word has its units."""
    rows, units = [], []
    texts = [" ".join(words) for n in (1, 2) for words in permutations(WORDS, n)]
    unrecorded = ["two one", "three one"]
    random.Random(0).shuffle(texts)
    for number, text in enumerate(texts):
        for speaker in (0, 1):
            split = "heldout" if number % 8 == 7 else "train"
            row = {"id": f"{number}-{speaker}", "wav": "x.wav", "text": text, "speaker": speaker}
            rows.append(row | {"split": split, "kind": "statement", "seconds": 1.0})
            found = spell(text) if speaker == 0 else [11, 0]
            units.append({"id": row["id"], "units": found, "durations": [1] * len(found)})
    rows = [row for row in rows if row["text"] not in unrecorded]
    dialogues = [
        {"question": unrecorded[0], "answer": "four one", "family": ""},
        {"question": texts[0], "answer": "four one", "family": ""},
        {"question": unrecorded[1], "answer": "two", "family": "", "split": "heldout"},
    ]
    for name, table in (("manifest", rows), ("units", units), ("dialogues", dialogues)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    Tokenizer.train(texts, tmp_path / "tokenizer", 620, UNITS)
    return Run(tmp_path, tmp_path, 0, torch.device("cpu"))


STACK = Stack(dim=32, ffn_dim=64, n_layers=1, n_heads=2, pre_norm=True)


def model_of(run: Run, **more) -> TextToUnit:
    torch.manual_seed(0)
    vocabulary = Vocabulary.new((run.tokenizer / "tokenizer.model").read_bytes(), UNITS)
    return TextToUnit(TextToUnitConfig(STACK, STACK, dropout=0.0, **more), vocabulary).eval()


def test_it_learns_to_speak_and_speaks_the_dialogues(run):
    section = t2u.TextToUnitSection(
        steps=120, batch_size=16, lr=5e-3, warmup=10, smoothing=0.0, beam=2, eval_every=120,
        model=TextToUnitConfig(STACK, STACK, dropout=0.0),
    )  # fmt: skip
    t2u.train(run, section, UNITS, centers=False)
    t2u.speak_dialogues(run, section, Stage3(steps=50, batch_size=4, mix={"s2s": 1.0}))
    rows = [json.loads(line) for line in run.spoken.read_text().splitlines()]
    spoken = {row["text"]: row["units"] for row in rows}
    assert spoken["two"] == spell("two") and spoken["four one"] == spell("four one")
    assert set(spoken) == {"two", "four one", "two one", "three one"}
    model = TextToUnit.from_pretrained(run.model / "text_to_unit")
    assert model.generate(["four one"], Search(beam=2)) == [spell("four one")]
    lines = [json.loads(line) for line in (run.metrics / "t2u.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_nll"] > 0 and lines[-1]["nll"] < lines[0]["nll"] / 5


def test_it_learns_from_the_recordings_of_the_models_voice_alone(run, capsys):
    model = model_of(run)
    pairs = documents.pairs(documents.read_tables(run.out, UNITS), "train")
    ids = t2u.encode(model, [*pairs, documents.Pair([1, 2], " ", 0)], "train")
    texts = {pair.text for pair in pairs}
    assert len(ids) == len(texts)  # one of two speakers, and nothing without a text
    assert sorted(model.vocabulary.to_units(units) for _, units in ids) == sorted(map(spell, texts))
    assert "left out" not in capsys.readouterr().out
    everybody = t2u.encode(model, pairs, "train", other_voices=True)
    others = [(text, units) for text, units in everybody if text[0] == Vocabulary.bos]
    assert len(everybody) == 2 * len(texts) and [pair for pair in everybody if pair not in others] == ids
    assert all(model.vocabulary.to_units(units) == [11, 0] for _, units in others)

    ids = t2u.encode(model_of(run, max_target=5), pairs, "train")
    assert max(len(units) for _, units in ids) == 5
    longer = sum(len(spell(text)) + 1 > 5 for text in texts)
    assert f"{longer} recordings of split train are longer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no recording of the model's voice has a text"):
        t2u.encode(model, [pair for pair in pairs if pair.speaker == 1], "train", other_voices=True)


@pytest.mark.parametrize("max_target, most", [(1024, 16), (12, 11)])
def test_speech_up_to_the_limit_has_come_to_no_end(run, capsys, monkeypatch, max_target, most):
    def endless(model, texts, search, batch):
        limit = min(search.max_len_b, model.config.max_target - 1)  # as in beam_search
        return [[i % UNITS for i in range(limit)] for _ in texts]

    monkeypatch.setattr(TextToUnit, "generate", endless)
    model = model_of(run, max_target=max_target)
    search = t2u.search_of(model, t2u.TextToUnitSection(), documents.read_tables(run.out, UNITS))
    assert search.max_len_b == most  # twice the eight units of "one three", if the model can speak so many
    assert [*t2u.speak(model, ["two"], search)] == [[{"text": "two", "units": []}]]
    assert "1 came to no end" in capsys.readouterr().out


def test_batches_are_shuffled_epochs_of_pairs_of_similar_length(monkeypatch):
    draw = random.Random(0)
    ids = [([n, 2], [4] * draw.randint(1, 60) + [2]) for n in range(10, 330)]
    batch_at = t2u.batches_of_similar_length(ids, 0, 20, 1)
    steps = [batch_at(step)[0] for step in range(16)]
    assert sorted(int(text[0]) for texts, _ in steps for text in texts) == list(range(10, 330))  # one epoch
    real = sum((units != 1).sum().item() for _, units in steps)
    assert real > 0.8 * sum(units.numel() for _, units in steps), "too much padding"
    longest = [units.shape[1] for _, units in steps]
    assert longest != sorted(longest), "long and short ones should come in turns"
    for texts, units in steps[:3]:
        for text, row in zip(texts, units):
            n, expected = int(text[0]), ids[int(text[0]) - 10][1]
            assert text.tolist() == [n, 2] and row[: len(expected)].tolist() == expected
    assert all(torch.equal(a, b) for a, b in zip(batch_at(5)[0], steps[5]))

    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        shares += t2u.batches_of_similar_length(ids, 0, 20, 2)(5)
    found = sorted(int(text[0]) for texts, _ in shares for text in texts)
    assert found == sorted(int(text[0]) for text in steps[5][0])  # the same step, in four pieces


def test_a_later_stage_3_gets_the_speech_that_it_needs_besides(run, monkeypatch):
    model_of(run).save_pretrained(run.model / "text_to_unit")
    asked = []

    def speak(model, texts, search):
        asked.append(texts)
        yield [{"text": text, "units": [len(asked)]} for text in texts]

    monkeypatch.setattr(t2u, "speak", speak)
    t2u.speak_dialogues(run, t2u.TextToUnitSection(), Stage3(steps=1, batch_size=1, mix={"t2t": 1.0}))
    assert asked.pop() == [] and documents.read_spoken(run.spoken, UNITS) == {}
    few = Stage3(steps=1, batch_size=1, mix={"s2t": 1.0})
    t2u.speak_dialogues(run, t2u.TextToUnitSection(), few)
    assert "four one" not in asked[0], "an answer that is read as text"
    before = documents.read_spoken(run.spoken, UNITS)
    assert set(before) == set(asked[0])
    t2u.speak_dialogues(run, t2u.TextToUnitSection(), few)
    assert len(asked) == 1, "all of it was there"
    t2u.speak_dialogues(run, t2u.TextToUnitSection(), Stage3(steps=9, batch_size=4, mix={"s2s": 1.0}))
    assert len(asked) == 2 and not set(asked[0]) & set(asked[1])
    after = documents.read_spoken(run.spoken, UNITS)
    assert after == before | dict.fromkeys(asked[1], [2])
    assert set(after) == {"four one", "two", "two one", "three one"}


def test_speech_that_was_saved_is_not_made_again(run, monkeypatch):
    model_of(run).save_pretrained(run.model / "text_to_unit")
    asked = []

    def killed(model, texts, search):
        for text in texts:
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(text)
            yield [{"text": text, "units": [5]}]

    monkeypatch.setattr(t2u, "speak", killed)
    monkeypatch.setattr(t2u, "SAVE_EVERY", -1)
    stage3 = Stage3(steps=9, batch_size=4, mix={"s2s": 1.0})
    with pytest.raises(KeyboardInterrupt):
        t2u.speak_dialogues(run, t2u.TextToUnitSection(), stage3)
    first = list(documents.read_spoken(run.spoken, UNITS))
    assert first == asked
    asked = []
    monkeypatch.setattr(t2u, "speak", lambda model, texts, search: asked.extend(texts) or iter([]))
    t2u.speak_dialogues(run, t2u.TextToUnitSection(), stage3)
    assert len(asked) == 2 and not set(asked) & set(first)


def test_what_cannot_be_spoken_is_counted(run, capsys):
    model = model_of(run, max_source=5)
    texts = ["one", "two one", "one two three four one two"]
    rows = [row for some in t2u.speak(model, texts, Search(1, max_len_b=4), 2) for row in some]
    assert len(rows) == 3 and all(len(row["units"]) < 4 for row in rows)
    assert next(row["units"] for row in rows if row["text"].startswith("one two three")) == []
    endless = sum(not row["units"] for row in rows) - 1
    said = capsys.readouterr().out
    assert f"of 3 texts 1 are longer than t2u.model.max_source, {endless} came to no end" in said


def test_the_spoken_file_is_checked(run):
    run.spoken.write_text('{"text": "two", "units": [4, 5]}\n')
    assert documents.read_spoken(run.spoken, UNITS) == {"two": [4, 5]}
    for line in (
        '{"text": "two", "units": [12]}',
        '{"text": 2, "units": [1]}',
        '{"text": "two", "units": "1"}',
    ):
        run.spoken.write_text(f"{line}\n")
        with pytest.raises(ValueError, match="row 1: must be a text and its units of 0 to 11"):
            documents.read_spoken(run.spoken, UNITS)


def test_a_unit_is_expected_where_as_much_of_the_text_is_spoken(run):
    vocabulary = model_of(run).vocabulary
    letters = t2u.letters_of(vocabulary)
    text = torch.tensor([vocabulary.encode("one three")])
    pieces = [list(vocabulary.text)[i] for i in text[0, :-1]]
    assert letters[text].tolist() == [[*map(len, pieces), 0]]
    target = torch.tensor([[*range(4, 12), Vocabulary.eos, Vocabulary.pad]])
    cost = t2u.off_the_diagonal(text, target, letters)
    assert (
        cost.shape == (1, 10, text.shape[1]) and not cost[0, 9].any() and 0 <= cost.min() <= cost.max() <= 1
    )
    nearest = cost[0, :9].argmin(1)
    assert (nearest.diff() >= 0).all() and nearest[0] == 0 and nearest[-1] >= text.shape[1] - 2
    # the middle of the first piece, as a fraction of all letters, is where it costs nothing
    middle = len(pieces[0]) / 2 / sum(map(len, pieces))
    distance = (torch.arange(9) + 0.5) / 9 - middle
    assert torch.allclose(cost[0, :9, 0], 1 - torch.exp(-(distance**2) / 0.02), atol=1e-6)


def test_half_of_the_heads_pay_for_looking_elsewhere(run):
    model = model_of(run)
    ids = t2u.encode(model, documents.pairs(documents.read_tables(run.out, UNITS), "train"), "train")[:4]
    text, target = t2u.pad(ids)
    cost = t2u.off_the_diagonal(text, target, t2u.letters_of(model.vocabulary))
    before = model.losses(text, target)[0]
    assert torch.allclose(model.losses(text, target, guide=0 * cost)[0], before)
    paid = model.losses(text, target, guide=cost)[0] - before
    mask, (cache,) = model.encode(text)
    cache.seen = []
    previous = torch.nn.functional.pad(target[:, :-1], (1, 0), value=Vocabulary.eos)
    model.decode(previous, mask, [cache])
    (weights,) = cache.seen  # (B, heads, T, S)
    assert torch.allclose(weights.sum(3), torch.ones(weights.shape[:3]), atol=1e-5)
    assert torch.allclose(paid, (weights[:, 0] * cost).sum(), rtol=1e-3)


def test_guided_it_looks_along_the_text(run):
    def cost(guide: float) -> float:
        section = t2u.TextToUnitSection(
            steps=40, batch_size=16, lr=5e-3, warmup=10, beam=1, eval_every=40, guide=guide,
            model=TextToUnitConfig(STACK, STACK, dropout=0.0),
        )  # fmt: skip
        t2u.train(run, section, UNITS, centers=False)
        model = TextToUnit.from_pretrained(run.model / "text_to_unit")
        ids = t2u.encode(model, documents.pairs(documents.read_tables(run.out, UNITS), "heldout"), "heldout")
        text, target = t2u.pad(ids)
        costs = t2u.off_the_diagonal(text, target, t2u.letters_of(model.vocabulary))
        before, _, n = model.losses(text, target)
        return ((model.losses(text, target, guide=costs)[0] - before) / n).item()

    assert cost(2.0) < 0.9 * cost(0.0)
