"""Batches as pure functions of the step: whatever was interrupted continues with the very data it would have had.

`order` walks endless shuffled epochs without keeping any state; `pack` lays documents end to end in rows, each
token labelled with its document and its position in it, so that attention never crosses from one to the next:

    documents   <s> w h o <sosp> ...   <s> a b c ...
    ids         s  w  h  o  S  .  .  s  a  b  c  .
    positions   0  1  2  3  4  5  6  0  1  2  3  4
    docs        0  0  0  0  0  0  0  1  1  1  1  1        (-1 in what is left at a row's end)
    mask        0  0  0  1  1  1  1  0  0  1  1  1        tokens that are targets of the loss (eq. 4)
"""

import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from data import audio


class Packed(NamedTuple):
    ids: Tensor  # (R, L) long
    mask: Tensor  # (R, L) bool
    positions: Tensor  # (R, L) long
    docs: Tensor  # (R, L) long


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


def pack(documents: list[tuple[list[int], list[bool]]], max_len: int, pad: int = 0) -> Packed:
    """(ids, mask) documents -> rows: the longest first, each into the first row with room. Longer ones are cut."""
    rows: list[list[tuple[list[int], list[bool]]]] = []
    room: list[int] = []
    for ids, mask in sorted(documents, key=lambda document: -len(document[0])):
        ids, mask = ids[:max_len], mask[:max_len]
        place = next((i for i, left in enumerate(room) if left >= len(ids)), None)
        if place is None:
            rows.append([])
            room.append(max_len)
            place = -1
        rows[place].append((ids, mask))
        room[place] -= len(ids)
    width = max_len - min(room)
    packed = Packed(
        torch.full((len(rows), width), pad),
        torch.zeros(len(rows), width, dtype=torch.bool),
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.full((len(rows), width), -1),
    )
    for r, row in enumerate(rows):
        end = 0
        for number, (ids, mask) in enumerate(row):
            here = slice(end, end := end + len(ids))
            packed.ids[r, here] = torch.tensor(ids)
            packed.mask[r, here] = torch.tensor(mask)
            packed.positions[r, here] = torch.arange(len(ids))
            packed.docs[r, here] = number
        packed.mask[r, packed.positions[r] == 0] = (
            False  # the first token of a document has nothing before it
        )
    return packed


def documents(
    render,
    examples: list,
    seed: int,
    batch_size: int,
    max_len: int,
    accumulate: int,
    rank: int = 0,
    world: int = 1,
):
    """step -> list of `accumulate` Packed micro-batches. render(example, random.Random) -> (ids, mask).

    `batch_size` counts documents per optimiser step over all ranks, as in the paper's Table 3.
    """
    share = max(1, batch_size // (world * accumulate))

    def batch(step: int) -> list[Packed]:
        micro_batches = []
        for micro in range(accumulate):
            first = ((step * accumulate + micro) * world + rank) * share
            chosen = []
            for index in range(first, first + share):
                item, epoch = order(index, len(examples), seed)
                chosen.append(render(examples[item], random.Random(f"{seed} {epoch} {item}")))
            micro_batches.append(pack(chosen, max_len))
        return micro_batches

    return batch


class Crops(NamedTuple):
    """Equal pieces of recordings with a label for each frame of 20 ms."""

    wav: Tensor  # (B, N) float, 16 kHz
    labels: Tensor  # (B, T) long


def crops(
    paths: list[Path],
    labels: list[np.ndarray],
    frames: int,
    seed: int,
    batch_size: int,
    accumulate: int,
    rank: int = 0,
    world: int = 1,
    perturb: float = 0.0,
):
    """step -> list of `accumulate` Crops of `frames` frames, at random places; shorter recordings are repeated.

    Each is played at a rate of its own between exp(-perturb) and exp(perturb), and its labels with it: pitch, formants
    and pace change, as from speaker to speaker, and what is said does not."""
    size = 320 * (frames - 1) + 400  # samples that give `frames` frames

    def crop(index: int) -> tuple[np.ndarray, np.ndarray]:
        item, epoch = order(index, len(paths), seed)
        draw = random.Random(f"{seed} {epoch} {item}")
        rate = math.exp(draw.uniform(-perturb, perturb))
        heard, samples = (
            math.ceil(rate * frames),
            math.ceil(rate * size),
        )  # of the recording, for `frames` and `size`
        spare = len(labels[item]) - heard
        first = draw.randint(0, max(0, spare))
        wav, _ = soundfile.read(paths[item], frames=samples, start=320 * first, dtype="float32")
        label = labels[item][first : first + heard]
        if spare < 0:  # whole frames, then the recording again
            wav, label = np.resize(wav[: 320 * len(label)], samples), np.resize(label, heard)
        if perturb:
            wav = np.interp(rate * np.arange(size), np.arange(len(wav)), wav).astype(np.float32)
            middle = rate * (320 * np.arange(frames) + 200)  # of each new frame, as a sample of the recording
            label = label[((middle - 200) / 320).round().clip(0, heard - 1).astype(int)]
        return wav, label

    return _cropped(crop, batch_size, accumulate, rank, world)


def played_crops(
    paths: list[Path],
    labels: list[np.ndarray],
    perturb: list[tuple[float, float]],
    weights: np.ndarray,
    frames: int,
    seed: int,
    batch_size: int,
    accumulate: int,
    rank: int = 0,
    world: int = 1,
    plain: float = 0.15,
):
    """The same of recordings drawn by their `weights`. Each is played at a pace and a pitch (`audio.play`) whose
    logarithms are up to its two numbers of `perturb`; a share `plain` is as it is.

    What is too short is followed by silence, with labels of -1."""
    size, upto = 320 * (frames - 1) + 400, np.cumsum(weights).tolist()

    def crop(index: int) -> tuple[np.ndarray, np.ndarray]:
        draw = random.Random(f"{seed} {index}")
        (item,) = draw.choices(range(len(paths)), cum_weights=upto)
        wav, rate, pitch = audio.load(paths[item]), 1.0, 1.0
        if draw.random() >= plain:
            rate, pitch = (math.exp(draw.uniform(-most, most)) for most in perturb[item])
            wav = audio.play(wav, rate, pitch)
        there = max(1, (len(wav) - 400) // 320 + 1)
        first = draw.randint(0, max(0, there - frames))
        middle = rate * (
            320 * np.arange(first, first + frames) + 200
        )  # of each frame, as a sample of the recording
        place = ((middle - 200) / 320).round().astype(int)
        known = (place < len(labels[item])) & (np.arange(first, first + frames) < there)
        label = np.where(known, labels[item][place.clip(0, len(labels[item]) - 1)], -1)
        wav = wav[320 * first :][:size]
        return np.pad(wav, (0, size - len(wav))), label

    return _cropped(crop, batch_size, accumulate, rank, world)


def _cropped(crop, batch_size: int, accumulate: int, rank: int, world: int):
    share = max(1, batch_size // (world * accumulate))

    def batch(step: int) -> list[Crops]:
        micro_batches = []
        for micro in range(accumulate):
            first = ((step * accumulate + micro) * world + rank) * share
            wavs, targets = zip(*(crop(index) for index in range(first, first + share)))
            micro_batches.append(
                Crops(torch.from_numpy(np.stack(wavs)), torch.from_numpy(np.stack(targets).astype(np.int64)))
            )
        return micro_batches

    return batch
