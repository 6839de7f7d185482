"""A corpus as units: every recording through HuBERT and k-means, once, into `units.jsonl` (paper §3.1).

Both files are in the folder of a run, not in that of the corpus: another run may have other units of it.

    manifest.jsonl  {"id": "q0001-a", "wav": "wav/q0001-a.wav", "text": "...", "speaker": 0, ...}
    units.jsonl     {"id": "q0001-a", "units": [17, 4, 93, ...], "durations": [2, 1, 5, ...]}

Units are deduplicated (no unit twice in a row); `durations` counts the 20 ms frames that each of them lasts.
`dtw_align` aligns two recordings of one sentence.

The paper's 60,000 hours (§3.1, §5.1), from what was measured: one H100 makes units of recordings of 2 to 20 s
at 2,175 times real time with a HuBERT of base size up to layer 11, in batches of 320 s with float32
convolutions (858 times one by one; 2,656 in TF32, where 5 of 10,000 frames then depend on who else is in the
batch). That is 28 hours on one and 3.5 on eight. At 36.5 units and 317 bytes a second of speech, as in the
tiny world, units.jsonl takes 68 GB, twice that while the portions are joined, and as ids (data/tokens.py)
17 GB; 16 kHz sound takes 6.9 TB as wav. A manifest is a list in memory, about 1 GB for a million recordings
and each rank: so much speech is better kept as several corpora, whose maps one stage can read together.

References: HuBERT units, Lakhotia et al. 2021 (https://arxiv.org/abs/2102.01192); dynamic time warping, Sakoe
& Chiba 1978; aligning renditions of other speakers, Lee et al. 2022 (https://arxiv.org/abs/2112.08352, §3.2).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import run
from data import audio
from data.corpus import read_manifest
from files import fingerprint, show, stream_atomic, stream_jsonl, write_jsonl
from hubert import UnitExtractor, units_by_batches
from kmeans import dedup

PORTION = 500  # recordings whose units are kept together
BATCH = 320.0  # seconds of sound that a GPU takes at a time
MOST_FRAMES = audio.MAX_SECONDS * audio.RATE // audio.HOP  # of a recording


def read_units(manifest: str | Path, units: str | Path, n_units: int) -> list[dict]:
    """The rows of a manifest (run.manifest), each with its `units` and `durations` (run.units).

    ValueError, one line, for a row without units, and for units outside 0..n_units - 1."""
    return join_units(read_manifest(manifest), units, n_units)


def join_units(rows: list[dict], path: str | Path, n_units: int) -> list[dict]:
    """`rows` of a manifest, each with its `units` and `durations` from the file `path`."""
    by_id = {row["id"]: row for row in rows}
    lost = set(by_id)
    for found in read_table(path, n_units):
        if found["id"] in by_id:
            by_id[found["id"]].update(found)
            lost.discard(found["id"])
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} of {len(rows)} recordings (one is {show(min(lost))}): of another "
            f"manifest; delete {Path(path).parent / 'state/units'} and run again"
        )
    return rows


def read_table(path: str | Path, n_units: int) -> Iterator[dict]:
    """The rows of a table of units: `id`, `units`, `durations`."""
    for number, row in enumerate(stream_jsonl(path, ("id", "units", "durations")), 1):
        if problem := _problem(row, n_units):
            raise ValueError(f"{path}, row {number}: {problem}")
        yield {key: row[key] for key in ("id", "units", "durations")}


def _problem(row: dict, n_units: int) -> str:
    """What is wrong with a row of units; "" if nothing is."""
    if not isinstance(row["id"], str):
        return f'"id" is {show(row["id"])}; it must be a string'
    units, durations = row["units"], row["durations"]
    for name, numbers in (("units", units), ("durations", durations)):
        if not isinstance(numbers, list) or not numbers or not all(type(n) is int for n in numbers):
            return f'"{name}" must be a list of whole numbers'
    if len(units) != len(durations):
        return f"{len(units)} units have {len(durations)} durations"
    if min(durations) < 1 or sum(durations) > MOST_FRAMES:
        return f"the durations make {show(sum(durations))} frames, from {show(min(durations))} a unit"
    if not 0 <= min(units) <= max(units) < n_units:
        outside = max(units) if max(units) >= n_units else min(units)
        return f"unit {show(outside)} is not one of 0 to {n_units - 1}: it is of another HuBERT's clusters"
    return ""


def clusters_of(folder: str | Path) -> str:
    """The fingerprint of a HuBERT with its k-means, as stage units saves them: what the units are of. "" if
    there is none."""
    folder = Path(folder)
    if not (folder / "kmeans.safetensors").is_file():
        return ""
    return fingerprint(*(folder / name for name in ("kmeans.safetensors", "model.safetensors", "units.json")))


def map_speech(
    corpus: str | Path,
    rows: list[dict],
    function: Callable,
    device: torch.device,
    title: str,
    workers: int = 2,
) -> list:
    """[function(wav (N,)) for each row's recording], with a progress bar, without gradients."""

    def one(row: dict):
        wav = audio.load(Path(corpus) / row["wav"])
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
    rows: Iterable[dict],
    out: Path,
    extractor: Callable,
    device: torch.device,
    work: Path,
    portion: int = PORTION,
    seconds: float | None = None,
) -> None:
    """Writes the file `out`, units.jsonl, for the `rows` of a manifest whose recordings are in the folder
    `corpus`. All ranks take part: portion i of the rows is that of rank i modulo their number.

    Until everything is written, finished portions are kept in folder `work`, a file each: a killed run makes
    those that are missing, on any number of ranks. seconds: of sound in a batch, if `extractor` is a
    UnitExtractor (None: one by one on a CPU, BATCH on a GPU)."""
    if seconds is None and device.type == "cuda":
        seconds = BATCH
    files, missing = [], []
    for number, chosen in enumerate(portions(rows, portion)):
        path = work / f"units-{number:06}.jsonl"
        files.append(path)
        if number % run.world_size() == run.rank() and not is_made(path, chosen):
            missing.append((path, chosen))
    run.barrier()  # before anyone writes, all have looked at what is there
    if seconds and isinstance(extractor, UnitExtractor):
        found = batched(corpus, [chosen for _, chosen in missing], extractor, seconds)
    else:
        found = one_by_one(corpus, [chosen for _, chosen in missing], extractor, device)
    with full_precision():
        for (path, chosen), units in zip(missing, found):
            lines = [{"id": row["id"], "units": u, "durations": d} for row, (u, d) in zip(chosen, units)]
            write_jsonl(path, lines)
    run.barrier()
    if run.rank() == 0:
        stream_atomic(out, partial(join_files, files))
        for path in [
            *work.glob("units-*.jsonl"),
            work / "units.jsonl.part",
        ]:  # the latter until November 2026
            path.unlink(missing_ok=True)
    run.barrier()


@contextmanager
def full_precision() -> Iterator[None]:
    """Context manager: convolutions on a GPU in float32, not in TF32, whose rounding depends on the batch."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def portions(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    rows = iter(rows)
    while chosen := list(islice(rows, size)):
        yield chosen


def is_made(path: Path, rows: list[dict]) -> bool:
    """Whether a file has the units of just these rows."""
    try:
        return [row["id"] for row in stream_jsonl(path, ("id",))] == [row["id"] for row in rows]
    except (OSError, ValueError):
        return False


def join_files(files: list[Path], out: BinaryIO) -> None:
    for path in files:
        with open(path, "rb") as file:
            shutil.copyfileobj(file, out)


Units = tuple[list[int], list[int]]  # and the duration of each


def one_by_one(
    corpus: str | Path, chosen: list[list[dict]], extractor: Callable, device: torch.device
) -> Iterator[list[Units]]:
    for number, rows in enumerate(chosen, 1):
        yield map_speech(corpus, rows, extractor, device, f"units, portion {number} of {len(chosen)}")


def batched(
    corpus: str | Path, chosen: list[list[dict]], extractor: UnitExtractor, seconds: float, workers: int = 8
) -> Iterator[list[Units]]:
    """The units of each portion, in batches of similar lengths, while the next portion's files are read."""
    size = sum(map(len, chosen))
    with ThreadPoolExecutor(workers) as pool, run.progress(size, 0, "units", unit="utt") as bar:
        coming: list = []  # one portion is read ahead
        for rows in [*chosen, []]:
            wavs = [future.result() for future in coming]
            coming = [pool.submit(audio.load, Path(corpus) / row["wav"]) for row in rows]
            if wavs:
                yield [dedup(units.cpu()) for units in units_by_batches(extractor, wavs, seconds)]
                bar.update(len(wavs))


# ---- Which units belong together ---------------------------------------------------------------------------


def dtw_align(source: np.ndarray, target: np.ndarray, ends: int = 10) -> tuple[np.ndarray, float]:
    """DTW alignment of source (T, C) to target (U, C): (target frame of each source frame (T,), distance).

    Each step advances 0 to 3 frames of `target`; start and end are free within `ends` frames. The distance is
    the mean squared distance of aligned frames; infinite if no path is that steep, because one is too short
    for the other."""
    source = source.astype(np.float32)
    target = target.astype(np.float32)
    distance = (source**2).sum(1)[:, None] + (target**2).sum(1) - 2 * source @ target.T  # (T, U)
    T, U = distance.shape
    total = np.full((T, U + 3), np.inf, np.float32)  # of the best path to (t, u); three columns before u = 0
    steps = np.zeros((T, U), np.int8)  # frames of `target` that the last step of that path advanced
    total[0, 3 : 3 + ends] = distance[0, :ends]
    for t in range(1, T):
        before = np.stack([total[t - 1, 3 - step : U + 3 - step] for step in range(4)])  # (4, U)
        steps[t] = before.argmin(0)
        total[t, 3:] = distance[t] + before.min(0)

    start = max(0, U - ends)
    u = start + int(total[-1, 3 + start :].argmin())
    mean_distance = max(0.0, float(total[-1, 3 + u])) / T
    path = np.empty(T, int)
    for t in range(T - 1, -1, -1):  # from the end back to the start
        path[t] = u
        u -= int(steps[t, u])
    return path, mean_distance
