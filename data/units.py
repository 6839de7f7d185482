"""A corpus as units: every recording of a manifest through HuBERT and k-means, once, into `units.jsonl` (paper §3.1).

    manifest.jsonl  {"id": "q0001-a", "wav": "wav/q0001-a.wav", "text": "...", "speaker": 0, "split": "train", ...}
    units.jsonl     {"id": "q0001-a", "units": [17, 4, 93, ...], "durations": [2, 1, 5, ...]}

Units are reduced (no unit twice in a row); `durations` counts the 20 ms frames each one stands for. There may be a
third file, perturbed.jsonl: the same of the model's own voice with other paces and pitches, as if others said what it
says (ours). It teaches recognition what only the own voice has recorded.

    perturbed.jsonl  {"id": "q0001-a", "units": [...], "durations": [...], "rate": 1.08, "pitch": 0.9}

of training recordings only; rate and pitch as in `audio.play`.
"""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import checkpoint
import run
from checkpoint import read_jsonl
from data import audio

OWN_VOICE = 0  # the speaker in whose voice the model answers


def read_manifest(corpus: str | Path) -> list[dict]:
    return read_jsonl(Path(corpus) / "manifest.jsonl", ("id", "wav", "text", "speaker", "split"))


def read_units(corpus: str | Path) -> list[dict]:
    """The manifest's rows, each with its `units` and `durations`."""
    units = {row["id"]: row for row in read_jsonl(Path(corpus) / "units.jsonl", ("id", "units", "durations"))}
    rows = read_manifest(corpus)
    if lost := [row["id"] for row in rows if row["id"] not in units]:
        raise ValueError(
            f"{corpus}/units.jsonl lacks {len(lost)} recordings (first: {lost[0]}); run stage units again"
        )
    return [row | units[row["id"]] for row in rows]


def read_perturbed(corpus: str | Path) -> list[dict]:
    """The same of perturbed.jsonl; of a corpus without that file no rows."""
    if not (path := Path(corpus) / "perturbed.jsonl").exists():
        return []
    found = read_jsonl(path, ("id", "units", "durations", "rate", "pitch"))
    rows = {row["id"]: row for row in read_manifest(corpus)}
    return [rows[row["id"]] | row for row in found if row["id"] in rows]


def map_speech(
    corpus: str | Path, rows: list[dict], function, device: torch.device, title: str, workers: int = 2
):
    """[function(wav (N,)) for each row's recording], with a progress bar, without gradients. A row with a `rate`
    and a `pitch` is played at them."""

    def one(row: dict):
        wav = audio.load(Path(corpus) / row["wav"])
        if "pitch" in row:
            wav = audio.play(wav, row["rate"], row["pitch"])
            wav = np.pad(
                wav, (0, max(0, audio.WINDOW - len(wav)))
            )  # a faster one may leave less than a frame
        with torch.inference_mode():
            return function(torch.from_numpy(wav).to(device))

    # Utterances are short: two threads of one core each beat one thread of two.
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(max(1, threads // workers))
    results = []
    try:
        with ThreadPoolExecutor(workers) as pool, run.progress(len(rows), 0, title, unit="utt") as bar:
            for result in pool.map(one, rows):
                results.append(result)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    return results


def extract(
    corpus: str | Path,
    extractor,
    device: torch.device,
    work: Path,
    perturb: tuple[float, float] = (0.0, 0.0),
    portion: int = 500,
):
    """Writes corpus/units.jsonl, and perturbed.jsonl if `perturb` is not 0: each recording at a rate and a pitch of its
    own, their logarithms between minus and plus the two numbers of `perturb`.

    A killed run keeps its finished portions in the folder `work`, until everything is written, and goes on there."""
    corpus = Path(corpus)
    rows = read_manifest(corpus)

    def draw(row: dict) -> dict:
        chance = random.Random(row["id"])
        return {key: math.exp(chance.uniform(-most, most)) for key, most in zip(("rate", "pitch"), perturb)}

    tables = {"units": rows}
    if any(perturb):
        tables["perturbed"] = [
            row | draw(row) for row in rows if row["split"] == "train" and row["speaker"] == OWN_VOICE
        ]
    parts = {
        name: _extract(corpus, table, name, extractor, device, work, portion)
        for name, table in tables.items()
    }
    (corpus / "perturbed.jsonl").unlink(missing_ok=True)  # of other units
    for name, part in parts.items():
        checkpoint.write_atomic(
            corpus / f"{name}.jsonl", part.read_bytes()
        )  # perhaps on another disk: no rename
    for part in parts.values():
        part.unlink()


def _extract(
    corpus: Path, rows: list[dict], name: str, extractor, device: torch.device, work: Path, portion: int
) -> Path:
    """work/NAME.jsonl.part with the units of all rows, some of which may be there already."""
    part = work / f"{name}.jsonl.part"
    part.touch()
    lines = [
        line for line in part.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")
    ]
    finished = {json.loads(line)["id"] for line in lines}
    part.write_text("".join(lines), encoding="utf-8")
    rows = [row for row in rows if row["id"] not in finished]
    for first in range(0, len(rows), portion):
        some = rows[first : first + portion]
        pairs = map_speech(corpus, some, extractor, device, f"{name} from {first + len(finished)}")
        with part.open("a", encoding="utf-8") as file:
            for row, (units, durations) in zip(some, pairs):
                played = {key: row[key] for key in ("rate", "pitch") if key in row}
                file.write(
                    json.dumps({"id": row["id"], "units": units, "durations": durations, **played}) + "\n"
                )
    return part


def warp(heard: np.ndarray, wanted: np.ndarray, ends: int = 10) -> tuple[np.ndarray, float]:
    """Which frame of `wanted` (U, C) says what each of `heard` (T, C) says, (T,), and how far apart they are: mean
    squared distance, infinite if one is too short for the other. Dynamic time warping (Sakoe & Chiba 1978).

    From frame to frame of `heard` it goes on by none to three of `wanted`, from one of its first `ends` to one of its
    last."""
    heard, wanted = heard.astype(np.float32), wanted.astype(np.float32)
    apart = (heard**2).sum(1)[:, None] + (wanted**2).sum(1) - 2 * heard @ wanted.T  # (T, U)
    T, U = apart.shape
    total = np.full((T, U + 3), np.inf, np.float32)  # of the best way to here; three columns before the first
    steps = np.zeros((T, U), np.int8)  # how many the last step of that way went on by
    total[0, 3 : 3 + ends] = apart[0, :ends]
    for t in range(1, T):
        before = np.stack([total[t - 1, 3 - step : U + 3 - step] for step in range(4)])
        steps[t] = before.argmin(0)
        total[t, 3:] = apart[t] + before.min(0)
    start = max(0, U - ends)
    u = start + int(total[-1, 3 + start :].argmin())
    distance, way = max(0.0, float(total[-1, 3 + u])) / T, np.empty(T, int)
    for t in range(T - 1, -1, -1):
        way[t] = u
        u -= int(steps[t, u])
    return way, distance


def heard_together(corpus: str | Path, extractor, n_units: int, recordings: int = 2000) -> torch.Tensor:
    """(n_units, K): of the time that a unit of units.jsonl lasts, the share of each of the K units of `extractor`.

    Counted over some training recordings. Each unit has half a frame of everybody's shares besides, and one that is not
    in those recordings nothing else."""
    rows = [row for row in read_units(corpus) if row["split"] == "train"]
    rows = random.Random(0).sample(rows, min(len(rows), recordings))
    heard = map_speech(corpus, rows, extractor.frame_units, torch.device("cpu"), "units heard before and now")
    frames = torch.zeros(n_units, len(extractor.kmeans.centers))
    for row, before in zip(rows, heard):
        now = torch.tensor(row["units"]).repeat_interleave(torch.tensor(row["durations"]))
        n = min(len(now), len(before))
        frames.index_put_((now[:n], before[:n]), torch.ones(n), accumulate=True)
    frames += 0.5 * frames.sum(0) / frames.sum()
    return frames / frames.sum(1, keepdim=True)
