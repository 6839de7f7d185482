"""training/reading.py: the documents of a stage as maps: the very documents of training, made once."""

import dataclasses
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch

import config
import tokenizer
import train
from data import batches, documents, tokens
from files import fingerprint, write_jsonl
from run import Run
from tokenizer import Tokenizer
from training import before, reading

ROOT = Path(__file__).resolve().parent.parent
MIX = ["--stage2.mix", "{ asr = 1, tts = 1, text = 1 }", "--stage3.mix", "{ asr = 1 }"]


def settings(*flags: str) -> train.Config:
    return config.read(ROOT / "configs/ci.toml", train.Config, [*MIX, *flags])


@pytest.fixture
def run(tmp_path) -> Run:
    """12 recordings of two speakers; two are held out."""
    tables = {"manifest": [], "units": []}
    for i in range(12):
        row = {"id": f"{i}", "wav": f"{i}.wav", "text": f"Sentence {i}.", "speaker": i % 2, "seconds": 1.0}
        tables["manifest"].append(row | {"split": "heldout" if i in (3, 4) else "train"})
        units = [unit % 20 for unit in range(30)]
        tables["units"].append({"id": f"{i}", "units": units, "durations": [1] * len(units)})
    for name, rows in tables.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return Run(tmp_path, tmp_path / "corpus", 0, torch.device("cpu"))


@pytest.fixture
def tok(run) -> Tokenizer:
    texts = documents.sentences(documents.read_tables(run.out, None), "train")
    return Tokenizer.train(texts, run.tokenizer, 700, 20)


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, int]]:
    """(map, part) of every part that is made."""
    found = []
    make_part = tokens.make_part

    def noted(job):
        found.append((job.folder.name, job.number))
        return make_part(job)

    monkeypatch.setattr(tokens, "make_part", noted)
    return found


def test_a_stage_reads_the_documents_that_its_examples_make_in_every_epoch_anew(run, tok):
    section = settings("--stage2.steps", "16", "--stage2.noise", "0.2").stage2
    read, held_out = reading.stage_documents("stage2", run, section, tok)
    tables = documents.read_tables(run.out, tok.n_units)
    examples = documents.examples(tables, "train", section.mix)
    assert 16 * section.batch_size > 2 * len(examples)
    seen = {}
    for index in range(16 * section.batch_size):
        item, epoch = batches.order(index, len(examples), run.seed)
        draw = random.Random(f"{run.seed} {epoch} {item}")
        expected = documents.render(tok, examples[item], draw, section.noise)
        assert read(index) == expected
        seen.setdefault(item, []).append(read(index)[0])
    changing = [item for item in seen if examples[item].kind != "text"]
    assert all(len({str(ids) for ids in seen[item]}) > 1 for item in changing)
    with pytest.raises(IndexError):
        read(16 * section.batch_size)
    kept = documents.examples(tables, "heldout", section.mix)
    kept = random.Random(run.seed).sample(kept, min(64, len(kept)))
    assert held_out == [documents.render(tok, example, random.Random(i)) for i, example in enumerate(kept)]
    assert held_out


def test_maps_are_made_once_and_anew_when_what_they_are_made_of_changes(run, tok, made, monkeypatch):
    c = settings()
    read = partial(reading.stage_documents, "stage2", run)
    read(c.stage2, tok)
    assert made == [("train", 0), ("heldout", 0)]
    made.clear()
    with monkeypatch.context() as patch:  # nothing of the corpus is looked at again
        patch.setattr(documents, "read_tables", None)
        read(c.stage2, tok)
        read(dataclasses.replace(c.stage2, lr=1.0), tok)
    assert made == []
    for key, value in {"noise": 0.3, "max_len": 200, "mix": {"asr": 1.0}, "steps": 9}.items():
        read(dataclasses.replace(c.stage2, **{key: value}), tok)
        assert ("train", 0) in made, key
        read(c.stage2, tok)
        made.clear()
    units = run.out / "units.jsonl"
    rows = [json.loads(line) for line in units.read_text().splitlines()]
    write_jsonl(units, [row | {"units": row["units"][::-1]} for row in rows])
    read(c.stage2, tok)
    assert made == [("train", 0), ("heldout", 0)]
    made.clear()
    reading.stage_documents("text", run, c.text, tok)
    made.clear()
    units.unlink()  # the text model reads none
    reading.stage_documents("text", run, c.text, tok)
    assert made == []


def test_a_killed_run_makes_the_parts_that_are_missing(run, tok, made, monkeypatch):
    monkeypatch.setattr(reading, "PART", 5)
    section = settings().stage2  # 3 steps of 4 documents
    found, _ = reading.stage_documents("stage2", run, section, tok)
    whole = [found(i) for i in range(12)]
    folder = run.out / "tokens/stage2/train"
    for name in ("tokens.json", "00001.json", "00002.json"):
        (folder / name).unlink()
    made.clear()
    found, _ = reading.stage_documents("stage2", run, section, tok)
    assert made == [("train", 1), ("train", 2)] and [found(i) for i in range(12)] == whole


def test_processes_make_the_same(run, tok, monkeypatch):
    monkeypatch.setattr(reading, "PART", 5)
    section = settings().stage2
    reading.stage_documents("stage2", run, section, tok)
    folder = run.out / "tokens/stage2/train"
    alone = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    reading.stage_documents("stage2", dataclasses.replace(run, workers=2), section, tok)
    assert alone == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_held_out_recordings_there_is_an_empty_map(run, tok, made):
    rows = [json.loads(line) for line in run.manifest.read_text().splitlines()]
    write_jsonl(run.manifest, [row | {"split": "train"} for row in rows])
    for expected in ([("train", 0)], []):
        made.clear()
        _, held_out = reading.stage_documents("stage1", run, settings().stage1, tok)
        assert held_out == [] and made == expected


# ---- Speech of the text-to-unit generator ------------------------------------------------------------------


@pytest.fixture
def talk(run, tok) -> tuple[Run, Tokenizer]:
    """30 dialogues, of which ten questions are recorded for training, and two held out."""
    rows = [json.loads(line) for line in run.manifest.read_text().splitlines()]
    recorded = [row for row in rows if row["split"] == "train"]
    for i, row in enumerate(recorded):
        row["text"] = f"Question {i}?"
    write_jsonl(run.manifest, rows)
    dialogues = [{"question": f"Question {i}?", "answer": f"Answer {i}.", "family": ""} for i in range(30)]
    dialogues += [
        {"question": f"Asked {i}?", "answer": f"So {i}.", "family": "", "split": "heldout"} for i in (0, 1)
    ]
    write_jsonl(run.out / "dialogues.jsonl", dialogues)
    return run, tok


def stage3(**more) -> train.Stage3:
    return train.Stage3(**({"steps": 3, "batch_size": 4, "mix": {"chain": 0.8, "asr": 0.2}} | more))


def texts_to_speak(run: Run, section, tok: Tokenizer) -> list[str]:
    return reading.texts_to_speak("stage3", run, section, tok, documents.read_tables(run.out, tok.n_units))


def speech_in(run: Run, tok: Tokenizer, section, spoken: dict[str, list[int]]) -> tuple[list, list]:
    """All documents of the stage, those of training and those held out."""
    write_jsonl(run.spoken, [{"text": text, "units": units} for text, units in spoken.items()])
    read, held_out = reading.stage_documents("stage3", run, section, tok)
    return [read(i) for i in range(section.steps * section.batch_size)], held_out


def test_the_speech_that_a_stage_needs_is_known_before(talk, capsys):
    run, tok = talk
    section = stage3()
    needed = texts_to_speak(run, section, tok)
    assert len(set(needed)) == len(needed) and not {f"Question {i}?" for i in range(10)} & set(needed)
    sides = {f"Question {i}?" for i in range(10, 30)} | {f"Answer {i}." for i in range(30)}
    assert 0 < len(set(needed) & sides) < len(sides) / 2, "12 documents"
    assert set(needed) & {"Asked 0?", "Asked 1?", "So 0.", "So 1."}, "the probe's"

    number = {text: [i % 20, i // 20, 19] for i, text in enumerate(sorted(sides | set(needed)))}
    everything = speech_in(run, tok, section, number)
    assert speech_in(run, tok, section, {text: number[text] for text in needed}) == everything
    for text in needed:  # and nothing else is needed
        assert speech_in(run, tok, section, number | {text: []}) != everything, text
    assert "read as text" not in capsys.readouterr().out


def test_a_stage_that_reads_long_enough_needs_all(talk):
    run, tok = talk
    needed = texts_to_speak(run, stage3(steps=300), tok)
    assert set(needed) >= {f"Question {i}?" for i in range(10, 30)} | {f"Answer {i}." for i in range(30)}
    needed = texts_to_speak(run, stage3(steps=300, mix={"t2t": 1.0}), tok)
    assert needed == []


def test_speech_that_is_too_long_is_read_as_text_and_changes_no_other_document(talk, capsys):
    run, tok = talk
    section = stage3(max_len=120)
    needed = texts_to_speak(run, section, tok)
    spoken = dict.fromkeys(needed, [1, 2, 3])
    longer = next(text for text in needed if text.startswith("Answer"))
    documents_before, _ = speech_in(run, tok, section, spoken)
    question = longer.replace("Answer", "Question").replace(".", "?")
    without, _ = speech_in(run, tok, section, spoken | {longer: [], question: []})
    capsys.readouterr()
    now, _ = speech_in(run, tok, section, spoken | {longer: [4, 5] * 60})
    said = "with the speech of the text-to-unit generator 1 documents of kind 'chain' are longer"
    assert f"stage3, train: {said}" in capsys.readouterr().out
    assert now == without != documents_before
    assert max(len(ids) for ids, _ in now) <= 120


# ---- Maps of the config ------------------------------------------------------------------------------------


@pytest.fixture
def table(run, tok) -> Path:
    """A map of 200 documents, and a file that says of which clusters its units are."""
    rows = [
        {"prefix": "", "plain_text": f"[Human]: {i}<eoh>. [SpeechGPT]: {i * 'x '}<eoa>."} for i in range(200)
    ]
    write_jsonl(run.out / "lines.jsonl", rows)
    (run.out / "made_of.json").write_text(json.dumps({"units": clusters(run)}))
    tokens.tokenize(run.out / "lines.jsonl", run.out / "map", run.tokenizer, max_len=1000)
    return run.out / "map"


def clusters(run: Run, content: bytes = b"centers") -> str:
    folder = run.model / "hubert"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kmeans.safetensors").write_bytes(content)
    return fingerprint(
        *(folder / f"{name}" for name in ("kmeans.safetensors", "model.safetensors", "units.json"))
    )


def test_maps_are_read_instead_of_the_mix_and_the_corpus_is_not(run, tok, table, capsys, monkeypatch):
    c = settings("--stage2.tokens", f'{{ "{table}" = 1 }}')
    before.check_corpus(train.STAGES, run, c)
    assert f"stage2: documents to train on: 200 of {table}" in capsys.readouterr().out
    monkeypatch.setattr(documents, "read_tables", None)
    read, held_out = reading.stage_documents("stage2", run, c.stage2, tok)
    n = len(tokens.Mixture({tokens.TokenMap(table): 1.0}, c.stage2.max_len))
    assert "documents are longer than stage2.max_len" in capsys.readouterr().out and 0 < n < 198
    assert len(held_out) == 0
    _, held_out = reading.stage_documents("stage2", run, dataclasses.replace(c.stage2, max_len=5000), tok)
    assert held_out in (
        [a, b]
        for a in map(tokens.TokenMap(table).__getitem__, (198, 199))
        for b in map(tokens.TokenMap(table).__getitem__, (198, 199))
        if a != b
    )
    epoch = [read(i) for i in range(n)]
    assert sorted(epoch) == sorted(tokens.TokenMap(table)[i] for i in range(n))
    again = [read(i) for i in range(n, 2 * n)]
    assert sorted(again) == sorted(epoch) and again != epoch
    assert not (run.out / "tokens").exists()


def test_maps_of_others_are_refused_before_the_first_stage(run, tok, table):
    c = settings("--stage2.tokens", f'{{ "{table}" = 1 }}')
    clusters(run, b"other centers")
    with pytest.raises(ValueError, match=f"{table.name} was made of units of another HuBERT") as error:
        before.check_corpus(train.STAGES, run, c)
    assert "\n" not in str(error.value)
    clusters(run)
    before.check_corpus(train.STAGES, run, c)
    Tokenizer.train(["Other words of something else."] * 9, run.tokenizer, 690, 20)
    with pytest.raises(ValueError, match=f"{table.name} was made with another tokenizer than"):
        before.check_corpus(train.STAGES, run, c)


def test_speech_and_instructions_of_a_corpus_become_maps_of_stages_1_and_2(run, tok):
    """data/speechinstruct/prepare.py writes both, for corpora that fit into no memory."""
    from data.speechinstruct import prepare

    options = type(
        "Options", (), dict(split="train", asr=0.5, style="paper", seed=0, words=35, standard=False)
    )
    out = run.out / "instruct"
    out.mkdir()
    prepare.prepare(run.out, out, run.out / "units.jsonl", 20, None, options)
    tokens.tokenize(out / "speech.jsonl", out / "speech", run.tokenizer)
    found = tokens.TokenMap(out / "speech", len(tok))
    expected = tok.encode(tokenizer.units_to_text([unit % 20 for unit in range(30)]))
    assert [found[i] for i in range(len(found))] == [(expected, [True] * len(expected))] * 10
    c = settings("--stage1.tokens", f'{{ "{out / "speech"}" = 1 }}')
    read, _ = reading.stage_documents("stage1", run, c.stage1, tok)
    assert read(0) == found[0]
