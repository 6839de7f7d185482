"""Batches as pure functions of the step: an interrupted run goes on with the very data it would have had.

`order` walks endless shuffled epochs without keeping any state. `split_batch` divides the items of a step
among micro-batches and ranks. `pack` puts documents one after another into rows, each token labeled with its
document and its position in it, so that attention never crosses from one document to the next:

    documents   <s> w h o <sosp> ...   <s> a b c ...
    ids         s  w  h  o  S  .  .  s  a  b  c  .
    positions   0  1  2  3  4  5  6  0  1  2  3  4
    docs        0  0  0  0  0  0  0  1  1  1  1  1        (-1 in the padding at a row's end)
    mask        0  0  0  1  1  1  1  0  0  1  1  1        tokens that are targets of the loss (eq. 4)

`crops` and `weighted_crops` cut pieces of equal length out of recordings, with one label for each frame.

References: packing, Krell et al. 2021 (https://arxiv.org/abs/2107.02027); speed perturbation, Ko et al. 2015.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import audio
from data.audio import HOP, WINDOW

# ---- Which items, in which order ---------------------------------------------------------------------------


_epochs: dict[tuple[int, int, int], np.ndarray] = {}


def order(index: int, n: int, seed: int) -> tuple[int, int]:
    """The `index`-th draw of an endless stream of shuffled epochs over n items, as (item, epoch)."""
    epoch, place = divmod(index, n)
    key = (epoch, n, seed)
    if key not in _epochs:
        if len(_epochs) > 8:
            _epochs.clear()
        _epochs[key] = np.random.default_rng([seed, epoch]).permutation(n)
    return int(_epochs[key][place]), epoch


def split_batch(
    make: Callable[[range], tuple], batch_size: int, accumulate: int, rank: int = 0, world_size: int = 1
) -> Callable[[int], list]:
    """step -> [make(indices) for each of this rank's `accumulate` micro-batches].

    A step has the draws step * batch_size, step * batch_size + 1, ... of `order`, over all ranks, as the
    paper's Table 3 counts. They are cut into world_size * accumulate pieces of consecutive draws, whose sizes
    differ by at most one; micro-batch m of rank r is piece m * world_size + r. For batch_size 10, two ranks,
    accumulate 2:

        piece           0      1      2    3
        draws           0 1 2  3 4 5  6 7  8 9
        rank            0      1      0    1
        micro-batch     0      0      1    1
    """
    pieces = world_size * accumulate
    if batch_size < pieces:
        raise ValueError(
            f"batch_size is {batch_size}: that is less than one item for each of {world_size} process(es) x "
            f"accumulate {accumulate}; make it at least {pieces}, or accumulate smaller"
        )
    least, larger = divmod(batch_size, pieces)  # the first `larger` pieces have one item more than `least`

    def batch(step: int) -> list:
        micro_batches = []
        for micro in range(accumulate):
            piece = micro * world_size + rank
            first = step * batch_size + piece * least + min(piece, larger)
            size = least + (piece < larger)
            micro_batches.append(make(range(first, first + size)))
        return micro_batches

    return batch


# ---- Documents, packed -------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """R rows of L tokens, documents one after another in each."""

    ids: Tensor  # (R, L) long
    mask: Tensor  # (R, L) bool
    positions: Tensor  # (R, L) long
    docs: Tensor  # (R, L) long


Document = tuple[list[int], list[bool]]  # (ids, which of them are targets)


def pack(documents: list[Document], max_len: int) -> Packed:
    """Documents of at most max_len tokens -> rows: the longest first, each into the first row with room."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for ids, mask in sorted(documents, key=lambda document: -len(document[0])):
        assert len(ids) <= max_len, f"a document of {len(ids)} tokens, max_len is {max_len}"
        place = next((i for i, left in enumerate(room) if left >= len(ids)), None)
        if place is None:
            rows.append([])
            room.append(max_len)
            place = -1
        rows[place].append((ids, mask))
        room[place] -= len(ids)

    width = max_len - min(room)
    packed = Packed(
        ids=torch.zeros(len(rows), width, dtype=torch.long),
        mask=torch.zeros(len(rows), width, dtype=torch.bool),
        positions=torch.zeros(len(rows), width, dtype=torch.long),
        docs=torch.full((len(rows), width), -1),
    )
    for r, row in enumerate(rows):
        start = 0
        for number, (ids, mask) in enumerate(row):
            here = slice(start, start + len(ids))
            packed.ids[r, here] = torch.tensor(ids)
            packed.mask[r, here] = torch.tensor(mask)
            packed.positions[r, here] = torch.arange(len(ids))
            packed.docs[r, here] = number
            start += len(ids)
        first_tokens = packed.positions[r] == 0
        packed.mask[r, first_tokens] = False  # the first token of a document has nothing before it
    return packed


def documents(
    render: Callable,
    examples: list,
    seed: int,
    batch_size: int,
    max_len: int,
    accumulate: int,
    rank: int = 0,
    world_size: int = 1,
) -> Callable[[int], list[Packed]]:
    """step -> list of `accumulate` Packed micro-batches. render(example, random.Random) -> Document.

    `batch_size` counts documents per optimizer step over all ranks, as in the paper's Table 3."""

    def make(indices: range) -> Packed:
        chosen = []
        for index in indices:
            item, epoch = order(index, len(examples), seed)
            draw = random.Random(f"{seed} {epoch} {item}")
            chosen.append(render(examples[item], draw))
        return pack(chosen, max_len)

    return split_batch(make, batch_size, accumulate, rank, world_size)


# ---- Crops of recordings, with labels ----------------------------------------------------------------------


class Crops(NamedTuple):
    """Pieces of recordings of equal length, with a label for each frame of 20 ms."""

    wav: Tensor  # (B, N) float, 16 kHz
    labels: Tensor  # (B, T) long
    draws: Tensor  # (B,) long, number of each crop in the stream of draws: seeds what is drawn for it later


def crops(
    paths: list[Path],
    labels: list[np.ndarray],
    n_frames: int,
    seed: int,
    batch_size: int,
    accumulate: int,
    rank: int = 0,
    world_size: int = 1,
    perturb: float = 0.0,
) -> Callable[[int], list[Crops]]:
    """step -> list of `accumulate` Crops of `n_frames` frames, randomly placed; short recordings repeat.

    `perturb` p: speed perturbation; each crop is resampled by a factor in [e^-p, e^p], and its labels with
    it, so that pitch, formants and pace change as they do from speaker to speaker, while the words stay."""
    size = HOP * (n_frames - 1) + WINDOW  # samples of `n_frames` frames

    def crop(index: int) -> tuple[np.ndarray, np.ndarray]:
        item, epoch = order(index, len(paths), seed)
        draw = random.Random(f"{seed} {epoch} {item}")
        rate = math.exp(draw.uniform(-perturb, perturb))
        n_labels = math.ceil(rate * n_frames)  # of the recording, before it is resampled to `n_frames` ...
        n_samples = math.ceil(rate * size)  # ... and to `size`
        spare = len(labels[item]) - n_labels
        first = draw.randint(0, max(0, spare))
        wav = audio.load_part(paths[item], HOP * first, n_samples)
        label = labels[item][first : first + n_labels]
        if spare < 0:  # whole frames, then the recording again
            wav = np.resize(wav[: HOP * len(label)], n_samples)
            label = np.resize(label, n_labels)
        if perturb:
            wav = np.interp(rate * np.arange(size), np.arange(len(wav)), wav).astype(np.float32)
            label = label[_frame_at(rate, np.arange(n_frames)).clip(0, n_labels - 1)]
        return wav, label

    def make(indices: range) -> Crops:
        return _stack([crop(index) for index in indices], indices)

    return split_batch(make, batch_size, accumulate, rank, world_size)


class Recording(NamedTuple):
    """What `weighted_crops` draws from."""

    path: Path
    labels: np.ndarray  # (T,)
    perturb: tuple[float, float]  # bounds of the logarithms of its pace and its pitch
    weight: float  # it is drawn in proportion to this


UNCHANGED = 0.15  # fraction of weighted crops at their own pace and pitch


def weighted_crops(
    recordings: list[Recording],
    n_frames: int,
    seed: int,
    batch_size: int,
    accumulate: int,
    rank: int = 0,
    world_size: int = 1,
) -> Callable[[int], list[Crops]]:
    """As `crops`, but recordings are sampled with probability proportional to their weights, and pace and
    pitch change independently (`audio.change_pace_and_pitch`), log-uniformly within the recording's bounds.

    Short recordings are zero-padded; padded frames have label -1."""
    size = HOP * (n_frames - 1) + WINDOW
    cumulative = np.cumsum([recording.weight for recording in recordings]).tolist()

    def crop(index: int) -> tuple[np.ndarray, np.ndarray]:
        draw = random.Random(f"{seed} {index}")
        (recording,) = draw.choices(recordings, cum_weights=cumulative)
        labels = recording.labels
        wav = audio.load(recording.path)
        pace = 1.0
        if draw.random() >= UNCHANGED:
            pace, pitch = (math.exp(draw.uniform(-most, most)) for most in recording.perturb)
            wav = audio.change_pace_and_pitch(wav, pace, pitch)
        there = max(1, audio.n_frames(len(wav)))
        first = draw.randint(0, max(0, there - n_frames))
        here = np.arange(first, first + n_frames)
        source = _frame_at(pace, here)
        known = (source < len(labels)) & (here < there)
        label = np.where(known, labels[source.clip(0, len(labels) - 1)], -1)
        wav = wav[HOP * first :][:size]
        return np.pad(wav, (0, size - len(wav))), label

    def make(indices: range) -> Crops:
        return _stack([crop(index) for index in indices], indices)

    return split_batch(make, batch_size, accumulate, rank, world_size)


def _frame_at(rate: float, frame: np.ndarray) -> np.ndarray:
    """Which frame of a recording has the same middle as `frame` of it played at `rate` times its pace."""
    middle = rate * (HOP * frame + WINDOW // 2)  # as a sample of the recording
    return ((middle - WINDOW // 2) / HOP).round().astype(int)


def _stack(pieces: list[tuple[np.ndarray, np.ndarray]], draws: range) -> Crops:
    wavs = np.stack([wav for wav, _ in pieces])
    labels = np.stack([label for _, label in pieces]).astype(np.int64)
    return Crops(torch.from_numpy(wavs), torch.from_numpy(labels), torch.tensor(draws))
