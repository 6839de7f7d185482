"""data/units.py: a corpus as units, in spite of kills; alignment and co-occurrence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import audio, documents, units
from data.corpus import TARGET_SPEAKER, read_manifest
from hubert import HuBERT, HuBERTConfig, UnitExtractor
from kmeans import KMeans, expand


def test_a_killed_extraction_does_nothing_twice(tmp_path):
    corpus, work, out = tmp_path / "corpus", tmp_path / "work", tmp_path / "out/units.jsonl"
    work.mkdir()
    out.parent.mkdir()
    rows = [
        {"id": str(i), "wav": f"{i}.wav", "text": "", "speaker": i % 2, "split": "train"} for i in range(6)
    ]
    for row in rows:
        audio.save(corpus / row["wav"], np.full(4000, 0.1))
    (corpus / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(corpus.iterdir())
    calls = []

    def extractor(wav, last=10**6):
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(len(wav))
        return [len(calls)], [1]

    def extract(last=10**6):
        cpu = torch.device("cpu")
        units.extract(
            corpus, read_manifest(corpus), out, lambda wav: extractor(wav, last), cpu, work, portion=1
        )

    with pytest.raises(KeyboardInterrupt):
        extract(last=3)
    assert len(calls) == 3 and not out.exists()
    extract()
    assert calls == [4000] * 6
    found = units.read_units(corpus, out, 20)
    assert [row["id"] for row in found] == [row["id"] for row in rows] and not any(work.iterdir())
    others = [json.dumps(row) + "\n" for row in rows if row["speaker"] != TARGET_SPEAKER]
    (corpus / "manifest.jsonl").write_text("".join(others))
    extract()
    assert len(units.read_units(corpus, out, 40)) == 3
    assert sorted(corpus.iterdir()) == before  # it is only read


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, list[dict]]:
    """Nine recordings of a third of a second to three seconds."""
    rows = []
    for i in range(9):
        noise = np.random.default_rng(i).normal(size=5000 + 5000 * (7 * i % 9)) * 0.05
        audio.save(tmp_path / f"corpus/{i}.wav", noise * np.linspace(0.1, 1, len(noise)))
        rows.append({"id": f"{i}", "wav": f"{i}.wav"})
    return tmp_path / "corpus", rows


def small_extractor(smooth: int = 3) -> UnitExtractor:
    torch.manual_seed(0)
    model = HuBERT(
        HuBERTConfig(
            conv_dim=(16,) * 7, dim=32, n_layers=2, n_heads=4, ffn_dim=64, pos_kernel=16, pos_groups=4
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    x = model.features(torch.randn(1, 96_000) * 0.05, 2)[0].detach()
    return UnitExtractor(model, KMeans(x[::12]), 2, smooth)


@pytest.mark.parametrize("smooth", [1, 3])
def test_units_in_batches_of_similar_lengths_are_those_of_one_by_one(tmp_path, corpus, smooth):
    folder, rows = corpus
    work = tmp_path / "work"
    work.mkdir()
    extractor, cpu, found = small_extractor(smooth), torch.device("cpu"), {}
    for name, seconds in (("one", None), ("batched", 4.0)):
        units.extract(folder, rows, tmp_path / name, extractor, cpu, work, portion=4, seconds=seconds)
        found[name] = {row["id"]: row for row in units.read_table(tmp_path / name, 999)}
    assert list(found["batched"]) == list(found["one"]) == [row["id"] for row in rows]
    differing = 0
    for name in found["one"]:
        one, batch = (expand(found[key][name]["units"], found[key][name]["durations"]) for key in found)
        assert len(one) == len(batch) == audio.n_frames(5000 + 5000 * (7 * int(name) % 9))
        differing += sum(a != b for a, b in zip(one, batch))
    assert differing <= 1  # a frame exactly between two clusters may fall to either
    assert len({unit for row in found["one"].values() for unit in row["units"]}) > 5


def test_each_rank_makes_its_portions_and_the_first_joins_them(tmp_path, corpus, monkeypatch):
    folder, rows = corpus
    made = {}

    def extract(rank: int, ranks: int, name: str):
        work = tmp_path / f"work of {name}"
        work.mkdir(exist_ok=True)
        monkeypatch.setattr(units.run, "rank", lambda: rank)
        monkeypatch.setattr(units.run, "world_size", lambda: ranks)
        monkeypatch.setattr(units.run, "barrier", lambda: None)
        calls = made.setdefault((rank, ranks), [])
        fake = lambda wav: calls.append(len(wav)) or ([len(wav) % 97, 0], [1, 2])  # noqa: E731
        units.extract(folder, rows, tmp_path / name, fake, torch.device("cpu"), work, portion=2)

    extract(0, 1, "alone")
    for rank in (2, 1, 0):
        extract(rank, 3, "shared")
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "alone").read_bytes()
    assert [len(made[rank, 3]) for rank in range(3)] == [4, 3, 2]  # portions 0 and 3, 1 and 4 (of one), 2
    assert not any((tmp_path / "work of shared").iterdir())


KILLED = """
import os, sys, torch
from pathlib import Path
from data import units
folder, last = Path(sys.argv[1]), int(sys.argv[2])
calls = []
def extractor(wav):
    if len(wav) == last:
        os.kill(os.getpid(), 9)
    calls.append(1)
    return [len(wav) % 97, 1], [3, 4]
if __name__ == "__main__":
    rows = [{"id": f"{i}", "wav": f"{i}.wav"} for i in range(9)]
    torch.set_num_threads(1)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    cpu = torch.device("cpu")
    units.extract(folder / "corpus", rows, folder / f"units{last}", extractor, cpu, work, portion=2)
    print(len(calls))
"""


@pytest.mark.skipif(os.name == "nt", reason="no signal 9")
def test_a_kill_in_the_middle_costs_a_portion_and_changes_no_byte(tmp_path, corpus):
    def extract(last: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(last)]
        return subprocess.run(command, capture_output=True, text=True)

    assert extract(0).stdout.split() == ["9"]
    assert extract(45_000).returncode == -9  # at the second recording of portion 2
    assert not (tmp_path / "units45000").exists()
    kept = sorted(path.name for path in (tmp_path / "work").glob("units-*"))
    assert kept == ["units-000000.jsonl", "units-000001.jsonl"]
    (tmp_path / "work/units-000001.jsonl").write_text('{"id": "of another corpus"}\n')  # not these rows
    done = extract(1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7"]  # portions 1 to 4
    assert (tmp_path / "units1").read_bytes() == (tmp_path / "units0").read_bytes()


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
        units.read_units(tmp_path, tmp_path / "units.jsonl", 3)
    (tmp_path / "units.jsonl").write_text("")
    with pytest.raises(ValueError, match="lacks 1 of 1 recordings .*'x'.* delete .*state/units and run"):
        units.read_units(tmp_path, tmp_path / "units.jsonl", 3)


@pytest.mark.parametrize(
    "found, durations, words",
    [
        ([0, 3], [1, 1], "unit 3 is not one of 0 to 2"),
        ([-1], [1], "unit -1 is not one of 0 to 2"),
        ([10**30], [1], "is not one of 0 to 2"),
        ([1.0], [1], '"units" must be a list of whole numbers'),
        ([True], [1], '"units" must be'),
        ("12", [1], '"units" must be'),
        ([], [], '"units" must be'),
        ([0, 1], [1], "2 units have 1 durations"),
        ([0], [0], "the durations make 0 frames, from 0 a unit"),
        ([0], [-3], "the durations make -3 frames"),
        ([0], [10**9], "the durations make 1000000000 frames"),
        ([0], [None], '"durations" must be'),
    ],
)
def test_a_row_of_units_that_cannot_be_is_named_and_never_becomes_text(tmp_path, found, durations, words):
    (tmp_path / "manifest.jsonl").write_text('{"wav": "x.wav", "text": "Hello."}\n')
    row = json.dumps({"id": "x", "units": found, "durations": durations})
    (tmp_path / "units.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=f"units.jsonl, row 1: .*{words}") as error:
        units.read_units(tmp_path, tmp_path / "units.jsonl", 3)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ValueError, match=words):
        documents.read_tables(tmp_path, 3)


numbers = st.lists(st.integers(-1, 4) | st.just(10**20) | st.floats() | st.none() | st.booleans(), max_size=4)
unit_rows = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", "b", "c", 7, None]),
        "units": numbers | st.text(max_size=3),
        "durations": numbers,
    },
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(unit_rows, max_size=4),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=3),
)
def test_any_table_of_units_is_read_or_refused_in_one_line(tmp_path_factory, rows, edits):
    folder = tmp_path_factory.getbasetemp() / "fuzz units"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_text('{"wav": "a.wav", "text": "x"}\n{"wav": "b.wav", "text": "y"}\n')
    rows = [{"id": name, "units": [1, 0, 2], "durations": [1, 2, 1]} for name in "ab"] + rows
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for place, new in edits:
        place %= len(content) + 1
        content = content[:place] + new + content[place + 1 :]
    (folder / "units.jsonl").write_bytes(content)
    try:
        found = units.read_units(folder, folder / "units.jsonl", 3)
    except ValueError as error:
        message = str(error)
        assert message.isprintable() and len(message) < len(str(folder)) + 300, message
        return
    for row in found:
        assert row["id"] in ("a", "b") and len(row["units"]) == len(row["durations"]) > 0
        assert all(type(unit) is int and 0 <= unit < 3 for unit in row["units"])
        assert all(type(n) is int and n >= 1 for n in row["durations"])
