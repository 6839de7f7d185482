"""HuBERT: speech -> discrete units (SpeechGPT paper §3.1 and §4.1, "discrete unit extractor").

A self-supervised encoder reads 16 kHz waveforms and predicts, at frames hidden from it, which cluster the hidden
sound belonged to. The clusters of one of its layers then serve as an alphabet of sounds: the "units" that the
language model reads and writes.

    wav (N,) --7 convolutions--> frames (T, C) 50 a second --Transformer--> layer 11 --k-means--> 63 63 63 991 162 162
                                                                                     --dedup--> 63 991 162, lasting 3 1 2

Frames: the convolutions look at 400 samples (25 ms) and step by 320 (20 ms), so T = (N - 400) // 320 + 1.
    16,000 samples (1 s) -> 49 frames;  719 samples -> 1;  720 -> 2;  399 -> none, an error.
Training: first on clusters of MFCCs, then on clusters of a layer of the previous round (`mfcc`, `KMeans`).

References
    Hsu et al. 2021, "HuBERT", arXiv:2106.07447 (§2: objective; §3: two rounds of clustering; eq. 3: cosine logits)
    Baevski et al. 2020, "wav2vec 2.0", arXiv:2006.11477 (the convolutions, the span masking)
    Lee et al. 2022, "Textless speech-to-speech translation on real data", arXiv:2112.08352 (mHuBERT, layer 11, km1000)
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint

RATE, WINDOW, HOP = 16000, 400, 320  # samples: per second, seen by one frame, between frames


@dataclass
class HuBERTConfig:
    """Defaults are HuBERT base (and mHuBERT): 94.4 M parameters. `extractor_norm` "group" with `pre_norm=False` is the
    base recipe; "layer" with `pre_norm=True` and `normalize=True` the large one."""

    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    extractor_norm: str = "group"  # "group": per channel over all time, first layer only; "layer": per frame, every layer
    dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    ffn_dim: int = 3072
    pre_norm: bool = False
    pos_kernel: int = 128
    pos_groups: int = 16
    n_classes: int = 0  # clusters to predict in pre-training; 0: no head
    proj_dim: int = 256
    dropout: float = 0.0
    normalize: bool = False  # bring each waveform to mean 0 and variance 1 first (HuBERT large does, mHuBERT does not)


def n_frames(n_samples: int) -> int:
    """How many frames come out of n_samples (>= 400) at 16 kHz."""
    return (n_samples - WINDOW) // HOP + 1


# ---------------------------------------------------------------------------------------------------------------
# The encoder. Attributes carry the names of Hugging Face's HubertModel, so that a saved file is simply its layout.


class ConvLayer(nn.Module):
    """Convolution, normalisation, GELU."""

    def __init__(self, cfg: HuBERTConfig, i: int):
        super().__init__()
        c_in, c_out = cfg.conv_dim[i - 1] if i else 1, cfg.conv_dim[i]
        self.conv = nn.Conv1d(c_in, c_out, cfg.conv_kernel[i], cfg.conv_stride[i], bias=cfg.conv_bias)
        self.layer_norm = None
        if cfg.extractor_norm == "layer":
            self.layer_norm = nn.LayerNorm(c_out)
        elif i == 0:
            self.layer_norm = nn.GroupNorm(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, T_in) -> (B, C_out, T_out)
        x = self.conv(x)
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        elif self.layer_norm is not None:
            x = self.layer_norm(x)
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.conv_layers = nn.ModuleList(ConvLayer(cfg, i) for i in range(len(cfg.conv_dim)))

    def forward(self, wav: Tensor) -> Tensor:  # (B, N) -> (B, T, C)
        x = wav[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class FeatureProjection(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(cfg.conv_dim[-1])
        self.projection = nn.Linear(cfg.conv_dim[-1], cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x))


class WeightNormConv(nn.Conv1d):
    """Same-length convolution whose kernel is a direction v times one length g for each of its taps (dim 2)."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__(cfg.dim, cfg.dim, cfg.pos_kernel, padding=cfg.pos_kernel // 2, groups=cfg.pos_groups)
        del self.weight
        self.weight_g = nn.Parameter(torch.empty(1, 1, cfg.pos_kernel))
        self.weight_v = nn.Parameter(torch.empty(cfg.dim, cfg.dim // cfg.pos_groups, cfg.pos_kernel))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) -> (B, C, T)
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=(0, 1), keepdim=True)
        y = F.conv1d(x, weight, self.bias, padding=self.padding, groups=self.groups)
        return y[:, :, : x.shape[2]]  # "SamePad": an even kernel gives one frame too many, the last one goes


class PositionalConv(nn.Module):
    """Positions are not numbered; each frame is told about its neighbourhood by a wide convolution (2.5 s)."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.conv = WeightNormConv(cfg)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        return F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.n_heads, self.dropout = cfg.n_heads, cfg.dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (  # (B, T, C) -> (B, heads, T, C / heads)
            proj(x).view(B, T, self.n_heads, -1).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # every frame sees every other one, before and after it: HuBERT hears the whole utterance
        x = F.scaled_dot_product_attention(q, k, v, valid, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.output_dense = nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """Transformer block; the norms sit after the sums (base) or before the branches (large)."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.pre_norm = cfg.pre_norm
        self.attention = Attention(cfg)
        self.layer_norm = nn.LayerNorm(cfg.dim)
        self.feed_forward = FeedForward(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:  # (B, T, C)
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.layer_norm(x), valid))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + self.dropout(self.attention(x, valid)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.pre_norm = cfg.pre_norm
        self.pos_conv_embed = PositionalConv(cfg)
        self.layer_norm = nn.LayerNorm(cfg.dim)  # post-norm: before the first layer; pre-norm: after the last one
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.n_layers))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, upto: int, valid: Tensor | None) -> list[Tensor]:
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.pre_norm else self.layer_norm(x))
        states = [x]
        for layer in self.layers[:upto]:
            states.append(layer(states[-1], valid))
        return states


class HuBERT(nn.Module):
    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.dim))
        self.encoder = Encoder(config)
        if config.n_classes:
            self.final_proj = nn.Linear(config.dim, config.proj_dim)
            self.label_embs = nn.Parameter(torch.empty(config.n_classes, config.proj_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """fairseq's: BERT's N(0, 0.02) for linear layers, He for convolutions, positions so that their sum has unit scale."""
        for m in self.modules():
            if isinstance(m, WeightNormConv):
                nn.init.normal_(m.weight_v, std=math.sqrt(4 / (self.config.pos_kernel * self.config.dim)))
                m.weight_g.copy_(m.weight_v.norm(dim=(0, 1), keepdim=True))
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv1d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.uniform_(self.masked_spec_embed)
        if self.config.n_classes:
            nn.init.normal_(self.label_embs)  # only directions matter; normal ones are spread evenly

    def layers(self, wav: Tensor, upto: int | None = None, lengths: Tensor | None = None,
               mask: Tensor | None = None) -> list[Tensor]:
        """What enters the Transformer and what each of its first `upto` layers puts out: upto + 1 tensors (B, T, C).
        wav (B, N) float at 16 kHz; `lengths` (B,) samples that are real in each padded row; `mask` (B, T) bool frames to hide.
        The final norm of pre-norm models is not applied, as with fairseq's output_layer."""
        assert wav.ndim == 2 and wav.shape[1] >= WINDOW, f"wav must be (B, N >= {WINDOW}), got {tuple(wav.shape)}"
        upto = self.config.n_layers if upto is None else upto
        assert 0 <= upto <= self.config.n_layers, f"layer {upto} of a model of {self.config.n_layers} layers"
        if self.config.normalize:
            wav = F.layer_norm(wav, wav.shape[1:])
        x = self.feature_projection(self.feature_extractor(wav))  # (B, T, C)
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_spec_embed, x)
        return self.encoder(x, upto, None)

    def features(self, wav: Tensor, layer: int, lengths: Tensor | None = None) -> Tensor:
        """wav (B, N) -> output of the Transformer's layer-th layer, counted from 1, (B, T, C). See `layers`."""
        return self.layers(wav, layer, lengths)[layer]

    def masked_loss(self, wav: Tensor, labels: Tensor, mask: Tensor, unmasked_weight: float = 0.0,
                    temperature: float = 0.1) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy (nats) of guessing the cluster of hidden frames, and the share of right guesses there.
        wav (B, N), labels (B, T) long, mask (B, T) bool: True is hidden. HuBERT paper eq. 1-3."""
        x = self.layers(wav, mask=mask)[-1]
        if self.config.pre_norm:
            x = self.encoder.layer_norm(x)

        def loss_at(frames: Tensor) -> tuple[Tensor, Tensor]:  # the logits are computed at these frames only
            o = F.normalize(self.final_proj(x[frames]), dim=-1)
            logits = o @ F.normalize(self.label_embs, dim=-1).T / temperature  # eq. 3: cos(A o_t, e_c) / 0.1
            return F.cross_entropy(logits, labels[frames]), (logits.argmax(-1) == labels[frames]).float().mean()

        loss, accuracy = loss_at(mask)
        if unmasked_weight:  # eq. 2
            loss = loss + unmasked_weight * loss_at(~mask)[0]
        return loss, accuracy


    # Loading and saving: see the key table at the end of the file.

    def save_pretrained(self, folder: str | Path):
        """config.json and model.safetensors in the layout of Hugging Face's HubertModel, without the pre-training head."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v for k, v in self.state_dict().items() if not k.startswith(("final_proj.", "label_embs"))}
        checkpoint.save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        checkpoint.write_json(folder / "config.json", to_hugging_face(self.config))

    @classmethod
    def from_pretrained(cls, path: str | Path, n_layers: int | None = None) -> HuBERT:
        """Our own or a Hugging Face folder. `n_layers` keeps only the first layers."""
        path = Path(path)
        config = from_hugging_face(checkpoint.read_json(path / "config.json"))
        model = cls(config)
        checkpoint.assign(model, checkpoint.read_tensors(path / "model.safetensors"), str(path))
        return model.eval()


# ---------------------------------------------------------------------------------------------------------------
# What training needs: masks and the first targets


def span_mask(B: int, T: int, prob: float = 0.08, span: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """(B, T) bool, True is hidden: `prob` of the frames (the paper: 8 %) begin a span of `span` hidden frames. Spans may
    overlap, so 8 % x 10 hides about half of the frames. At least one span a row; every row begins equally many."""
    assert prob * span <= 3, f"prob {prob} x span {span} hides almost everything: prob is the share of starts (0.08)"
    span = min(span, max(1, T // 2))
    starts = torch.rand(B, T - span + 1, generator=generator).topk(max(1, round(prob * T)), dim=1).indices
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(span):
        mask.scatter_(1, starts + i, True)
    return mask


def mfcc(wav: Tensor, normalize: bool = True) -> Tensor:
    """wav (B, N) at 16 kHz -> (B, T, 39): 13 mel-cepstral coefficients, their slopes, and the slopes of those, on
    HuBERT's frames (25 ms every 20 ms). `normalize` brings each of the 39 to mean 0 and variance 1 over the utterance."""
    assert wav.ndim == 2 and wav.shape[1] >= WINDOW, f"wav must be (B, N >= {WINDOW}), got {tuple(wav.shape)}"
    wav = wav - 0.97 * F.pad(wav, (1, 0))[:, :-1]  # pre-emphasis: speech falls by 6 dB an octave
    frames = wav.unfold(1, WINDOW, HOP) * torch.hamming_window(WINDOW, device=wav.device)  # (B, T, 400)
    power = torch.fft.rfft(frames, 512).abs().square()  # (B, T, 257)
    # 26 triangles, evenly spaced and half overlapping on the mel scale from 20 Hz to 8 kHz
    mel = lambda hz: 1127 * math.log(1 + hz / 700)  # noqa: E731
    bins = 1127 * torch.log1p(torch.arange(257, device=wav.device) * (RATE / 512) / 700)
    edges = torch.linspace(mel(20), mel(8000), 28, device=wav.device)
    up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    log_mel = torch.log(power @ torch.minimum(up, down).clamp(min=0) + 1e-5)  # (B, T, 26); digital silence: -11.5
    # cosine transform: decorrelates; only the 13 slowest waves along frequency are kept
    n, k = torch.arange(26, device=wav.device), torch.arange(13, device=wav.device)
    x = log_mel @ torch.cos(math.pi / 26 * (n[:, None] + 0.5) * k) * math.sqrt(2 / 26)  # (B, T, 13)

    def slope(x: Tensor) -> Tensor:  # least-squares line through 5 frames, the ends repeated
        p = torch.cat([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], dim=1)
        return (p[:, 3:-1] - p[:, 1:-3] + 2 * (p[:, 4:] - p[:, :-4])) / 10

    x = torch.cat([x, slope(x), slope(slope(x))], dim=-1)
    if normalize:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x


# ---------------------------------------------------------------------------------------------------------------
# Units


class KMeans(nn.Module):
    """k cluster centres (K, C); the unit of a vector is the number of the nearest one."""

    def __init__(self, centers: Tensor):
        super().__init__()
        self.register_buffer("centers", centers.float())

    @classmethod
    def fit(cls, x: Tensor, k: int, seed: int = 0, batch_size: int = 10_000) -> KMeans:
        """Mini-batch k-means of scikit-learn on x (n, C), begun with k-means++."""
        from sklearn.cluster import MiniBatchKMeans

        if len(x) < k:
            raise ValueError(f"k-means: {len(x)} frames cannot make {k} clusters; use more speech or fewer units")
        fitted = MiniBatchKMeans(k, batch_size=batch_size, random_state=seed, n_init=3, max_no_improvement=50,
                                 reassignment_ratio=0.0).fit(x.float().cpu().numpy())
        return cls(torch.from_numpy(fitted.cluster_centers_))

    def predict(self, x: Tensor) -> Tensor:
        """(..., C) -> (...) long. argmin |x - c|^2 = argmax x.c - |c|^2 / 2; the lowest number wins a tie."""
        return (x @ self.centers.T - 0.5 * self.centers.square().sum(1)).argmax(-1)

    def save(self, folder: str | Path):
        checkpoint.save_tensors(Path(folder) / "kmeans.safetensors", {"centers": self.centers})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> KMeans:
        """Our folder or kmeans.safetensors, or a joblib file of a scikit-learn k-means (mHuBERT's km1000 .bin)."""
        path = Path(path)
        path = path / "kmeans.safetensors" if path.is_dir() else path
        tensors = checkpoint.read_tensors(path)
        for name in ("centers", "cluster_centers_"):
            if name in tensors:
                return cls(tensors[name])
        raise ValueError(f"{path}: no cluster centres in it (found {', '.join(sorted(tensors)[:5]) or 'nothing'})")


def dedup(frames: Tensor | list[int]) -> tuple[list[int], list[int]]:
    """[5, 5, 7] -> units [5, 7], durations [2, 1] in frames of 20 ms."""
    units, durations = torch.unique_consecutive(torch.as_tensor(frames, dtype=torch.long), return_counts=True)
    return units.tolist(), durations.tolist()


def expand(units: list[int], durations: list[int]) -> list[int]:
    """The inverse of `dedup`."""
    return [u for u, d in zip(units, durations, strict=True) for _ in range(d)]


class UnitExtractor(nn.Module):
    """Speech to units: a HuBERT, the number of one of its layers (from 1), and the clusters of that layer."""

    def __init__(self, model: HuBERT, kmeans: KMeans, layer: int):
        super().__init__()
        self.model, self.kmeans, self.layer = model.eval(), kmeans, layer

    def forward(self, wav: np.ndarray | Tensor) -> tuple[list[int], list[int]]:
        """wav (N,) 16 kHz -> deduplicated units and how many frames each lasts."""
        return dedup(self.frames(wav))

    @torch.inference_mode()
    def frames(self, wav: np.ndarray | Tensor) -> Tensor:
        """wav (N,) 16 kHz -> (T,) long, one unit every 20 ms."""
        wav = self.check(wav)
        return self.kmeans.predict(self.model.features(wav[None], self.layer)[0])

    def frames_batch(self, wavs: list[np.ndarray | Tensor]) -> list[Tensor]:
        """The same for many recordings."""
        return [self.frames(wav) for wav in wavs]

    def check(self, wav: np.ndarray | Tensor) -> Tensor:
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.kmeans.centers.device)
        if wav.ndim != 1:
            raise ValueError(f"expected one channel of samples, got shape {tuple(wav.shape)}; mix down to mono first")
        if len(wav) < WINDOW:
            raise ValueError(f"the recording has {len(wav)} samples; HuBERT needs at least {WINDOW} (25 ms at 16 kHz)")
        if not torch.isfinite(wav).all():
            raise ValueError("the recording holds NaN or infinite samples; it is damaged")
        return wav

    def save_pretrained(self, folder: str | Path):
        folder = Path(folder)
        self.model.save_pretrained(folder)
        self.kmeans.save(folder)
        checkpoint.write_json(folder / "units.json", {"layer": self.layer})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> UnitExtractor:
        folder = Path(folder)
        layer = checkpoint.read_json(folder / "units.json")["layer"]
        return cls(HuBERT.from_pretrained(folder), KMeans.from_pretrained(folder), layer)


# ---------------------------------------------------------------------------------------------------------------
# Other people's files

HF_CONFIG = {  # ours: Hugging Face's
    "conv_dim": "conv_dim", "conv_kernel": "conv_kernel", "conv_stride": "conv_stride", "conv_bias": "conv_bias",
    "extractor_norm": "feat_extract_norm", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "ffn_dim": "intermediate_size", "pre_norm": "do_stable_layer_norm",
    "pos_kernel": "num_conv_pos_embeddings", "pos_groups": "num_conv_pos_embedding_groups",
}


def to_hugging_face(cfg: HuBERTConfig) -> dict:
    return {theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()} | {
        "architectures": ["HubertModel"], "model_type": "hubert", "num_feat_extract_layers": len(cfg.conv_dim),
        "normalize": cfg.normalize}


def from_hugging_face(table: dict) -> HuBERTConfig:
    cfg = HuBERTConfig(**{ours: table[theirs] for ours, theirs in HF_CONFIG.items()})
    cfg.normalize = table.get("normalize", False)
    return cfg
