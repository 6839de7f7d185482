"""Units with the speech they were extracted from: batches of crops or of whole recordings, for the vocoder.

    codes of a recording     7 7 3 9 9 9 4 4          one unit every frame of 20 ms
    crop of 4 frames               3 9 9 9            with 4 * 320 samples of its waveform
    with a margin of 2         7 7 3 9 9 9 4 4        and still 4 * 320 samples

The recordings are rows of the manifest with their units, as `data.units.read_units` gives them:

    {"id": "0001", "wav": "0001.wav", "speaker": 0, ..., "units": [7, 3, 9, 4], "durations": [2, 1, 3, 2]}
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import audio
from data.audio import HOP
from vocoder import FrameSpectrum


class Batch(NamedTuple):
    """B crops or whole recordings: the rows of a step that this process computes. With them, for the duration
    predictor, the units of the whole recordings. All are padded as in the batch of the whole step."""

    codes: Tensor  # (B, T) the unit of each frame
    target: Tensor  # of crops waveforms (B, N), of whole recordings log-mels (B, 80, 2 T)
    lengths: Tensor  # (B,) frames; what follows in a row is padding
    speakers: Tensor  # (B,)
    units: Tensor  # (B, U) reduced units, padded with 0
    durations: Tensor  # (B, U) frames of each unit; 0: padding
    # of the whole step, over all processes, so that losses are the same on one and on many
    share: float  # fraction of the rows that are in this batch
    total_frames: int  # sum of all lengths
    total_units: int  # number of units without padding
    n_units: int  # reduced units in the longest row of codes

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def rows_of_rank(size: int, rank: int, world_size: int) -> slice:
    """The rows of a batch that one process computes; numbers of rows differ by at most one."""
    return slice(rank * size // world_size, (rank + 1) * size // world_size)


def datasets(corpus: Path, rows: list[dict]) -> dict[str, "CodeDataset"]:
    """What the vocoder learns from and what it is measured on."""
    return {split: CodeDataset(corpus, rows, split) for split in ("train", "heldout")}


class CodeDataset:
    """The recordings of one split, in the folder `corpus`, with their units."""

    def __init__(self, corpus: Path, rows: list[dict], split: str):
        self.corpus = corpus
        self.rows = [row for row in rows if row["split"] == split]
        if not self.rows and split == "train":
            raise ValueError(f'{corpus}: there is no training recording ("split": "train")')
        self.n_frames = np.array([sum(row["durations"]) for row in self.rows], dtype=np.int64)
        self.by_length = self.n_frames.argsort(kind="stable")
        self.probabilities = self.n_frames / self.n_frames.sum()  # of being drawn for a crop

    @lru_cache(maxsize=20_000)  # noqa: B019  (16-bit: 1.3 GB for 20,000 recordings of two seconds)
    def wave(self, i: int) -> np.ndarray:
        """Recording i, (N,) int16, at the same peak level as all others: units do not encode loudness."""
        wav = audio.load(self.corpus / self.rows[i]["wav"])
        return np.int16(wav / max(np.abs(wav).max(), 1e-3) * 0.95 * 32767)

    @lru_cache(maxsize=20_000)  # noqa: B019  (16-bit: 0.7 GB for as many; without it, a step takes a fifth longer)
    def mel(self, i: int) -> Tensor:
        """Target of `FrameSpectrum` for recording i, (80, 2 T), in half precision."""
        wav = self.samples(i, 0, self.n_frames[i])
        return FrameSpectrum.target(torch.from_numpy(wav)[None])[0].half()

    def samples(self, i: int, start: int, n_frames: int) -> np.ndarray:
        """The waveform (n_frames * 320,) float32 of recording i from frame `start`; zeros after its end."""
        stop = min(start + n_frames, self.n_frames[i])
        wav = self.wave(i)[start * HOP : stop * HOP] / np.float32(32767)
        return np.pad(wav, (0, n_frames * HOP - len(wav)))

    def codes(self, i: int) -> np.ndarray:
        """The unit of each frame of recording i, (T,)."""
        return np.repeat(self.rows[i]["units"], self.rows[i]["durations"])

    def similar_lengths(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Samples `size` recordings of similar length, so that little of a batch is padding."""
        near = min(len(self.rows), 16 * size)
        first = rng.integers(len(self.rows) - near + 1)
        return self.by_length[first + rng.choice(near, min(size, near), replace=False)]

    def recordings(self, chosen: np.ndarray, part: slice = slice(None)) -> Batch:
        """Whole recordings, those of `chosen[part]`. Codes are padded with the last one; padding is excluded
        from the loss."""
        lengths = self.n_frames[chosen]
        longest = lengths.max()
        codes = []
        for i in chosen:
            codes.append(np.pad(self.codes(i), (0, longest - self.n_frames[i]), "edge"))
        here = chosen[part]
        mels = torch.zeros(len(here), FrameSpectrum.N_MELS, 2 * longest)
        for b, i in enumerate(here):
            mels[b, :, : 2 * self.n_frames[i]] = self.mel(int(i))
        return self.batch(chosen, part, np.stack(codes), mels, lengths)

    def crops(
        self,
        rng: np.random.Generator,
        size: int,
        n_frames: int,
        margin: int = 0,
        part: slice = slice(None),
    ) -> Batch:
        """The crops `part` of `size` random ones of T = n_frames; codes with `margin` frames of context on
        either side: (B, margin + T + margin).

        Beyond the ends of a recording its first and last codes go on, and its waveform is silent."""
        chosen = rng.choice(len(self.rows), size, p=self.probabilities)
        codes = []
        starts = []
        for i in chosen:
            start = rng.integers(max(1, self.n_frames[i] - n_frames + 1))
            places = np.arange(start - margin, start + n_frames + margin)
            codes.append(self.codes(i)[places.clip(0, self.n_frames[i] - 1)])
            starts.append(start)
        wavs = [self.samples(i, start, n_frames) for i, start in zip(chosen[part], starts[part])]
        lengths = np.full(size, n_frames)
        return self.batch(chosen, part, np.stack(codes), torch.from_numpy(np.stack(wavs)), lengths)

    def batch(
        self, chosen: np.ndarray, part: slice, codes: np.ndarray, target: Tensor, lengths: np.ndarray
    ) -> Batch:
        """`target` holds the rows `part`; `chosen`, `codes` and `lengths` those of the whole step."""
        rows = [self.rows[i] for i in chosen]
        width = max(len(row["units"]) for row in rows)
        units = torch.zeros(len(rows), width, dtype=torch.long)
        durations = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            units[b, : len(row["units"])] = torch.tensor(row["units"])
            durations[b, : len(row["units"])] = torch.tensor(row["durations"])
        changes = codes[:, 1:] != codes[:, :-1]
        return Batch(
            torch.from_numpy(codes)[part],
            target,
            torch.from_numpy(lengths)[part],
            torch.tensor([row["speaker"] for row in rows])[part],
            units[part],
            durations[part],
            share=len(target) / len(rows),
            total_frames=int(lengths.sum()),
            total_units=int((durations > 0).sum()),
            n_units=1 + int(changes.sum(1).max()),
        )
