"""HuBERT: speech -> discrete units (SpeechGPT paper §3.1 and §4.1, "discrete unit extractor").

A self-supervised encoder hears 16 kHz waveforms and predicts, at frames hidden from it, to which cluster the
hidden sound belonged. The clusters of one of its layers then serve as an alphabet of sounds: the units that the
language model reads and writes.

    wav (N,) --7 convolutions--> (T, C), 50 frames a second --Transformer, layer 11--> (T, C)
             --k-means--> 63 63 63 991 162 162 --dedup--> units 63 991 162, durations 3 1 2

One frame is 400 samples (25 ms) wide and 320 (20 ms) after the last one, so T = (N - 400) // 320 + 1:
    399 samples -> none, an error;  400 -> 1;  719 -> 1;  720 -> 2;  16,000 (1 s) -> 49.

Training: first on clusters of MFCCs, then on clusters of a layer of the model so trained (`mfcc`, `KMeans`).

References: Hsu et al. 2021, "HuBERT", arXiv:2106.07447 (objective: §II.B, eq. 1-3; two rounds of clusters: §II.C)
            Baevski et al. 2020, "wav2vec 2.0", arXiv:2006.11477 (convolutions, positions, span masking)
            Lee et al. 2022, "Textless speech-to-speech translation on real data", arXiv:2112.08352 (mHuBERT)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from data.audio import HOP, RATE, WINDOW, n_frames
from files import read_json, write_json


@dataclass
class HuBERTConfig:
    """Defaults: HuBERT base and mHuBERT, 94.4 M parameters. HuBERT large has extractor_norm "layer", pre_norm and
    normalize."""

    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    extractor_norm: str = (
        "group"  # "group": layer 0, each channel over all time; "layer": every layer, each frame
    )
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
    normalize: bool = False  # bring the waveform to mean 0, variance 1 (HuBERT large does, mHuBERT must not)

    def __post_init__(self):
        sizes = (
            *self.conv_dim,
            self.dim,
            self.n_layers,
            self.n_heads,
            self.ffn_dim,
            self.pos_kernel,
            self.pos_groups,
        )
        if not all(type(n) is int and 1 <= n <= 65536 for n in sizes) or self.n_layers > 1000:
            raise ValueError(f"impossible sizes: {self}")
        if self.extractor_norm not in ("group", "layer"):
            raise ValueError(f'extractor_norm must be "group" or "layer", not {self.extractor_norm!r}')
        if self.dim % self.n_heads or self.dim % self.pos_groups:
            raise ValueError(
                f"n_heads {self.n_heads} and pos_groups {self.pos_groups} must divide dim {self.dim}"
            )
        width, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride):
            width, hop = width + (kernel - 1) * hop, hop * stride
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) or (width, hop) != (
            WINDOW,
            HOP,
        ):
            raise ValueError(
                f"the convolutions see {width} samples every {hop}; it must be {WINDOW} every {HOP}"
            )


# ---- The encoder -----------------------------------------------------------------------------------------------
# Attributes carry the names of Hugging Face's HubertModel, so that our files are in its layout as they are.


class ConvLayer(nn.Module):
    """Convolution, norm, GELU."""

    def __init__(self, cfg: HuBERTConfig, i: int):
        super().__init__()
        c_in, c_out = cfg.conv_dim[i - 1] if i else 1, cfg.conv_dim[i]
        self.conv = nn.Conv1d(c_in, c_out, cfg.conv_kernel[i], cfg.conv_stride[i], bias=cfg.conv_bias)
        if cfg.extractor_norm == "layer":
            self.layer_norm = nn.LayerNorm(c_out)
        elif i == 0:
            self.layer_norm = nn.GroupNorm(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, 1, T_in) -> (B, C_out, 1, T_out), in the layout of x
        x = F.conv2d(x, self.conv.weight[:, :, None], self.conv.bias, (1, *self.conv.stride))
        if hasattr(self, "layer_norm"):
            x = self.layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    """The seven convolutions over the waveform. Three arrangements make them exact in pieces, and fast:

    - The group norm of layer 0 has one group per channel and follows a linear map y = w.x of ten samples, so it
      only rescales that map, by statistics that follow from those of all windows of ten: mean(y) = w.mean(x),
      var(y) = w.cov(x).w. `first` puts it into the weights. Everything after that looks at its own 25 ms alone,
      so that padded batches and pieces of a long recording give what the whole would.
    - Without gradients two seconds at a time go through all layers: they fit the cache, and memory is constant.
    - Few channels, and layer norms, are faster with channels innermost in memory. The convolutions of a training
      step (48 channels, 8 x 2 s) take 57 ms of one core instead of 90; with layer norms, 79 instead of 269. Many
      channels (512) are slower that way."""

    PIECE = 100  # frames

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.conv_layers = nn.ModuleList(ConvLayer(cfg, i) for i in range(len(cfg.conv_dim)))
        self.channels_last = cfg.extractor_norm == "layer" or max(cfg.conv_dim) <= 128

    def windows(self, wav: Tensor) -> Tensor:  # (B, N) -> (B, n, 10), what layer 0 sees
        conv = self.conv_layers[0].conv
        return wav.unfold(1, conv.kernel_size[0], conv.stride[0])

    def first(self, wav: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Layer 0 for each recording of wav (B, N), weights (B, 10, C) and biases (B, 1, C), its norm included."""
        conv, norm = self.conv_layers[0].conv, self.conv_layers[0].layer_norm
        weight = conv.weight.squeeze(1)  # (C, 10)
        if isinstance(norm, nn.LayerNorm):  # that one comes later, frame by frame
            bias = torch.zeros_like(weight[:, 0]) if conv.bias is None else conv.bias
            return weight.T.expand(len(wav), -1, -1), bias.expand(len(wav), 1, -1)
        windows = self.windows(wav)
        n = torch.full((len(wav), 1), windows.shape[1], device=wav.device)
        if lengths is not None:
            n = (lengths[:, None] - conv.kernel_size[0]) // conv.stride[0] + 1
        total, square = 0, 0
        for start in range(0, windows.shape[1], 100_000):  # 30 s at a time
            x = windows[:, start : start + 100_000]
            x = x * (torch.arange(start, start + x.shape[1], device=wav.device) < n)[..., None]
            total, square = total + x.sum(1), square + x.transpose(1, 2) @ x
        mean = total / n  # (B, 10)
        cov = square / n[..., None] - mean[:, :, None] * mean[:, None]  # (B, 10, 10)
        var = (weight[:, :, None] * cov[:, None] * weight[:, None]).sum((2, 3))  # (B, C)
        scale = norm.weight * torch.rsqrt(var.clamp(min=0) + norm.eps)  # (B, C)
        shift = norm.bias - scale * (mean[:, None] * weight).sum(
            2
        )  # conv.bias would cancel: the norm removes it
        return (scale[:, :, None] * weight).transpose(1, 2), shift[:, None]

    def forward(self, wav: Tensor, first: tuple[Tensor, Tensor]) -> Tensor:  # (B, N) -> (B, T, C)
        if torch.is_grad_enabled():
            return self.convolve(wav, first)
        T = n_frames(wav.shape[1])
        ends = [min(t + self.PIECE, T) for t in range(0, T, self.PIECE)]
        pieces = [
            wav[:, (end - 1) // self.PIECE * self.PIECE * HOP : (end - 1) * HOP + WINDOW] for end in ends
        ]
        return torch.cat([self.convolve(piece, first) for piece in pieces], dim=1)

    def convolve(self, wav: Tensor, first: tuple[Tensor, Tensor]) -> Tensor:
        weight, bias = first  # each recording has its own layer 0
        if self.channels_last:
            x = torch.baddbmm(bias, self.windows(wav), weight)  # (B, n, 10) -> (B, n, C)
            if isinstance(self.conv_layers[0].layer_norm, nn.LayerNorm):
                x = self.conv_layers[0].layer_norm(x)
            x = F.gelu(x)[:, None].permute(0, 3, 1, 2)  # (B, C, 1, n), C innermost in memory
        else:
            kernels, B = weight.transpose(1, 2).flatten(0, 1)[:, None], len(wav)  # (B C, 1, 10)
            x = F.conv1d(wav[None], kernels, bias.flatten(), self.conv_layers[0].conv.stride, groups=B)
            x = F.gelu(x.view(B, -1, 1, x.shape[2]))  # (1, B C, n) -> (B, C, 1, n)
        for layer in self.conv_layers[1:]:
            x = layer(x)
        return x[:, :, 0].transpose(1, 2)  # (B, C, 1, T) -> (B, T, C)


class FeatureProjection(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(cfg.conv_dim[-1])
        self.projection = nn.Linear(cfg.conv_dim[-1], cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.layer_norm(x))


class WeightNormConv(nn.Module):
    """Convolution whose weight is a direction v with a length g of its own for each tap (weight norm over dim 2)."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.groups = cfg.pos_groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, cfg.pos_kernel))
        self.weight_v = nn.Parameter(torch.empty(cfg.dim, cfg.dim // cfg.pos_groups, cfg.pos_kernel))
        self.bias = nn.Parameter(torch.empty(cfg.dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) -> (B, C, T)
        length = self.weight_v.square().sum((0, 1)).sqrt()  # five times as fast as .norm(dim=(0, 1)) on a CPU
        weight = self.weight_v * (self.weight_g / length)
        y = F.conv1d(x, weight, self.bias, padding=weight.shape[2] // 2, groups=self.groups)
        return y[:, :, : x.shape[2]]  # an even kernel gives a frame too many: the last one goes ("SamePad")


class PositionalConv(nn.Module):
    """Frames are not numbered. Each is told what is around it, here and there, by one wide convolution (2.5 s)."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.conv = WeightNormConv(cfg)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        return F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Attention(nn.Module):
    """Every frame attends to every other one, before and after: HuBERT hears the whole utterance."""

    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.n_heads, self.dropout = cfg.n_heads, cfg.dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            proj(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, heads, T, C / heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and torch.is_grad_enabled() and valid is None:
            # Spelled out: on a CPU the gradient of torch's own takes six times as long in bfloat16 (torch 2.13).
            weights = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1)
            x = F.dropout(weights, dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, valid, dropout)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, cfg: HuBERTConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(cfg.dim, cfg.ffn_dim)
        self.output_dense = nn.Linear(cfg.ffn_dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class EncoderLayer(nn.Module):
    """A Transformer layer with its norms after the sums (base) or before the branches (large)."""

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
        self.layer_norm = nn.LayerNorm(
            cfg.dim
        )  # post-norm: before the first layer; pre-norm: after the last one
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.n_layers))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor, upto: int, valid: Tensor | None) -> list[Tensor]:
        x = x + self.pos_conv_embed(x)
        states = [self.dropout(x if self.pre_norm else self.layer_norm(x))]
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
        """As fairseq: linear N(0, 0.02) as in BERT, convolutions He, positions N(0, 4 / (kernel x dim)). Codewords
        are normal rather than fairseq's uniform in [0, 1), which all point the same way."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv1d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, WeightNormConv):
                nn.init.normal_(m.weight_v, std=math.sqrt(4 / (self.config.pos_kernel * self.config.dim)))
                m.weight_g.copy_(m.weight_v.norm(dim=(0, 1), keepdim=True))
                nn.init.zeros_(m.bias)
        nn.init.uniform_(self.masked_spec_embed)
        if self.config.n_classes:
            nn.init.normal_(self.label_embs)

    def prepare(self, wav: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All that needs the whole recording: the normalised waveform, and layer 0 with its statistics."""
        if self.config.normalize and lengths is None:
            wav = F.layer_norm(wav, wav.shape[1:])
        elif self.config.normalize:
            rows = [F.layer_norm(row[:n], (n,)) for row, n in zip(wav, lengths.tolist())]
            wav = torch.stack([F.pad(row, (0, wav.shape[1] - len(row))) for row in rows])
        return wav, self.feature_extractor.first(wav, lengths)

    def encode(
        self,
        wav: Tensor,
        first: tuple[Tensor, Tensor],
        upto: int,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> list[Tensor]:
        """The rest: what enters the Transformer and what its layers 1 .. upto put out, each (B, T, C)."""
        x = self.feature_projection(self.feature_extractor(wav, first))
        if mask is not None:
            x = torch.where(mask[..., None], self.masked_spec_embed, x)
        valid = None
        if lengths is not None:  # nothing may look at the padding
            valid = torch.arange(x.shape[1], device=x.device) < n_frames(lengths)[:, None]  # (B, T)
            x, valid = (
                x * valid[..., None],
                valid[:, None, None],
            )  # (B, 1, 1, T): which keys may be attended to
        return self.encoder(x, upto, valid)

    def hidden_states(
        self, wav: Tensor, upto: int | None = None, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Tensor]:
        """[input of the Transformer, output of layer 1, .., of layer `upto`], each (B, T, C), in one pass.

        wav (B, N) float at 16 kHz, N >= 400; lengths (B,) in samples, of rows padded at the end (frames past a
        row's own are meaningless); mask (B, T) bool, frames to hide. No final norm, even of pre-norm models."""
        upto = self.config.n_layers if upto is None else upto
        assert wav.ndim == 2 and wav.shape[1] >= WINDOW, (
            f"wav must be (B, N >= {WINDOW}), is {tuple(wav.shape)}"
        )
        assert 0 <= upto <= self.config.n_layers, f"no layer {upto} in a model of {self.config.n_layers}"
        return self.encode(*self.prepare(wav, lengths), upto, lengths, mask)

    def features(self, wav: Tensor, layer: int, lengths: Tensor | None = None) -> Tensor:
        """Output (B, T, C) of the `layer`-th layer, counted from 1 as fairseq's output_layer: see hidden_states."""
        return self.hidden_states(wav, layer, lengths)[layer]

    def masked_loss(
        self,
        wav: Tensor,
        labels: Tensor,
        mask: Tensor,
        unmasked_weight: float = 0.0,
        temperature: float = 0.1,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy (mean, nats) of the clusters of the hidden frames, and the share of them guessed right.

        wav (B, N); labels (B, T) long, below 0 for frames without; mask (B, T) bool, True where hidden."""
        x = self.hidden_states(wav, mask=mask)[-1]
        if self.config.pre_norm:
            x = self.encoder.layer_norm(x)

        def guess(frames: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) bool -> loss and accuracy there
            o, target = F.normalize(self.final_proj(x[frames]), dim=-1), labels[frames]
            logits = o @ F.normalize(self.label_embs, dim=-1).T / temperature  # eq. 3: cos(A o_t, e_c) / tau
            return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean()

        loss, accuracy = guess(mask & (labels >= 0))  # eq. 1, L_m
        if unmasked_weight:
            loss = loss + unmasked_weight * guess(~mask & (labels >= 0))[0]  # eq. 2
        return loss, accuracy

    def save_pretrained(self, folder: str | Path):
        """config.json and model.safetensors that transformers' HubertModel loads; the pre-training head stays out."""
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not re.match(HEAD, name)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        write_json(Path(folder) / "config.json", to_hugging_face(self.config))

    @classmethod
    def from_pretrained(cls, path: str | Path, n_layers: int | None = None) -> HuBERT:
        """A fairseq .pt (or a folder with one), a Hugging Face folder, or ours. `n_layers` leaves higher layers out."""
        path = Path(path)
        if (path / "config.json").exists():
            config, tensors = read_hugging_face(path)
        else:
            config, tensors = read_fairseq(the_one(path, "*.pt", "a HuBERT") if path.is_dir() else path)
        if n_layers is not None:
            if not 1 <= n_layers <= config.n_layers:
                raise ValueError(f"{path}: layer {n_layers} asked for, but the model has {config.n_layers}")
            tensors, config = without_layers_above(n_layers, tensors), replace(config, n_layers=n_layers)
        with torch.device("meta"):  # no time spent on initial weights
            model = cls(config)
        checkpoint.assign(model, tensors, path)
        return model.eval()


def without_layers_above(n_layers: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A HuBERT's tensors, by our names, as far as its layer number `n_layers` (from 1)."""
    layer = {name: re.match(r"encoder\.layers\.(\d+)\.", name) for name in tensors}
    return {
        name: tensor for name, tensor in tensors.items() if not layer[name] or int(layer[name][1]) < n_layers
    }


# ---- For training: what to hide, and the first targets ---------------------------------------------------------


def span_mask(
    B: int, T: int, prob: float = 0.08, span: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """(B, T) bool, True where hidden: `prob` of the frames, the same number in each row and at least one, begin a
    span of `span` hidden frames. Spans may overlap, so the paper's 8 % x 10 frames hide somewhat over half."""
    assert prob * span <= 3, (
        f"{prob} x {span} hides nearly all: prob is the share of frames that begin a span"
    )
    span = min(span, max(1, T // 2))
    starts = torch.rand(B, T - span + 1, generator=generator).topk(max(1, round(prob * T)), dim=1).indices
    mask = torch.zeros(B, T, dtype=torch.bool)
    for i in range(span):
        mask.scatter_(1, starts + i, True)
    return mask


def mfcc(wav: Tensor, normalize: bool = True) -> Tensor:
    """wav (B, N) at 16 kHz -> (B, T, 39): 13 mel-frequency cepstral coefficients, their slopes and the slopes of
    those, on HuBERT's frames. `normalize`: each of the 39 to mean 0 and variance 1 over the utterance."""
    assert wav.ndim == 2 and wav.shape[1] >= WINDOW, f"wav must be (B, N >= {WINDOW}), is {tuple(wav.shape)}"
    wav = wav - 0.97 * F.pad(wav, (1, 0))[:, :-1]  # speech falls by 6 dB an octave: even that out
    frames = wav.unfold(1, WINDOW, HOP) * torch.hamming_window(WINDOW, device=wav.device)  # (B, T, 400)
    power = torch.fft.rfft(frames, 512).abs().square()  # (B, T, 257)
    # 26 half-overlapping triangles, evenly spaced on the mel scale of the ear from 20 Hz to 8 kHz
    hz = torch.arange(257, device=wav.device) * (RATE / 512)
    low, high = (1127 * math.log(1 + f / 700) for f in (20, 8000))
    mel, edges = 1127 * torch.log1p(hz / 700)[:, None], torch.linspace(low, high, 28, device=wav.device)
    left, peak, right = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((mel - left) / (peak - left), (right - mel) / (right - peak)).clamp(min=0)
    loudness = torch.log(power @ triangles + 1e-5)  # (B, T, 26)
    # of the cosine transform along frequency only the 13 slowest waves: the vocal tract without the pitch
    n, k = torch.arange(26, device=wav.device), torch.arange(13, device=wav.device)
    x = loudness @ torch.cos(math.pi / 26 * (n[:, None] + 0.5) * k) * math.sqrt(2 / 26)  # (B, T, 13)

    def slope(x: Tensor) -> Tensor:  # of the least-squares line through 5 frames; the ends are repeated
        p = torch.cat([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], dim=1)
        return (p[:, 3:-1] - p[:, 1:-3] + 2 * (p[:, 4:] - p[:, :-4])) / 10

    x = torch.cat([x, slope(x), slope(slope(x))], dim=2)
    if normalize:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x


# ---- Units -----------------------------------------------------------------------------------------------------


class KMeans(nn.Module):
    """K cluster centres (K, C). A vector's unit is the number of the nearest one."""

    def __init__(self, centers: Tensor):
        super().__init__()
        self.register_buffer("centers", centers.float())

    @classmethod
    def fit(cls, x: Tensor, k: int, seed: int = 0) -> KMeans:
        """k clusters of x (n, C), by scikit-learn's mini-batch k-means as for the released units."""
        from sklearn.cluster import MiniBatchKMeans

        if len(x) < k:
            raise ValueError(
                f"{len(x)} frames of speech cannot make {k} clusters; use more speech or fewer units"
            )
        # 3 k frames to choose first centres from: scikit-learn's own 30,000 take longer than all the rest
        fitted = MiniBatchKMeans(
            k, batch_size=10_000, n_init=3, init_size=3 * k, max_no_improvement=50, random_state=seed
        )
        fitted.fit(x.float().cpu().numpy())
        return cls(torch.from_numpy(fitted.cluster_centers_))

    def predict(self, x: Tensor) -> Tensor:
        """(..., C) -> (...) long. The lowest number wins a tie."""
        return self.distances(x).argmin(-1)

    def distances(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K): |x - c|^2 of each centre, less |x|^2, which is the same for all of them."""
        return self.centers.square().sum(1) - 2 * x @ self.centers.T

    def embeddings(self, dim: int) -> Tensor:
        """A look-up table (K, dim) to begin with: the centres' first `dim` principal components, zeros if there are
        fewer, of mean 0 and variance 1. Units that sound alike begin alike, so what is learned of one holds for all."""
        x = self.centers - self.centers.mean(0)
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        x = F.pad((u * s)[:, :dim], (0, max(0, dim - len(s))))
        return x / x.std().clamp(min=1e-8)  # one cluster lies nowhere

    def save(self, folder: str | Path):
        checkpoint.save_tensors(Path(folder) / "kmeans.safetensors", {"centers": self.centers})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> KMeans:
        """Our kmeans.safetensors, what scikit-learn fitted and joblib wrote (km1000 .bin), or a folder with one."""
        path = Path(path)
        if path.is_dir():
            ours = path / "kmeans.safetensors"
            path = ours if ours.exists() else the_one(path, "*km*.bin", "a k-means")
        tensors = checkpoint.read_tensors(path)
        centers = tensors.get("centers", tensors.get("cluster_centers_"))
        if centers is None or centers.ndim != 2:
            raise ValueError(f"{path}: holds no cluster centres, so it is not a k-means")
        return cls(centers.clone())


def dedup(frames: Tensor | list[int]) -> tuple[list[int], list[int]]:
    """[5, 5, 7] -> units [5, 7] and their durations [2, 1] in frames of 20 ms."""
    units, durations = torch.unique_consecutive(torch.as_tensor(frames, dtype=torch.long), return_counts=True)
    return units.tolist(), durations.tolist()


def expand(units: list[int], durations: list[int]) -> list[int]:
    """The inverse of dedup."""
    return [unit for unit, n in zip(units, durations, strict=True) for _ in range(n)]


def smooth(x: Tensor, frames: int) -> Tensor:
    """(B, T, C) -> (B, T, C): each frame the mean of `frames` (odd) around it, of fewer at the ends."""
    return F.avg_pool1d(x.transpose(1, 2), frames, 1, frames // 2, count_include_pad=False).transpose(1, 2)


class UnitExtractor(nn.Module):
    """Speech -> units: a HuBERT, the number of one of its layers (from 1), and clusters of what that layer says.

    A small HuBERT flickers between clusters where a large one rests; `smooth` frames are averaged to calm it. The
    released units know nothing of that: 1."""

    CHUNK, CONTEXT = (
        3000,
        1000,
    )  # frames: a recording over 100 s is heard 60 s at a time, with 20 s on either side
    OFFICIAL = 100 * RATE  # samples

    def __init__(self, model: HuBERT, kmeans: KMeans, layer: int, smooth: int = 1):
        super().__init__()
        assert smooth % 2, f"smooth is {smooth}: it must be odd, as many frames before as after"
        assert 1 <= layer <= model.config.n_layers, f"no layer {layer} in a model of {model.config.n_layers}"
        k, dim = kmeans.centers.shape
        if dim != model.config.dim:
            raise ValueError(
                f"the {k} cluster centres have {dim} numbers each, HuBERT's frames {model.config.dim}: "
                "the two are of different models"
            )
        self.model, self.kmeans, self.layer, self.smooth = model, kmeans, layer, smooth
        self.eval()

    def forward(self, wav: np.ndarray | Tensor, official: bool = False) -> tuple[list[int], list[int]]:
        """wav (N,) at 16 kHz -> units, no two equal in a row, and how many frames of 20 ms each lasts."""
        return dedup(self.frames(wav, official))

    @torch.inference_mode()
    def frames(self, wav: np.ndarray | Tensor, official: bool = False) -> Tensor:
        """wav (N,) at 16 kHz -> the unit of each frame, (T,) long.

        Long recordings go through in overlapping chunks, in constant memory. `official` cuts them as the official
        code does: 100 s at a time, each as if alone, a frame lost at each cut and a last piece under 25 ms too."""
        wav = self.check(wav)[None]
        if official:
            wav = self.model.prepare(wav)[0]
            pieces = [piece for piece in wav.split(self.OFFICIAL, dim=1) if piece.shape[1] >= WINDOW]
            return torch.cat(
                [self.units(piece, self.model.feature_extractor.first(piece, None)) for piece in pieces]
            )
        wav, first = self.model.prepare(wav)
        T = n_frames(wav.shape[1])
        if T <= self.CHUNK + 2 * self.CONTEXT:
            return self.units(wav, first)
        units = []
        for start in range(0, T, self.CHUNK):
            a, b = max(0, start - self.CONTEXT), min(T, start + self.CHUNK + self.CONTEXT)
            heard = self.units(wav[:, a * HOP : (b - 1) * HOP + WINDOW], first)
            units.append(heard[start - a : start - a + self.CHUNK])
        return torch.cat(units)

    def units(self, wav: Tensor, first: tuple[Tensor, Tensor]) -> Tensor:  # (1, N) -> (T,)
        return self.kmeans.predict(
            smooth(self.model.encode(wav, first, self.layer)[self.layer], self.smooth)[0]
        )

    @torch.inference_mode()
    def frames_batch(self, wavs: list[np.ndarray | Tensor], seconds: float = 16) -> list[Tensor]:
        """`frames` of many recordings, padded to batches of some `seconds` of sound: as exact, faster on a GPU."""
        wavs, out = [self.check(wav) for wav in wavs], [None] * len(wavs)
        order = sorted(
            range(len(wavs)), key=lambda i: -len(wavs[i])
        )  # longest first, so neighbours are alike
        while order:
            n = max(1, int(seconds * RATE) // len(wavs[order[0]]))
            batch, order = order[:n], order[n:]
            if n == 1 or self.smooth > 1:  # the mean at a row's end would reach into its padding
                for i in batch:
                    out[i] = self.frames(wavs[i])
                continue
            padded = nn.utils.rnn.pad_sequence([wavs[i] for i in batch], batch_first=True)
            lengths = torch.tensor([len(wavs[i]) for i in batch], device=padded.device)
            units = self.kmeans.predict(self.model.features(padded, self.layer, lengths))
            for i, row in zip(batch, units):
                out[i] = row[: n_frames(len(wavs[i]))]
        return out

    def check(self, wav: np.ndarray | Tensor) -> Tensor:
        wav = torch.as_tensor(wav, dtype=torch.float32, device=self.kmeans.centers.device)
        if wav.ndim != 1:
            raise ValueError(
                f"a recording must be (N,), one channel; this one is {tuple(wav.shape)}: mix it down"
            )
        if len(wav) < WINDOW:
            raise ValueError(f"the recording has {len(wav)} samples, HuBERT needs {WINDOW} (25 ms at 16 kHz)")
        if not torch.isfinite(wav).all():
            raise ValueError("the recording contains NaN or infinity; record or convert it again")
        return wav

    def save_pretrained(self, folder: str | Path):
        self.model.save_pretrained(folder)
        self.kmeans.save(folder)
        write_json(Path(folder) / "units.json", {"layer": self.layer, "smooth": self.smooth})

    @classmethod
    def from_pretrained(cls, folder: str | Path, layer: int | None = None) -> UnitExtractor:
        """Our folder; or a fairseq .pt or Hugging Face's files beside a joblib k-means (*km*.bin), as released.

        `layer` None: what units.json says, else 11, the layer of the released mHuBERT units."""
        folder = Path(folder)
        said = folder / "units.json"
        written = read_json(said) if said.exists() else {"layer": 11}
        found = (written.get("layer"), written.get("smooth", 1)) if isinstance(written, dict) else (None, 1)
        if not all(type(n) is int and n > 0 for n in found) or found[1] % 2 == 0:
            raise ValueError(f'{said}: must say {{"layer": number}}, and perhaps {{"smooth": odd number}}')
        layer = layer or found[0]
        return cls(
            HuBERT.from_pretrained(folder, n_layers=layer), KMeans.from_pretrained(folder), layer, found[1]
        )


# ---- Other people's files --------------------------------------------------------------------------------------

HEAD = r"final_proj\.|label_embs|target_glu\."  # of pre-training; no part of the encoder

FAIRSEQ = {  # fairseq's names, as patterns: ours (formats: group norm is conv_layers.0.2, layer norm .N.2.1)
    r"feature_extractor\.conv_layers\.(\d+)\.0\.": r"feature_extractor.conv_layers.\1.conv.",
    r"feature_extractor\.conv_layers\.(\d+)\.2\.(1\.)?": r"feature_extractor.conv_layers.\1.layer_norm.",
    r"layer_norm\.": "feature_projection.layer_norm.",
    r"post_extract_proj\.": "feature_projection.projection.",
    r"mask_emb$": "masked_spec_embed",
    r"encoder\.pos_conv\.0\.": "encoder.pos_conv_embed.conv.",
    r"encoder\.layers\.(\d+)\.self_attn\.": r"encoder.layers.\1.attention.",
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.": r"encoder.layers.\1.layer_norm.",
    r"encoder\.layers\.(\d+)\.fc1\.": r"encoder.layers.\1.feed_forward.intermediate_dense.",
    r"encoder\.layers\.(\d+)\.fc2\.": r"encoder.layers.\1.feed_forward.output_dense.",
}
HUGGING_FACE = {  # transformers' names are ours, but for weight norm as torch >= 2 spells it
    r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0$": "encoder.pos_conv_embed.conv.weight_g",
    r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1$": "encoder.pos_conv_embed.conv.weight_v",
}
HF_CONFIG = {  # our setting: Hugging Face's
    "conv_dim": "conv_dim",
    "conv_kernel": "conv_kernel",
    "conv_stride": "conv_stride",
    "conv_bias": "conv_bias",
    "extractor_norm": "feat_extract_norm",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "pre_norm": "do_stable_layer_norm",
    "pos_kernel": "num_conv_pos_embeddings",
    "pos_groups": "num_conv_pos_embedding_groups",
    "normalize": "normalize",  # ours alone: theirs is in preprocessor_config.json, which is wrong for mHuBERT
}
HF_FIXED = {
    "model_type": "hubert",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
}  # what this file can do


def rename(tensors: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Each name by the first pattern of the table at its beginning; without the pre-training head."""
    renamed = {}
    for name, tensor in tensors.items():
        if not re.match(HEAD, name):
            pattern = next((p for p in table if re.match(p, name)), "")
            renamed[re.sub("^" + pattern, table.get(pattern, ""), name)] = tensor
    return renamed


def to_hugging_face(cfg: HuBERTConfig) -> dict:
    return {
        "architectures": ["HubertModel"],
        "num_feat_extract_layers": len(cfg.conv_dim),
        **HF_FIXED,
        **{theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()},
    }


def read_hugging_face(folder: Path) -> tuple[HuBERTConfig, dict[str, Tensor]]:
    table = read_json(folder / "config.json")
    if not isinstance(table, dict):
        raise ValueError(f"{folder}/config.json: not a table of settings")
    for key, value in HF_FIXED.items():
        if table.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {table[key]!r}; only {value!r} is implemented")
    given = {}
    for ours, theirs in HF_CONFIG.items():
        if theirs in table:
            given[ours] = tuple(table[theirs]) if isinstance(table[theirs], list) else table[theirs]
            if type(given[ours]) is not type(getattr(HuBERTConfig, ours)):
                raise ValueError(f"{folder}/config.json: {theirs} cannot be {table[theirs]!r}")
    try:
        config = HuBERTConfig(**given)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{folder}/config.json: {problem}") from None
    return config, rename(checkpoint.read_tensors(folder), HUGGING_FACE)


def read_fairseq(path: Path) -> tuple[HuBERTConfig, dict[str, Tensor]]:
    """Sizes come from the tensors, and what those cannot tell from the settings that fairseq stored beside them;
    without settings, from the recipes of base (group norm) and large (layer norms), whose heads have 64 numbers."""
    tensors, told = rename(checkpoint.read_tensors(path), FAIRSEQ), {}
    saved = checkpoint.read_checkpoint(path)
    stored = saved.get("cfg") if isinstance(saved.get("cfg"), dict) else {}
    for table in (saved.get("args"), stored.get("model"), stored.get("task")):
        told |= table if isinstance(table, dict) else {}
    large = "feature_extractor.conv_layers.1.layer_norm.weight" in tensors
    try:
        convs = [tensors[f"feature_extractor.conv_layers.{i}.conv.weight"].shape for i in range(7)]
        dim, per_group, kernel = tensors["encoder.pos_conv_embed.conv.weight_v"].shape
        return HuBERTConfig(
            conv_dim=tuple(c[0] for c in convs),
            conv_kernel=tuple(c[2] for c in convs),
            conv_bias="feature_extractor.conv_layers.0.conv.bias" in tensors,
            extractor_norm="layer" if large else "group",
            dim=dim,
            n_layers=len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")}),
            n_heads=told.get("encoder_attention_heads", dim // 64),
            ffn_dim=tensors["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0],
            pre_norm=bool(told.get("layer_norm_first", large)),
            pos_kernel=kernel,
            pos_groups=dim // per_group,
            normalize=bool(told.get("normalize", large)),
        ), tensors
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as problem:
        raise ValueError(f"{path}: not a HuBERT of fairseq ({problem})") from None


def the_one(folder: Path, pattern: str, what: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"{folder}: expected one file {pattern} ({what}), found {[f.name for f in found] or 'none'}"
        )
    return found[0]
