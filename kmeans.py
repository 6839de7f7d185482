"""K-means: frames of features -> clusters, an alphabet of sounds (SpeechGPT paper §3.1, HuBERT paper §II.A).

    wav (N,) --mfcc--> (T, 39) --KMeans--> (T,), the targets of HuBERT's first round
    wav (N,) --a layer of HuBERT--> (T, C) --KMeans--> 63 63 63 991 162 162, the next targets, or units:
                                           --dedup---> units 63 991 162, durations 3 1 2

All frames are HuBERT's: 400 samples (25 ms) wide, one every 320 (20 ms).

References: Hsu et al. 2021, "HuBERT", arXiv:2106.07447 (clusters as targets: §II.A)
            Davis & Mermelstein 1980, "Comparison of parametric representations ..." (MFCC)
            Sculley 2010, "Web-scale k-means clustering" (mini-batches)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from data.audio import HOP, RATE, WINDOW
from pickles import Inert


def mfcc(wav: Tensor, cmvn: bool = True) -> Tensor:
    """wav (B, N) at 16 kHz -> (B, T, 39): 13 mel-frequency cepstral coefficients, their slopes and the slopes
    of those, on HuBERT's frames. `cmvn`: each of the 39 to mean 0 and variance 1 over the utterance."""
    assert wav.ndim == 2 and wav.shape[1] >= WINDOW, f"wav is {tuple(wav.shape)}, not (B, N >= {WINDOW})"
    wav = wav - 0.97 * F.pad(wav, (1, 0))[:, :-1]  # speech falls by 6 dB an octave: even that out
    frames = wav.unfold(1, WINDOW, HOP) * torch.hamming_window(WINDOW, device=wav.device)  # (B, T, 400)
    power = torch.fft.rfft(frames, 512).abs().square()  # (B, T, 257)
    # 26 half-overlapping triangles, evenly spaced on the mel scale from 20 Hz to 8 kHz
    hz = torch.arange(257, device=wav.device) * (RATE / 512)
    mel = 1127 * torch.log1p(hz / 700)[:, None]  # (257, 1)
    low, high = (1127 * math.log(1 + f / 700) for f in (20, 8000))
    edges = torch.linspace(low, high, 28, device=wav.device)
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((mel - left) / (peak - left), (right - mel) / (right - peak)).clamp(min=0)
    log_mel = torch.log(power @ triangles + 1e-5)  # (B, T, 26)
    # the 13 slowest waves of the cosine transform over the bands: the shape of the vocal tract, not the pitch
    n = torch.arange(26, device=wav.device)[:, None]
    k = torch.arange(13, device=wav.device)
    x = log_mel @ torch.cos(math.pi / 26 * (n + 0.5) * k) * math.sqrt(2 / 26)  # (B, T, 13)
    x = torch.cat([x, slope(x), slope(slope(x))], dim=2)  # (B, T, 39)
    if cmvn:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x


def slope(x: Tensor) -> Tensor:
    """(B, T, C) -> (B, T, C): slope of the least-squares line through 5 frames; the ends are repeated."""
    p = torch.cat([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], dim=1)
    return (p[:, 3:-1] - p[:, 1:-3] + 2 * (p[:, 4:] - p[:, :-4])) / 10


class KMeans(nn.Module):
    """K cluster centers (K, C). The unit of a vector is the number of its nearest center."""

    def __init__(self, centers: Tensor):
        super().__init__()
        self.register_buffer("centers", centers.float())

    @classmethod
    def fit(cls, x: Tensor, k: int, seed: int = 0) -> KMeans:
        """k clusters of x (n, C), by scikit-learn's mini-batch k-means as for the released units."""
        from sklearn.cluster import MiniBatchKMeans

        if len(x) < k:
            raise ValueError(f"{len(x)} frames of speech cannot make {k} clusters; use more, or fewer units")
        # init_size: scikit-learn's own 30,000 frames for initial centers take longer than all the rest
        fitted = MiniBatchKMeans(
            k, batch_size=10_000, n_init=3, init_size=3 * k, max_no_improvement=50, random_state=seed
        )
        fitted.fit(x.float().cpu().numpy())
        return cls(torch.from_numpy(fitted.cluster_centers_))

    def predict(self, x: Tensor) -> Tensor:
        """(..., C) -> (...) long. The lowest number wins a tie."""
        if not x.isfinite().all():
            raise ValueError("the features of this speech are NaN: the weights of HuBERT are damaged")
        return self.distances(x).argmin(-1)

    def distances(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K): |x - c|^2 of each center c, less |x|^2, which is the same for all of them."""
        return self.centers.square().sum(1) - 2 * x @ self.centers.T

    def embeddings(self, dim: int) -> Tensor:
        """Initial embeddings (K, dim), ours: the centers' first `dim` principal components (zeros if there
        are fewer), at mean 0 and variance 1. Similar units share what is learned."""
        x = self.centers - self.centers.mean(0)
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        x = F.pad((u * s)[:, :dim], (0, max(0, dim - len(s))))
        return x / x.std().clamp(min=1e-8)  # k = 1 has no spread

    def save(self, folder: str | Path):
        checkpoint.save_tensors(Path(folder) / "kmeans.safetensors", {"centers": self.centers})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> KMeans:
        """Our kmeans.safetensors, a joblib file of scikit-learn's (km1000 .bin), or a folder with one."""
        path = Path(path)
        if path.is_dir():
            ours = path / "kmeans.safetensors"
            path = ours if ours.exists() else the_one(path, "*km*.bin", "a k-means")
        found = checkpoint.read_checkpoint(path)
        if isinstance(found, Inert) and found.name.split(" ")[-1] not in ("KMeans", "MiniBatchKMeans"):
            raise ValueError(f"{path}: a {found.name} of scikit-learn, not a KMeans or MiniBatchKMeans")
        table = found if isinstance(found, dict) else {}
        centers = table.get("centers", table.get("cluster_centers_"))
        if not isinstance(centers, Tensor) or centers.ndim != 2 or not centers.numel():
            raise ValueError(f"{path}: holds no cluster centers, so it is not a k-means")
        checkpoint.check_weight(f"{path}: its centers", centers, torch.empty(centers.shape, device="meta"))
        return cls(centers.clone())


def dedup(frame_units: Tensor | list[int]) -> tuple[list[int], list[int]]:
    """[5, 5, 7] -> units [5, 7] and their durations [2, 1] in frames of 20 ms."""
    frame_units = torch.as_tensor(frame_units, dtype=torch.long)
    units, durations = torch.unique_consecutive(frame_units, return_counts=True)
    return units.tolist(), durations.tolist()


def expand(units: list[int], durations: list[int]) -> list[int]:
    """The inverse of dedup."""
    return [unit for unit, n in zip(units, durations, strict=True) for _ in range(n)]


def the_one(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(path.name for path in folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one file {pattern} ({what}), found {found or 'none'}")
    return folder / found[0]


# ---- Ours, for small models --------------------------------------------------------------------------------


def smooth(x: Tensor, width: int) -> Tensor:
    """(B, T, C) -> (B, T, C): each frame the mean of `width` frames (odd) around it, of fewer at the ends."""
    return F.avg_pool1d(x.transpose(1, 2), width, 1, width // 2, count_include_pad=False).transpose(1, 2)
