"""Units with the speech they were extracted from: batches of crops or of whole recordings, for the vocoder.

    codes of a recording     7 7 3 9 9 9 4 4          one unit every frame of 20 ms
    crop of 4 frames               3 9 9 9            with 4 * 320 samples of its waveform
    with a margin of 2         7 7 3 9 9 9 4 4        and still 4 * 320 samples

Reads the manifest.jsonl of a corpus (id, wav, speaker, split) and what the stage "units" wrote, units.jsonl:

    {"id": "0001", "units": [7, 3, 9, 4], "durations": [2, 1, 3, 2]}
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import audio
from data.audio import HOP
from data.corpus import read_manifest
from files import read_jsonl
from vocoder import FrameSpectrum


class Batch(NamedTuple):
    """B crops or whole recordings; and, for the duration predictor, the units of the whole recordings."""

    codes: Tensor  # (B, T) the unit of each frame
    target: Tensor  # of crops waveforms (B, N), of whole recordings log-mels (B, 80, 2 T)
    lengths: Tensor  # (B,) frames; what follows in a row is padding
    speakers: Tensor  # (B,)
    units: Tensor  # (B, U) reduced units, padded with 0
    durations: Tensor  # (B, U) frames of each unit; 0: padding

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


class CodeDataset:
    """The recordings of one split that have units, with their units."""

    def __init__(self, corpus: Path, split: str):
        self.corpus = corpus
        units = {row["id"]: row for row in read_jsonl(corpus / "units.jsonl", ("id", "units", "durations"))}
        rows = read_manifest(corpus)
        self.rows = [row | units[row["id"]] for row in rows if row["split"] == split and row["id"] in units]
        if not self.rows and split == "train":
            raise ValueError(f"{corpus}: no training recording has units; run the stage 'units' first")
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

    def recordings(self, chosen: np.ndarray) -> Batch:
        """Whole recordings. Codes are padded with the last one; padding is excluded from the loss."""
        lengths = torch.from_numpy(self.n_frames[chosen])
        codes = torch.zeros(len(chosen), lengths.max(), dtype=torch.long)
        mels = torch.zeros(len(chosen), FrameSpectrum.N_MELS, 2 * lengths.max())
        for b, i in enumerate(chosen):
            n = self.n_frames[i]
            codes[b] = self.rows[i]["units"][-1]
            codes[b, :n] = torch.from_numpy(self.codes(i))
            mels[b, :, : 2 * n] = self.mel(int(i))
        return Batch(codes, mels, lengths, *self.speakers_and_units(chosen))

    def crops(self, rng: np.random.Generator, size: int, n_frames: int, margin: int = 0) -> Batch:
        """Random crops; codes with `margin` frames of context on either side: (size, margin + T + margin).

        Beyond the ends of a recording its first and last codes go on, and its waveform is silent."""
        chosen = rng.choice(len(self.rows), size, p=self.probabilities)
        codes = []
        wavs = []
        for i in chosen:
            start = rng.integers(max(1, self.n_frames[i] - n_frames + 1))
            places = np.arange(start - margin, start + n_frames + margin)
            codes.append(self.codes(i)[places.clip(0, self.n_frames[i] - 1)])
            wavs.append(self.samples(i, start, n_frames))
        lengths = torch.full((size,), n_frames)
        return Batch(
            torch.tensor(np.stack(codes)),
            torch.tensor(np.stack(wavs)),
            lengths,
            *self.speakers_and_units(chosen),
        )

    def speakers_and_units(self, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The last three tensors of a Batch."""
        rows = [self.rows[i] for i in chosen]
        width = max(len(row["units"]) for row in rows)
        units = torch.zeros(len(rows), width, dtype=torch.long)
        durations = torch.zeros(len(rows), width, dtype=torch.long)
        for b, row in enumerate(rows):
            units[b, : len(row["units"])] = torch.tensor(row["units"])
            durations[b, : len(row["units"])] = torch.tensor(row["durations"])
        return torch.tensor([row["speaker"] for row in rows]), units, durations
