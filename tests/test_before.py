"""training/before.py: what a corpus lacks for a stage is told before any step; what is too long, counted."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

import config
import train
from data import documents
from files import write_json
from run import Run
from tokenizer import Tokenizer
from training import before, reading
from training.stages import record

ROOT = Path(__file__).resolve().parent.parent
NO_DIALOGUES = ["--stage2.mix", "{ asr = 1, tts = 1, text = 1 }", "--stage3.mix", "{ asr = 1 }"]


def settings(*flags: str) -> train.Config:
    return config.read(ROOT / "configs/ci.toml", train.Config, [*flags])


@pytest.fixture
def run(tmp_path) -> Run:
    """12 recordings of two speakers, every fourth of fourteen seconds; two are held out."""
    tables = {"manifest": [], "units": []}
    for i in range(12):
        row = {"id": f"{i}", "wav": f"{i}.wav", "text": f"Sentence {i}.", "speaker": i % 2, "seconds": 1.0}
        tables["manifest"].append(row | {"split": "heldout" if i in (3, 4) else "train"})
        units = [unit % 20 for unit in range(450 if i % 4 == 3 else 30)]
        tables["units"].append({"id": f"{i}", "units": units, "durations": [1] * len(units)})
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(tmp_path, tmp_path / "corpus", 0, torch.device("cpu"))


@pytest.fixture
def tok(run) -> Tokenizer:
    return Tokenizer.train(
        documents.sentences(documents.read_tables(run.out, None), "train"), run.tokenizer, 700, 20
    )


def test_what_each_stage_will_read_is_said(run, capsys):
    before.check_corpus(train.STAGES, run, settings(*NO_DIALOGUES))
    assert capsys.readouterr().out.splitlines() == [
        "text: documents to train on: 10 text",
        "stage1: documents to train on: 10 speech",
        "stage2: documents to train on: 10 asr, 5 tts, 10 text",
        "stage3: documents to train on: 10 asr",
    ]
    before.check_corpus(train.STAGES, run, settings(*NO_DIALOGUES[:2], "--stage3.steps", "0"))
    assert "stage3" not in capsys.readouterr().out


def test_how_many_dialogues_are_spoken_is_said(run, capsys):
    rows = [
        {"question": "sentence 0", "answer": "SENTENCE 2!"},
        {"question": "Who is there?", "answer": "Sentence 1."},
        {"question": "Sentence 4.", "answer": "Sentence 6.", "split": "heldout"},
    ]
    (run.out / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before.check_corpus(train.STAGES, run, settings())
    said = capsys.readouterr().out
    assert "dialogues: 2 to train on; recordings speak 1 of their questions" in said
    assert "in the model's voice, 1 of their answers (not the question 'Who is there?')" in said
    assert "stage3: documents to train on: 2 chain, 2 standard, 10 asr" in said


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "stage2.mix: .* nothing of kind 's2t' .* dialogues.jsonl"),
        (["--stage2.mix", "{ asr = 1 }"], "stage3.mix: .* nothing of kind 'chain' or 'standard'"),
        ([*NO_DIALOGUES, "--hubert.speaker", "9"], "hubert.speaker is 9, who has no training recording"),
        ([*NO_DIALOGUES, "--vocoder_model.num_speakers", "1"], "vocoder_model.num_speakers to at least 2"),
        ([*NO_DIALOGUES, "--units.speaker", "9"], "units.speaker is 9, who has no training recording"),
        ([*NO_DIALOGUES, "--vocoder.speaker", "9"], "vocoder.speaker is 9, who has no training recording"),
    ],
)
def test_what_the_corpus_lacks_is_one_line_before_any_step(run, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        before.check_corpus(train.STAGES, run, settings(*flags))
    assert "\n" not in str(error.value)


def test_a_vocoder_of_one_voice_needs_no_number_for_the_others(run):
    before.check_corpus(
        train.STAGES,
        run,
        settings(*NO_DIALOGUES, "--vocoder.speaker", "0", "--vocoder_model.num_speakers", "1"),
    )


def test_a_changed_corpus_is_told_for_every_stage_before_any_of_them_works(run):
    c = settings(*NO_DIALOGUES)
    folder = run.state("text")
    folder.mkdir(parents=True)
    write_json(folder / "config.json", record(train.STAGES, "text", run, c))
    (folder / "state.safetensors").write_bytes(b"of some steps")
    before.check_corpus(train.STAGES, run, c)
    more = {"id": "new", "wav": "new.wav", "text": "A row more.", "speaker": 0, "split": "train"}
    with (run.out / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(more) + "\n")
    with pytest.raises(ValueError, match="stage text was begun with other recordings or texts .* delete"):
        before.check_corpus(train.STAGES, run, c)


def test_long_recordings_are_counted_and_left_out_before_the_first_step(run, tok, capsys):
    c = settings(*NO_DIALOGUES)
    tables = documents.read_tables(run.out, 20)
    found = reading.fitting_examples(tables, "train", "stage2", c.stage2, tok)
    assert {len(example.source.units) for example in found if example.kind == "asr"} == {30}
    (asr,) = capsys.readouterr().out.splitlines()
    assert asr.startswith("stage2, train: 2 of 10 documents of kind 'asr', of up to 4")
    assert asr.endswith("are longer than stage2.max_len = 256: they are left out; raise it to use them")
    held_out = reading.fitting_examples(tables, "heldout", "stage2", c.stage2, tok)
    assert {example.source.units[-1] for example in held_out if example.kind == "asr"} == {9}
    assert "stage2, heldout: 1 of 2 documents of kind 'asr'" in capsys.readouterr().out


def test_a_later_stage_without_short_documents_is_told_before_stage_1(run, tok):
    before.check_lengths(run, settings(*NO_DIALOGUES), tok)
    flags = ["--stage3.max_len", "40"]
    with pytest.raises(
        ValueError, match="stage3, train: 10 of 10 documents of kind 'asr', .* nothing is left"
    ):
        before.check_lengths(run, settings(*NO_DIALOGUES, *flags), tok)
    before.check_lengths(run, settings(*NO_DIALOGUES, *flags, "--stage3.steps", "0"), tok)


@pytest.mark.parametrize(
    "there, advice",
    [
        (("triton", "gcc"), ""),
        (("triton", "clang"), ""),
        (("gcc",), "text.compile needs the package triton; install it, or set text.compile = false"),
        (("triton",), "text.compile needs gcc or clang"),
    ],
)
def test_what_compiling_needs_is_looked_for_before_the_first_stage(there, advice, monkeypatch):
    def find(name: str) -> str | None:
        return name if name in there else None

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(before, "find_spec", find)
    monkeypatch.setattr(before.shutil, "which", find)
    monkeypatch.setattr(before.sys, "platform", "linux")
    small, tiny = (config.read(ROOT / f"configs/{name}.toml", train.Config) for name in ("small", "tiny"))
    check = partial(before.check_compiler, train.STAGES, train.STAGES)
    check(small, torch.device("cpu"))
    check(tiny, torch.device("cuda"))
    with pytest.raises(ValueError, match=advice) if advice else nullcontext():
        check(small, torch.device("cuda"))
