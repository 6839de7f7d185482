"""HuBERT: speech -> discrete units (SpeechGPT paper §3.1 and §4.1, "discrete unit extractor").

A self-supervised encoder of 16 kHz waveforms learns to predict the cluster of each masked frame (clusters of
MFCCs, then of its own features). A k-means over one of its layers gives the units of the language model.

    wav (N,) --7 convolutions--> (T, C), 50 frames a second --Transformer, layer 11--> (T, C)
             --k-means--> 63 63 63 991 162 162 --dedup--> units 63 991 162, durations 3 1 2

A frame sees 400 samples (25 ms) and starts 320 (20 ms) after the one before, so T = (N - 400) // 320 + 1:
    399 samples -> none, an error;  400 -> 1;  719 -> 1;  720 -> 2;  16,000 (1 s) -> 49.

References: Hsu et al. 2021, "HuBERT", arXiv:2106.07447 (masked prediction: §II.B, eq. 1 and 3; rounds: §II.D)
            Baevski et al. 2020, "wav2vec 2.0", arXiv:2006.11477 (convolutions, positions, span masking)
            Lee et al. 2022, "Textless speech-to-speech translation on real data", arXiv:2112.08352 (mHuBERT)
"""

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from config import Limits, Share, Size, Whole
from data.audio import HOP, RATE, WINDOW, n_frames
from files import write_json
from foreign import Keys, read_table, settings
from hubert_formats import HEAD, read_fairseq, read_hugging_face, to_hugging_face
from kmeans import KMeans, dedup, smooth, the_one
from run import rank

Maybe = Tensor | None
Folded = tuple[Tensor, Tensor]  # layer 0 of each recording: weights (B, 10, C) and biases (B, 1, C)


@dataclass
class HuBERTConfig:
    """Defaults: HuBERT base and mHuBERT, 94.4 M parameters."""

    conv_dim: tuple[Size, ...] = (512,) * 7
    conv_kernel: tuple[Size, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[Size, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    extractor_norm: str = "group"  # HuBERT large: "layer"
    dim: Size = 768
    n_layers: Annotated[int, Limits(1, 1000)] = 12
    n_heads: Size = 12
    ffn_dim: Size = 3072
    pre_norm: bool = False  # HuBERT large: True
    pos_kernel: Size = 128
    pos_groups: Size = 16
    n_classes: Whole = 0  # clusters to predict in pre-training; 0: no prediction head
    proj_dim: Size = 256
    dropout: Share = 0.0
    standardize_wav: bool = False  # waveform to mean 0, variance 1: HuBERT large does, mHuBERT must not

    def __post_init__(self):
        if self.extractor_norm not in ("group", "layer"):
            raise ValueError(f'extractor_norm must be "group" or "layer", not {self.extractor_norm!r:.50}')
        if self.dim % self.n_heads or self.dim % self.pos_groups:
            raise ValueError(f"{self.n_heads} heads, {self.pos_groups} pos_groups must divide dim {self.dim}")
        lengths = {len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}
        if len(lengths) > 1 or max(lengths) > 16:
            raise ValueError("convolutions need a size, a kernel and a stride each, and are at most 16")
        width = hop = 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride):
            width, hop = width + (kernel - 1) * hop, hop * stride
        if (width, hop) != (WINDOW, HOP):
            raise ValueError(f"convolutions see {width} samples every {hop}; it must be {WINDOW} every {HOP}")


# ---- The encoder -------------------------------------------------------------------------------------------
# Attributes carry the names of Hugging Face's HubertModel, so that our files have its layout.


def named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


class FeatureExtractor(nn.Module):
    """Seven times convolution, norm, GELU: the plain form of `FastFeatureExtractor`, which HuBERT runs."""

    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.conv_layers = nn.ModuleList()
        channels = (1, *config.conv_dim)
        for i, (kernel, stride) in enumerate(zip(config.conv_kernel, config.conv_stride)):
            conv = nn.Conv1d(channels[i], channels[i + 1], kernel, stride, bias=config.conv_bias)
            norm = nn.Identity()
            if config.extractor_norm == "layer":
                norm = nn.LayerNorm(conv.out_channels)  # each frame, over its channels
            elif i == 0:
                norm = nn.GroupNorm(conv.out_channels, conv.out_channels)  # each channel, over all time
            self.conv_layers.append(named(conv=conv, layer_norm=norm))

    def forward(self, wav: Tensor) -> Tensor:  # (B, N) -> (B, T, C)
        x = wav[:, None]  # (B, N) -> (B, 1, N)
        for conv, norm in self.conv_layers:
            x = conv(x)
            x = norm(x.mT).mT if isinstance(norm, nn.LayerNorm) else norm(x)
            x = F.gelu(x)
        return x.mT  # (B, C, T) -> (B, T, C)


class PositionalConv(nn.Module):
    """Relative positions: one wide grouped convolution (128 frames, 2.6 s) is added to the features. Its
    weight has, for each tap, a direction v and a length g (weight norm)."""

    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.groups = config.pos_groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, config.pos_kernel))
        self.weight_v = nn.Parameter(torch.empty(config.dim, config.dim // self.groups, config.pos_kernel))
        self.bias = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        length = self.weight_v.square().sum((0, 1)).sqrt()  # on a CPU five times as fast as .norm
        weight = self.weight_v * (self.weight_g / length)
        y = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=weight.shape[2] // 2, groups=self.groups)
        y = y[:, :, : x.shape[1]]  # an even kernel gives one frame too many: drop the last ("SamePad")
        return F.gelu(y).transpose(1, 2)  # (B, C, T) -> (B, T, C)


class Attention(nn.Module):  # not causal: every frame attends to the whole utterance
    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, valid: Maybe) -> Tensor:  # (B, T, C)
        q = self.q_proj(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, T, C / heads)
        k = self.k_proj(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and torch.is_grad_enabled() and valid is None:
            # Written out: on a CPU in bfloat16 the gradient of torch's own takes six times as long (2.13).
            weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)  # (B, heads, T, T)
            y = F.dropout(weights, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, valid, dropout)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, heads, T, C / heads) -> (B, T, C)


class EncoderLayer(nn.Module):  # its norms come after the sums, or before the branches (pre_norm)
    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = Attention(config)
        self.layer_norm = nn.LayerNorm(config.dim)
        up = nn.Linear(config.dim, config.ffn_dim)
        down = nn.Linear(config.ffn_dim, config.dim)
        self.feed_forward = named(intermediate_dense=up, gelu=nn.GELU(), output_dense=down)
        self.final_layer_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, valid: Maybe) -> Tensor:  # (B, T, C)
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.layer_norm(x), valid))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + self.dropout(self.attention(x, valid)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.pos_conv_embed = named(conv=PositionalConv(config))
        self.layer_norm = nn.LayerNorm(config.dim)  # before the first layer; pre-norm: after the last one
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, n_layers: int, valid: Maybe) -> list[Tensor]:
        x = x + self.pos_conv_embed(x)
        states = [self.dropout(x if self.pre_norm else self.layer_norm(x))]
        for layer in self.layers[:n_layers]:
            states.append(layer(states[-1], valid))
        return states


# ---- Masked prediction -------------------------------------------------------------------------------------


def span_mask(
    B: int, T: int, prob: float = 0.08, span: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """(B, T) bool, True where masked: `prob` of the frames, equally many in each row and at least one, start
    a span of `span` masked frames. Spans may overlap: the paper's 8 % x 10 frames mask a little over half."""
    assert prob * span <= 3, f"{prob} x {span} masks nearly all: prob is the fraction of span starts"
    span = min(span, max(1, T // 2))
    starts = torch.rand(B, T - span + 1, generator=generator).topk(max(1, round(prob * T)), dim=1).indices
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(span):
        mask.scatter_(1, starts + i, True)
    return mask


class HuBERT(nn.Module):
    """Feature extractor, projection, encoder; with n_classes > 0 also the prediction head of pre-training."""

    def __init__(self, config: HuBERTConfig):
        super().__init__()
        self.config = config
        self.feature_extractor = FastFeatureExtractor(config)
        norm = nn.LayerNorm(config.conv_dim[-1])
        linear = nn.Linear(config.conv_dim[-1], config.dim)
        self.feature_projection = named(layer_norm=norm, projection=linear)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.dim))
        self.encoder = Encoder(config)
        if config.n_classes:
            self.final_proj = nn.Linear(config.dim, config.proj_dim)  # A of eq. 3
            self.label_embs = nn.Parameter(torch.empty(config.n_classes, config.proj_dim))  # e_c of eq. 3
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As fairseq, but for the codewords: fairseq's, uniform in [0, 1), all point the same way."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, PositionalConv):
                variance = 4 / (self.config.pos_kernel * self.config.dim)
                nn.init.normal_(module.weight_v, std=math.sqrt(variance))
                module.weight_g.copy_(module.weight_v.norm(dim=(0, 1), keepdim=True))
                nn.init.zeros_(module.bias)
        nn.init.uniform_(self.masked_spec_embed)
        if self.config.n_classes:
            nn.init.normal_(self.label_embs)

    def features(self, wav: Tensor, layer: int, lengths: Maybe = None) -> Tensor:
        """Output (B, T, C) of layer number `layer`, from 1 as fairseq's output_layer. See hidden_states."""
        return self.hidden_states(wav, layer, lengths)[layer]

    def hidden_states(
        self, wav: Tensor, n_layers: int | None = None, lengths: Maybe = None, mask: Maybe = None
    ) -> list[Tensor]:
        """[input of the Transformer, output of layer 1, .., of layer `n_layers`], each (B, T, C).
        wav (B, N) float at 16 kHz, N >= 400; lengths (B,) in samples, of rows padded at the end (frames past
        a row's own are meaningless); mask (B, T) bool, frames to mask. No final norm, even if pre_norm."""
        n_layers = self.config.n_layers if n_layers is None else n_layers
        assert wav.ndim == 2 and wav.shape[1] >= WINDOW, f"wav is {tuple(wav.shape)}, not (B, N >= {WINDOW})"
        assert 0 <= n_layers <= self.config.n_layers, f"no layer {n_layers} of {self.config.n_layers}"
        return self.encode(*self.prepare(wav, lengths), n_layers, lengths, mask)

    def prepare(self, wav: Tensor, lengths: Maybe = None) -> tuple[Tensor, Folded]:
        """What needs the whole recording: the standardized waveform, and layer 0 with its norm folded in."""
        if self.config.standardize_wav:
            wav = standardize(wav, lengths)
        return wav, self.feature_extractor.fold(wav, lengths)

    def encode(
        self, wav: Tensor, folded: Folded, n_layers: int, lengths: Maybe = None, mask: Maybe = None
    ) -> list[Tensor]:
        """The rest, for a recording or a piece of it."""
        x = self.feature_projection(self.feature_extractor(wav, folded))  # (B, N) -> (B, T, C)
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_spec_embed, x)  # the corrupted input of eq. 1
        valid = None
        if lengths is not None:  # frames past a row's own: zero for PositionalConv, invisible in attention
            valid = torch.arange(x.shape[1], device=x.device) < n_frames(lengths)[:, None]  # (B, T)
            x = x * valid[..., None]
            valid = valid[:, None, None]  # (B, T) -> (B, 1, 1, T): keys
        return self.encoder(x, n_layers, valid)

    def cluster_logits(self, x: Tensor) -> Tensor:
        """(n, C) -> (n, n_classes): log p(c | input, t) of eq. 3, before the softmax."""
        output = F.normalize(self.final_proj(x), dim=-1)  # A o_t
        codewords = F.normalize(self.label_embs, dim=-1)  # e_c
        return output @ codewords.T / 0.1  # eq. 3: sim(A o_t, e_c) / tau, cosine over temperature

    def masked_losses(
        self, wav: Tensor, labels: Tensor, mask: Tensor, unmasked_weight: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss sum in nats, weight sum, correct guesses, masked frames) of predicting the masked clusters.
        wav (B, N); labels (B, T) long, below 0 for frames without; mask (B, T) bool, True where masked."""
        x = self.hidden_states(wav, mask=mask)[-1]
        if self.config.pre_norm:
            x = self.encoder.layer_norm(x)
        masked = mask & (labels >= 0)  # (B, T)
        logits = self.cluster_logits(x[masked])  # (n, n_classes)
        loss_sum = F.cross_entropy(logits, labels[masked], reduction="sum")  # eq. 1: L_m
        correct = (logits.argmax(-1) == labels[masked]).sum()
        n = masked.sum()
        if not unmasked_weight:
            return loss_sum, n, correct, n
        seen = ~mask & (labels >= 0)  # §II.B: alpha L_m + (1 - alpha) L_u, here L_m + unmasked_weight L_u
        unmasked_sum = F.cross_entropy(self.cluster_logits(x[seen]), labels[seen], reduction="sum")
        return loss_sum + unmasked_weight * unmasked_sum, n + unmasked_weight * seen.sum(), correct, n

    def save_pretrained(self, folder: str | Path):
        """config.json and model.safetensors for transformers' HubertModel, without the prediction head."""
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not re.match(HEAD, name)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        checkpoint.save_model(folder, tensors)
        if rank() == 0:
            write_json(Path(folder) / "config.json", to_hugging_face(self.config))

    @classmethod
    def from_pretrained(cls, path: str | Path, n_layers: int | None = None) -> "HuBERT":
        """A fairseq .pt (or a folder with one), a Hugging Face folder, or ours; `n_layers`: its first."""
        path = Path(path)
        if (path / "config.json").exists():
            config, tensors = read_hugging_face(HuBERTConfig, path)
        else:
            file = the_one(path, "*.pt", "a HuBERT") if path.is_dir() else path
            config, tensors = read_fairseq(HuBERTConfig, file)
        if n_layers is not None:
            if not 1 <= n_layers <= config.n_layers:
                raise ValueError(f"{path}: layer {n_layers} asked for, but the model has {config.n_layers}")
            tensors = without_layers_above(n_layers, tensors)
            config = replace(config, n_layers=n_layers)
        with torch.device("meta"):  # no time spent on initial weights
            model = cls(config)
        checkpoint.assign(model, tensors, path)
        return model.eval()


# ---- Units -------------------------------------------------------------------------------------------------

Smooth = Annotated[int, Limits(1, 99)]  # frames averaged before clustering


@dataclass
class UnitSettings:
    """units.json. Without one: the layer of the released mHuBERT units."""

    layer: Annotated[int, Limits(1, 1000)] = 11
    smooth: Smooth = 1


class UnitExtractor(nn.Module):
    """Speech -> units: a HuBERT, a layer of it (from 1), and a k-means over that layer's outputs. Small
    HuBERTs change cluster more often, so these are averaged over `smooth` frames first (1: off)."""

    CHUNK = 3000  # frames: recordings over 100 s are encoded 60 s at a time ...
    CONTEXT = 1000  # ... with 20 s of context on either side
    OFFICIAL = 100 * RATE  # samples

    def __init__(self, model: HuBERT, kmeans: KMeans, layer: int, smooth: int = 1):
        super().__init__()
        assert smooth % 2, f"smooth is {smooth}: it must be odd, as many frames before as after"
        assert 1 <= layer <= model.config.n_layers, f"no layer {layer} in a model of {model.config.n_layers}"
        if kmeans.centers.shape[1] != model.config.dim:
            dims = f"{kmeans.centers.shape[1]} and {model.config.dim}"
            raise ValueError(f"centers and frames have {dims} numbers: they are of different models")
        self.model = model
        self.kmeans = kmeans
        self.layer = layer
        self.smooth = smooth
        self.eval()

    def forward(self, wav: np.ndarray | Tensor, official: bool = False) -> tuple[list[int], list[int]]:
        """wav (N,) at 16 kHz -> units, no two equal in a row, and the duration of each in frames of 20 ms."""
        return dedup(self.frame_units(wav, official))

    @torch.inference_mode()
    def frame_units(self, wav: np.ndarray | Tensor, official: bool = False) -> Tensor:
        """wav (N,) at 16 kHz -> the unit of each frame, (T,) long, in constant memory. `official` cuts as the
        official code does: 100 s at a time, each alone, losing a frame at each cut and a rest under 25 ms."""
        wav, folded = self.model.prepare(self.check(wav)[None])
        if official:
            pieces = [piece for piece in wav.split(self.OFFICIAL, dim=1) if piece.shape[1] >= WINDOW]
            return torch.cat([self.nearest(p, self.model.feature_extractor.fold(p)) for p in pieces])
        if n_frames(wav.shape[1]) > self.CHUNK + 2 * self.CONTEXT:
            return units_by_chunks(self, wav, folded)
        return self.nearest(wav, folded)

    def nearest(self, wav: Tensor, folded: Folded) -> Tensor:  # (1, N) -> (T,)
        x = self.model.encode(wav, folded, self.layer)[self.layer]
        return self.kmeans.predict(smooth(x, self.smooth)[0])

    def check(self, wav: np.ndarray | Tensor) -> Tensor:
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.kmeans.centers.device)
        if wav.ndim != 1:
            raise ValueError(f"the recording is {tuple(wav.shape)}, not (N,) of one channel: mix it down")
        if len(wav) < WINDOW:
            raise ValueError(f"the recording has {len(wav)} samples, HuBERT needs {WINDOW} (25 ms at 16 kHz)")
        if not torch.isfinite(wav).all():
            raise ValueError("the recording contains NaN or infinity; record or convert it again")
        return wav

    def save_pretrained(self, folder: str | Path):
        self.model.save_pretrained(folder)
        if rank() == 0:
            self.kmeans.save(folder)
            write_json(Path(folder) / "units.json", {"layer": self.layer, "smooth": self.smooth})

    @classmethod
    def from_pretrained(cls, folder: str | Path, layer: int | None = None) -> "UnitExtractor":
        """Our folder; or a fairseq .pt or Hugging Face's files with a joblib k-means (*km*.bin), as released.
        `layer` None: the one in units.json, else 11, the layer of the released mHuBERT units."""
        path = Path(folder) / "units.json"
        keys = Keys({"layer": "layer", "smooth": "smooth"}, {}, "")
        known = settings(UnitSettings, keys, read_table(path), path) if path.exists() else UnitSettings()
        if known.smooth % 2 == 0:
            raise ValueError(f"{path}: smooth is {known.smooth}; it must be odd")
        for file in Path(folder).glob("*_L*_km*.bin"):  # ..._L11_km1000.bin is of layer 11
            stated = re.search(r"_L(\d+)_km", file.name)
            if layer is None and stated and int(stated[1]) != known.layer:
                raise ValueError(f"{file}: not of layer {known.layer}; write the layer to {path.name}")
        layer = layer or known.layer
        model = HuBERT.from_pretrained(folder, layer)
        return cls(model, KMeans.from_pretrained(folder), layer, known.smooth)


def without_layers_above(n_layers: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a HuBERT, by our names, with its first `n_layers` Transformer layers."""
    above = tuple(f"encoder.layers.{i}." for i in range(n_layers, 1000))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(above)}


# ---- Ours, for small models and long recordings ------------------------------------------------------------

PIECE = 100  # frames, two seconds


class FastFeatureExtractor(FeatureExtractor):
    """`FeatureExtractor`, faster and in constant memory; exact for padded rows and pieces of a recording.
    Only the group norm of layer 0 looks beyond a frame's own 25 ms: it normalizes each channel y = w.x over
    all windows x of ten samples. As mean(y) = w.mean(x) and var(y) = w.cov(x).w, `fold` takes its statistics
    once from the whole recording and puts them into the weights. Then any cut between frames is exact:

        sample   0                      32000  32080                    64080
        piece 1  |------- frames 0 .. 99 ----------|
        piece 2                           |------- frames 100 .. 199 ------|

    Such pieces, run without gradients, fit the cache. Channels innermost in memory are faster for layer norms
    (79 ms a training step, not 269) and for few channels (57 ms, not 90), but slower for 512."""

    def __init__(self, config: HuBERTConfig):
        super().__init__(config)
        self.channels_last = config.extractor_norm == "layer" or max(config.conv_dim) <= 128

    def fold(self, wav: Tensor, lengths: Maybe = None) -> Folded:
        """Layer 0 for each recording of wav (B, N), its group norm included."""
        conv, norm = self.conv_layers[0]
        weight = conv.weight.squeeze(1)  # (C, 1, 10) -> (C, 10)
        if isinstance(norm, nn.LayerNorm):  # looks at one frame: nothing to fold
            bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else conv.bias
            return weight.T.expand(len(wav), -1, -1), bias.expand(len(wav), 1, -1)
        windows = wav.unfold(1, *conv.kernel_size, *conv.stride)  # (B, N) -> (B, n, 10)
        n = torch.full((len(wav), 1), windows.shape[1], device=wav.device)  # windows of each recording
        if lengths is not None:
            n = (lengths[:, None] - conv.kernel_size[0]) // conv.stride[0] + 1
        total, square = 0, 0
        for start in range(0, windows.shape[1], 100_000):  # 30 s at a time
            x = windows[:, start : start + 100_000]
            x = x * (torch.arange(start, start + x.shape[1], device=wav.device) < n)[..., None]
            total, square = total + x.sum(1), square + x.mT @ x
        mean = total / n  # (B, 10)
        cov = square / n[..., None] - mean[:, :, None] * mean[:, None]  # (B, 10, 10)
        var = (weight[:, :, None] * cov[:, None] * weight[:, None]).sum((2, 3))  # (B, C)
        scale = norm.weight * torch.rsqrt(var.clamp(min=0) + norm.eps)  # (B, C)
        shift = norm.bias - scale * (mean[:, None] * weight).sum(2)  # the norm removes conv.bias
        return (scale[:, :, None] * weight).mT, shift[:, None]

    def forward(self, wav: Tensor, folded: Folded) -> Tensor:  # (B, N) -> (B, T, C)
        if torch.is_grad_enabled():
            return self.convolve(wav, folded)
        T = n_frames(wav.shape[1])
        pieces = []
        for start in range(0, T, PIECE):
            last = min(start + PIECE, T) - 1  # frame
            pieces.append(self.convolve(wav[:, start * HOP : last * HOP + WINDOW], folded))
        return torch.cat(pieces, dim=1)

    def convolve(self, wav: Tensor, folded: Folded) -> Tensor:  # (B, N) -> (B, T, C)
        weight, bias = folded
        conv, norm = self.conv_layers[0]
        if self.channels_last:
            x = torch.baddbmm(bias, wav.unfold(1, *conv.kernel_size, *conv.stride), weight)  # (B, n, C)
            x = norm(x) if isinstance(norm, nn.LayerNorm) else x
            x = F.gelu(x)[:, None].permute(0, 3, 1, 2)  # (B, n, C) -> (B, C, 1, n), C innermost in memory
        else:
            kernels = weight.mT.flatten(0, 1)[:, None]  # (B, 10, C) -> (B C, 1, 10)
            x = F.conv1d(wav[None], kernels, bias.flatten(), conv.stride, groups=len(wav))
            x = F.gelu(x.view(len(wav), -1, 1, x.shape[2]))  # (1, B C, n) -> (B, C, 1, n)
        for conv, norm in self.conv_layers[1:]:
            x = F.conv2d(x, conv.weight[:, :, None], conv.bias, (1, *conv.stride))
            x = F.gelu(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return x[:, :, 0].mT  # (B, C, 1, T) -> (B, T, C)


def standardize(wav: Tensor, lengths: Maybe = None) -> Tensor:
    """wav (B, N) with each recording at mean 0 and variance 1, without the padding after `lengths`."""
    if lengths is None:
        return F.layer_norm(wav, wav.shape[1:])
    rows = [F.layer_norm(row[:n], (n,)) for row, n in zip(wav, lengths.tolist())]
    return torch.stack([F.pad(row, (0, wav.shape[1] - len(row))) for row in rows])


def units_by_chunks(extractor: UnitExtractor, wav: Tensor, folded: Folded) -> Tensor:
    """wav (1, N) -> (T,): chunks with context on either side, in constant memory."""
    T = n_frames(wav.shape[1])
    units = []
    for start in range(0, T, extractor.CHUNK):
        first = max(0, start - extractor.CONTEXT)
        end = min(T, start + extractor.CHUNK + extractor.CONTEXT)
        chunk = extractor.nearest(wav[:, first * HOP : (end - 1) * HOP + WINDOW], folded)
        units.append(chunk[start - first : start - first + extractor.CHUNK])
    return torch.cat(units)


@torch.inference_mode()
def units_by_batches(extractor: UnitExtractor, wavs: list, seconds: float = 16) -> list[Tensor]:
    """Batches of about `seconds` of sound, padded: as exact as one by one, faster on a GPU."""
    wavs = [extractor.check(wav) for wav in wavs]
    units = [None] * len(wavs)
    order = sorted(range(len(wavs)), key=lambda i: -len(wavs[i]))  # similar lengths together
    while order:
        longest = len(wavs[order[0]])
        size = max(1, int(seconds * RATE) // longest)
        if n_frames(longest) > extractor.CHUNK + 2 * extractor.CONTEXT:
            size = 1  # it is cut
        batch, order = order[:size], order[size:]
        if len(batch) == 1:
            units[batch[0]] = extractor.frame_units(wavs[batch[0]])
            continue
        padded = nn.utils.rnn.pad_sequence([wavs[i] for i in batch], batch_first=True)  # (B, N)
        lengths = torch.tensor([len(wavs[i]) for i in batch], device=padded.device)
        rows = extractor.model.features(padded, extractor.layer, lengths)
        for i, row in zip(batch, rows):
            row = row[None, : n_frames(len(wavs[i]))]  # without its padding, which no mean may reach into
            units[i] = extractor.kmeans.predict(smooth(row, extractor.smooth)[0])
    return units
