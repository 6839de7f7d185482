"""data/units.py: a corpus as units, in spite of kills; alignment and co-occurrence."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import audio, units
from data.corpus import TARGET_SPEAKER


def test_a_recording_of_one_frame_keeps_it_at_every_pace(tmp_path):
    audio.save(tmp_path / "a.wav", np.full(400, 0.1))
    lengths = units.map_speech(
        tmp_path,
        [{"wav": "a.wav", "rate": rate, "pitch": 1.0} for rate in (0.5, 1.0, 2.0)],
        len,
        torch.device("cpu"),
        "",
    )
    assert lengths == [800, 400, 400]


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
    others = [json.dumps(row) + "\n" for row in rows if row["speaker"] != TARGET_SPEAKER]
    (corpus / "manifest.jsonl").write_text("".join(others))
    extract(0.2, 0.1)
    assert len(units.read_units(corpus)) == 3 and units.read_perturbed(corpus) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_dtw_finds_the_frames_that_were_repeated_and_skipped(steps, first):
    target = np.random.default_rng(0).normal(size=(first + sum(steps) + 1, 8))
    path = first + np.cumsum([0, *steps])
    found, distance = units.dtw_align(target[path], target)
    assert found.tolist() == path.tolist() and abs(distance) < 1e-4


def test_dtw_has_no_path_through_what_is_too_short():
    target = np.random.default_rng(0).normal(size=(40, 8))
    assert units.dtw_align(target[:3], target)[1] == np.inf
    path, distance = units.dtw_align(target + 0.1, target)
    assert path.tolist() == list(range(40)) and abs(distance - 0.08) < 1e-3


def test_a_corpus_without_units_says_which_stage_to_run(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"wav": "x.wav", "text": "Hello.", "seconds": 1.0}\n')
    with pytest.raises(FileNotFoundError, match="run the stage"):
        units.read_units(tmp_path)
    (tmp_path / "units.jsonl").write_text("")
    with pytest.raises(ValueError, match="run stage units again"):
        units.read_units(tmp_path)


def test_cooccurrence_counts_frames_that_belong_together(tmp_path):
    class Extractor:
        def frame_units(self, wav):
            return torch.tensor([2, 2, 0, 0, 0, 1])

        class kmeans:
            centers = torch.zeros(3, 1)

    audio.save(tmp_path / "a.wav", np.full(2000, 0.1))
    (tmp_path / "manifest.jsonl").write_text('{"wav": "a.wav", "text": ""}\n')
    (tmp_path / "units.jsonl").write_text('{"id": "a", "units": [1, 0], "durations": [3, 3]}\n')
    table = units.cooccurrence(tmp_path, Extractor(), n_units=3)
    prior = torch.tensor([3, 1, 2]) / 6 / 2  # half a frame, spread as all frames are
    expected = torch.stack([torch.tensor([2.0, 1, 0]) + prior, torch.tensor([1.0, 0, 2]) + prior, prior])
    torch.testing.assert_close(table, expected / expected.sum(1, keepdim=True))
