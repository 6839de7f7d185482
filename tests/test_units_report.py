"""evaluation/units_report.py: distances between units, and what they tell of phones, by hand."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import audio
from evaluation import units_report
from evaluation.units_report import by_speaker, edit_distance, pnmi, report, ued
from files import write_jsonl

short = st.lists(st.integers(0, 3), max_size=8)


def plain_distance(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    changed = plain_distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
    return min(changed, plain_distance(a[:-1], b) + 1, plain_distance(a, b[:-1]) + 1)


@given(short.map(lambda x: x[:5]), short.map(lambda x: x[:5]))
@settings(max_examples=60, deadline=None)
def test_the_distance_is_the_recursive_one(a, b):
    assert edit_distance(a, b) == plain_distance(a, b)


@given(short, short)
def test_ued_is_a_share_and_symmetric(a, b):
    assert 0 <= ued(a, b) == ued(b, a) <= 1
    assert ued(a, a) == 0


def test_pnmi_of_known_tables():
    assert pnmi(Counter({("a", 0): 5, ("b", 1): 5})) == pytest.approx(1.0)  # a unit for each phone
    assert pnmi(Counter({("a", 0): 5, ("b", 0): 5})) == pytest.approx(0.0)  # one unit for all
    assert pnmi(Counter({("a", 0): 5, ("a", 1): 5})) == 0.0  # no phone to tell from another
    half = pnmi(Counter({("a", 0): 1, ("b", 0): 1, ("c", 1): 1, ("d", 1): 1}))
    assert half == pytest.approx(0.5)  # one bit of two


class Loudness:
    """Units of four frames each: the number that the samples are, times 100."""

    def frame_units(self, wav: torch.Tensor) -> torch.Tensor:
        n = audio.n_frames(len(wav))
        return (wav[200::320][:n] * 100).round().long()


def corpus_of(folder, spoken: list[tuple[str, int, str, list[int]]]) -> list[dict]:
    rows = []
    for id, speaker, text, units in spoken:
        wav = np.repeat(np.array(units) / 100, 4 * 320).astype(np.float32)
        audio.save(folder / f"{id}.wav", np.pad(wav, (0, 80)))
        rows.append({"id": id, "speaker": speaker, "text": text, "wav": f"{id}.wav"})
    return rows


def test_the_report_compares_the_same_sentence_only(tmp_path):
    rows = corpus_of(
        tmp_path,
        [
            ("a0", 0, "One.", [1, 2, 3, 4]),
            ("b0", 0, "Two.", [5, 6, 7, 8]),
            ("a1", 1, "one", [1, 2, 9, 4]),
            ("b1", 1, "Two.", [5, 6, 7, 8]),
            ("c1", 1, "Three.", [1, 1, 1, 1]),  # the target speaker does not say it
            ("a2", 2, "One.", [20, 21, 22, 23]),
        ],
    )
    needed, pairs = by_speaker(rows, 10)
    assert {row["id"] for row in needed} == {"a0", "b0", "a1", "b1", "a2"}
    assert sorted(pairs[1]) == [("a1", "a0"), ("b1", "b0")] and pairs[2] == [("a2", "a0")] and 0 not in pairs
    frames = [{"id": id, "phones": ["x", "y"], "ends": [0.17, 9.0]} for id in ("a1", "b1")]
    write_jsonl(tmp_path / "phones.jsonl", frames)
    lines = report(tmp_path, rows, Loudness(), {1: "Anna"}, 10).splitlines()
    assert len(lines) == 4
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["Anna", "2", "0.125"]
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == ["2", "1", "1.000"]
    assert [cell.strip() for cell in lines[2].split("|")[5:7]] == ["1.000", "12.5"]
    assert lines[3].split("|")[5].strip() == "-"
    assert by_speaker(rows, 1)[1][1] and len(by_speaker(rows, 1)[1][1]) == 1


def test_mistakes_are_one_line(tmp_path):
    rows = corpus_of(tmp_path, [("a0", 0, "One.", [1, 2]), ("a1", 1, "Two.", [1, 2])])
    with pytest.raises(ValueError, match="no sentence is spoken by the target speaker and by another"):
        report(tmp_path, rows, Loudness(), {}, 10)
    rows[1]["text"] = "One."
    for phones, ends in ((["x"], []), ([], []), (["x"], ["y"])):
        write_jsonl(tmp_path / "phones.jsonl", [{"id": "a1", "phones": phones, "ends": ends}])
        with pytest.raises(ValueError, match="phones.jsonl, row 1"):
            report(tmp_path, rows, Loudness(), {}, 10)


def test_the_command_needs_items(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["units_report", str(tmp_path), "--items", "0"])
    with pytest.raises(ValueError, match="at least 1"):
        units_report.main()
