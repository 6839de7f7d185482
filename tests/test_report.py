"""The files of the report: tables, facts about the machine on every system, examples, curves."""

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from data import audio
from evaluation import report
from evaluation.measures import Item, Row
from request import Reply


def row(**changes):
    fields = {"key": "asr.heldout", "name": "ASR, held out", "value": 0.05, "low": 0.01, "high": 0.1, "n": 9}
    return Row(**fields | changes)


def test_a_table_keeps_its_columns_whatever_a_cell_holds():
    text = report.table(["a", "b"], [["x | y", "two\nlines"], [1, "z" * 500]])
    lines = text.splitlines()
    assert lines[:3] == ["| a | b |", "| --- | --- |", "| x / y | two lines |"]
    assert lines[3] == f"| 1 | {'z' * 240} |" and text.endswith("\n\n")


def test_the_table_of_rows_has_targets_if_there_is_one():
    text = report.row_table([row(baseline={"recognizer": 0.01, "other": None})])
    assert "target" not in text
    assert "| ASR, held out | 5.0 % | 1.0 % to 10.0 % | 9 | recognizer 1.0 %; other - |" in text
    text = report.row_table([row(target=0.1), row(name="spoken", value=None, low=None, high=None, n=0)])
    assert "| baseline | target |" in text
    assert "| 9 |  | at most 10.0 %: reached |" in text and "| spoken | - |  | 0 |  |  |" in text


def test_groups_have_shares_of_their_own_items():
    pytest.importorskip("jiwer")
    items = [
        Item("asr", "1", "heldout", 0, "plus", "?", "a b", "a b"),
        Item("asr", "2", "rendition", 1, "plus", "?", "a b", "a x"),
        Item("source", "1", "heldout", 0, "plus", "?", "a b", "a b"),
    ]
    text = report.group_table(items, "speaker", {"both": ("asr", ""), "held out": ("asr", "heldout")})
    assert text.splitlines()[2:4] == ["| 0 | 0 % of 1 | 0 % of 1 |", "| 1 | 50 % of 1 | - |"]


def test_the_machine_is_described():
    pytest.importorskip("faster_whisper")
    facts = report.about(torch.device("cpu"))
    assert facts.keys() == {"commit", "hardware", "versions"} and all(facts.values())
    assert f"torch {torch.__version__}" in facts["versions"] and " cores" in facts["hardware"]
    assert platform.python_version() in facts["versions"]


@pytest.mark.parametrize("system", ["Darwin", "Windows", "Linux"])
def test_the_processor_has_a_name_without_proc_and_without_programs(system, monkeypatch):
    def no_program(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(report, "Path", lambda _: Path("/no/such/file"))
    monkeypatch.setattr(report.subprocess, "run", no_program)
    assert report.processor() == "arm64"
    assert report.output_of("git") == ""


def test_a_mac_names_its_processor(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(report, "output_of", lambda *command: "Apple M2" if command[0] == "sysctl" else "")
    assert report.processor() == "Apple M2"


def test_a_failing_program_gives_nothing():
    assert report.output_of("git", "no-such-command") == ""


def test_examples_are_spread_over_all_replies(tmp_path):
    wav = np.full(1600, 0.1, np.float32)
    audio.save(tmp_path / "question.wav", wav)
    spoken = []
    for i in range(12):
        question = {
            "split": "heldout",
            "text": f"question {i}",
            "answer": "Two.",
            "path": tmp_path / "question.wav",
        }
        reply = Reply("transcript", "text", [], None if i == 4 else wav, "silent" if i == 4 else "")
        spoken.append((question, reply, "recognized"))
    examples = report.write_examples(tmp_path, spoken)
    assert [example["asked"] for example in examples] == [f"question {i}" for i in (0, 2, 4, 7, 9)]
    assert examples[2]["reply"] == "" and examples[2]["note"] == "silent"
    assert len(list((tmp_path / "examples").iterdir())) == 9
    assert len(report.write_examples(tmp_path, spoken[:3])) == 3
    text = report.example_table(examples)
    assert (
        "| [question 0](examples/1-question.wav) | transcript | text | [recognized](examples/1-reply.wav) |"
        in text
    )
    assert "| silent | Two. | heldout |" in text


def test_curves_are_the_numbers_of_whole_lines(tmp_path):
    lines = [json.dumps({"step": i, "loss": i / 2, "lr": 0.1, "sample": "text"}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"half a li', "[1]", '{"loss": 3}']))
    assert report.read_curves(tmp_path / "a.jsonl") == {"loss": [(0, 0.0), (1, 0.5), (2, 1.0)]}


@pytest.mark.parametrize("line", [
    b"\xff\xfe", b'{"step": "x", "loss": 1}', b'{"step": 3, "loss": NaN}', b'{"step": 3, "loss": 1e999}',
    b"[" * 5000, b'{"step": [], "loss": 1}', b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
])  # fmt: skip
def test_a_damaged_line_is_no_point_of_a_curve(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 0, "loss": 0.5}\n' + line + b'\n{"step": 1, "loss": 2}\n')
    assert report.read_curves(tmp_path / "a.jsonl") == {"loss": [(0, 0.5), (1, 2.0)]}


def test_a_report_is_written_whatever_characters_are_in_it(tmp_path):
    item = Item("asr", "1", "heldout", 0, "plus", "\ud800?", "a b", "a \u2028b")
    report.write_report(tmp_path, {"model": "m\ud800"}, [row()], [item], [], [])
    assert "- model: m?\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"][0]["n"] == 9
    assert len((tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()) == 1
