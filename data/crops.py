"""Crops: pieces of recordings of equal length, with one label for each frame, as functions of the step.

`crops` places them at random in recordings drawn in shuffled epochs: HuBERT's rounds learn from them.
`weighted_crops` draws recordings by their weights, and changes pace and pitch apart: the speech normalizer.
`imitated` makes some of either sound as if from other people in other rooms (data/augment.py).

Reference: speed perturbation, Ko et al. 2015.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import audio, augment
from data.audio import HOP, WINDOW
from data.batches import order, split_batch


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


def imitated(
    batch_at: Callable[[int], list[Crops]], how: augment.Imitation, seed: int, others: list[Path]
) -> Callable[[int], list[Crops]]:
    """batch_at with how.share of its crops disguised (`augment.disguise`), whichever rank has them;
    `others` are recordings of the people who babble behind. Labels stay as they are."""

    def babble(draw: augment.Draw) -> np.ndarray:
        return audio.load(others[draw.integers(len(others))])

    def batch(step: int) -> list[Crops]:
        return [disguised(crops) for crops in batch_at(step)]

    def disguised(crops: Crops) -> Crops:
        wavs = crops.wav.clone()
        for i, number in enumerate(crops.draws.tolist()):
            draw = augment.draw_of(seed, "imitated", number)
            if draw.random() < how.share:
                wavs[i] = torch.from_numpy(augment.disguise(wavs[i].numpy(), draw, how, babble))
        return crops._replace(wav=wavs)

    return batch if how.share else batch_at


def _frame_at(rate: float, frame: np.ndarray) -> np.ndarray:
    """Which frame of a recording has the same middle as `frame` of it played at `rate` times its pace."""
    middle = rate * (HOP * frame + WINDOW // 2)  # as a sample of the recording
    return ((middle - WINDOW // 2) / HOP).round().astype(int)


def _stack(pieces: list[tuple[np.ndarray, np.ndarray]], draws: range) -> Crops:
    wavs = np.stack([wav for wav, _ in pieces])
    labels = np.stack([label for _, label in pieces]).astype(np.int64)
    return Crops(torch.from_numpy(wavs), torch.from_numpy(labels), torch.tensor(draws))
