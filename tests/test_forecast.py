"""training/forecast.py: what a run will take, said before its first step."""

import dataclasses
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import train
from config import read
from data import documents
from files import write_json, write_jsonl
from run import Run
from training import forecast

ROOT = Path(__file__).parent.parent
TEXTS = ("Where is Tom?", "Tom is in the garden.")


@pytest.fixture
def run(tmp_path):
    rows = [
        {"id": f"r{i}", "wav": f"{i}.wav", "text": TEXTS[i % 3 > 0], "speaker": i % 2, "split": split,
         "kind": "statement", "family": "", "seconds": 2.0}
        for i, split in enumerate(["train"] * 8 + ["heldout"] * 2)
    ]  # fmt: skip
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    exchange = {
        "question": "Where is Tom?",
        "answer": "Tom is in the garden.",
        "split": "train",
        "family": "",
    }
    write_jsonl(tmp_path / "dialogues.jsonl", [exchange])
    return Run(tmp_path, tmp_path, 0, torch.device("cpu"))


def configured(*flags: str):
    return read(ROOT / "configs/ci.toml", train.Config, flags)


def tables_of(run: Run) -> documents.Tables:
    tables = documents.read_tables(run.out, None)
    return tables._replace(rows=[row | {"units": range(80)} for row in tables.rows])


DISCRIMINATORS = (
    "--vocoder.adversarial_start",
    "0",
    "--vocoder.mpd_channels",
    "[4]",
    "--vocoder.mel_weight",
    "1.0",
)


@pytest.mark.parametrize(
    "flags", [(), ("--stage3.speech", "t2u"), ("--normalizer.steps", "3"), DISCRIMINATORS]
)
def test_a_step_of_every_stage_is_tried_and_nothing_of_it_stays(flags, run):
    config = configured(*flags)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = forecast.minutes(train.STAGES, run, config, tables_of(run))
    skipped = {name for name, stage in train.STAGES.items() if stage.skip(config)}
    assert found.keys() == train.STAGES.keys() - {"corpus"} - skipped
    assert all(0 < value < 60 for value in found.values()), found
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert sorted(path.name for path in run.out.iterdir()) == ["dialogues.jsonl", "manifest.jsonl"]


def test_time_goes_with_the_steps_and_finished_stages_take_none(run, monkeypatch):
    monkeypatch.setattr(forecast, "step_seconds", lambda *what: 0.5)
    tables = tables_of(run)
    flags = ("--stage1.steps", "1200", "--vocoder.frame_steps", "0", "--vocoder.steps", "600")
    found = forecast.minutes(train.STAGES, run, configured(*flags), tables)
    assert found["stage1"] == pytest.approx(10 * forecast.OVERHEAD)
    assert found["vocoder"] == pytest.approx(5 * forecast.OVERHEAD)
    run.state("stage1").mkdir(parents=True)
    write_json(run.state("stage1") / "done.json", {"finished": 1.0, "seconds": 1.0})
    assert "stage1" not in forecast.minutes(train.STAGES, run, configured(*flags), tables)


def test_the_longer_of_two_stages_side_by_side_counts(run, monkeypatch, capsys):
    minutes = {"hubert": 5.0, "units": 1.0, "text": 4.0, "stage2": 3.0, "vocoder": 30.0, "evaluate": 2.0}
    monkeypatch.setattr(forecast, "minutes", lambda *what: dict(minutes))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    forecast.tell(train.STAGES, run, configured("--parallel_stages", "true"), tables_of(run))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("time: about 38 min on these 2 cores")
    assert first.endswith(
        "hubert 5 min, units 1 min beside text 4 min; vocoder 30 min beside stage2 3 min; evaluate 2 min"
    )
    assert re.fullmatch(rf"disk: about \d+ MB in {run.out}, where [\d.]+ [GM]B are free", second)
    forecast.tell(train.STAGES, run, configured("--parallel_stages", "false"), tables_of(run))
    assert capsys.readouterr().out.startswith("time: about 45 min")


def test_too_little_disk_is_told(run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e6, 1e6, 1e6))
    monkeypatch.setattr(forecast, "minutes", lambda *what: {})
    (line,) = forecast.describe(train.STAGES, run, configured(), tables_of(run))
    assert line.endswith("where 1 MB are free; that is too little")


def test_a_large_model_is_not_tried(run):
    config = configured()
    config.llama = dataclasses.replace(config.llama, dim=4096, n_layers=32, n_heads=32, hidden_dim=11008)
    _, line = forecast.describe(train.STAGES, run, config, tables_of(run))
    assert line.startswith("time: a model of 5,") and "--plan" in line


def test_tokens_of_documents_are_as_many_as_the_recordings_are_long(run):
    tables = tables_of(run)
    section = dataclasses.replace(configured().stage1, mix={"speech": 1.0}, max_len=1000, tokens={})
    assert forecast.mean_tokens(tables, section) == 80
    assert 80 < forecast.mean_tokens(tables, dataclasses.replace(section, mix={"asr": 1.0})) < 130
    assert forecast.mean_tokens(tables, dataclasses.replace(section, max_len=50)) == 50
