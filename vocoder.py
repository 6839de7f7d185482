"""Unit vocoder: discrete speech units -> waveform (paper §4.1, "Unit Vocoder").

    codes (B, T)         one unit every 20 ms
      -> (B, 2 E, T)     embedding of the unit, concatenated with that of the speaker
      -> (B, C, T)       conv_pre
      -> (B, C', T * r)  five times: transposed convolution (r = 5, 4, 4, 2, 2), mean of residual blocks
      -> (B, T * 320)    conv_post, tanh: samples at 16 kHz

It is a HiFi-GAN whose mel input is replaced by an embedding of the units. Units arrive without repetitions
("reduced" units), so a small convolutional predictor first gives each its duration in frames of 20 ms:

    units [7, 3, 9], durations [2, 1, 3] -> codes [7, 7, 3, 9, 9, 9] -> 6 * 320 = 1920 samples

Two kinds of discriminators train it: multi-period (every p-th sample) and multi-scale (the waveform at lower
and lower rates). The losses are functions; `train_vocoder.py` puts them together.

A vocoder on disk is a folder: `config.json` and one file of weights, ours (`generator.safetensors`) or the
released one (`g_00500000`, often renamed `vocoder.pt`), with the same names of tensors.

References: Kong et al. 2020 (HiFi-GAN, arXiv:2010.05646); Polyak et al. 2021 (speech from discrete units,
arXiv:2104.00355); Ren et al. 2021 (FastSpeech 2: durations, arXiv:2006.04558); Mao et al. 2017 (LSGAN).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import checkpoint
from config import Limits, Share, Size, load
from files import show, write_json
from foreign import VOCODER_TRAINING, Keys, read_table, settings

SLOPE = 0.1  # of every leaky ReLU except the generator's last
MAX_FRAMES = 1000  # of a unit: 20 s, far above any that is spoken


@dataclass
class DurationConfig:
    encoder_embed_dim: Size
    var_pred_hidden_dim: Size
    var_pred_kernel_size: Annotated[int, Limits(3, 3)] = 3  # the only one that the released code can use
    var_pred_dropout: Share = 0.5


@dataclass
class SpeakerVectors:
    embedder_dim: Size = 256


Units = Annotated[int, Limits(1, 2**20)]
Kernel = Annotated[int, Limits(1, 1000)]


@dataclass
class VocoderConfig:
    """The keys of the released config.json, whose values are the defaults; our own keys come last."""

    num_embeddings: Units = 1000  # K, the number of units
    embedding_dim: Size = 128  # E
    model_in_dim: Size = 128  # E, or 2 E with speakers
    multispkr: bool | str | None = None  # released files write a string here, or leave it out
    num_speakers: Units = 200
    embedder_params: SpeakerVectors | None = None  # speakers are vectors instead
    f0: bool = False
    resblock: str = "1"  # HiFi-GAN's two kinds of residual block
    upsample_rates: tuple[Kernel, ...] = (5, 4, 4, 2, 2)
    upsample_kernel_sizes: tuple[Kernel, ...] = (11, 8, 8, 4, 4)
    upsample_initial_channel: Size = 512
    resblock_kernel_sizes: tuple[Kernel, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[Kernel, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    dur_predictor_params: DurationConfig | None = field(default_factory=lambda: DurationConfig(128, 128))
    code_hop_size: Size = 320  # samples in a frame: 20 ms
    sampling_rate: Annotated[int, Limits(16000, 16000)] = 16000
    # ours, for small models; None, () and False are HiFi-GAN as published
    upsample_channels: tuple[Size, ...] | None = None  # after each upsampling; None: halved each time
    unit_dilations: tuple[Kernel, ...] = ()  # residual convolutions over the reduced units
    context_dilations: tuple[Kernel, ...] = ()  # residual convolutions at the frame rate
    running_durations: bool = False  # round predicted durations so that their sum is kept

    def __post_init__(self):
        def require(condition: bool, message: str):
            if not condition:
                raise ValueError(f"vocoder config: {message}")

        for name, kind in (("dur_predictor_params", DurationConfig), ("embedder_params", SpeakerVectors)):
            table = getattr(self, name)
            if isinstance(table, dict):  # as in JSON; {} is none
                setattr(self, name, load(kind, table, name) if table else None)
        rates = self.upsample_rates
        kernels = self.upsample_kernel_sizes
        blocks = self.resblock_kernel_sizes
        lists = (rates, kernels, blocks, self.unit_dilations, self.context_dilations)
        require(
            max(map(len, (*lists, *self.resblock_dilation_sizes))) <= 16, "a list of more than 16 numbers"
        )
        even = all(kernel >= rate and (kernel - rate) % 2 == 0 for rate, kernel in zip(rates, kernels))
        hop = math.prod(rates)
        inputs = self.embedding_dim * (2 if self.speakers else 1)
        predictor = self.dur_predictor_params or DurationConfig(self.embedding_dim, 1)
        require(not self.f0, "f0 is true, but this vocoder reads units (and a speaker) only")
        require(len(rates) == len(kernels), f"upsample_kernel_sizes must be one for each of {rates}")
        require(even, f"upsample_kernel_sizes {kernels} must be larger than {rates} by an even number")
        require(hop == self.code_hop_size, f"upsample_rates {rates} multiply to {hop}, not to code_hop_size")
        require(len(self.channels) == len(rates) + 1, f"upsample_channels must be one for each of {rates}")
        require(min(self.channels) > 0, f"upsample_initial_channel cannot be halved {len(rates)} times")
        require(self.resblock in ("1", "2"), f'resblock is {self.resblock!r:.50}; it must be "1" or "2"')
        require(blocks and all(size % 2 for size in blocks), f"resblock_kernel_sizes {blocks} must be odd")
        require(len(self.resblock_dilation_sizes) == len(blocks), "resblock_dilation_sizes: one list a block")
        require(self.model_in_dim == inputs, f"model_in_dim is {self.model_in_dim}; embeddings make {inputs}")
        require(predictor.encoder_embed_dim == self.embedding_dim, "encoder_embed_dim must be embedding_dim")

    @property
    def speakers(self) -> bool:
        return bool(self.multispkr or self.embedder_params)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels after conv_pre and after each upsampling."""
        width = self.upsample_initial_channel
        halved = [width >> (i + 1) for i in range(len(self.upsample_rates))]
        return (width, *(self.upsample_channels or halved))


# ---- Generator ---------------------------------------------------------------------------------------------


def same_conv(c_in: int, c_out: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    """A convolution that keeps the length."""
    return nn.Conv1d(c_in, c_out, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


class ResBlock(nn.Module):
    """For each dilation d: kind "1" x + conv(lrelu(conv_d(lrelu(x)))), kind "2" x + conv_d(lrelu(x))."""

    def __init__(self, kind: str, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        dilated = nn.ModuleList(same_conv(channels, channels, kernel, d) for d in dilations)
        if kind == "1":
            self.convs1 = dilated
            self.convs2 = nn.ModuleList(same_conv(channels, channels, kernel) for _ in dilations)
        else:
            self.convs = dilated

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "convs"):
            for conv in self.convs:
                x = x + conv(F.leaky_relu(x, SLOPE))
        else:
            for conv1, conv2 in zip(self.convs1, self.convs2):
                x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class DurationPredictor(nn.Module):
    """Unit embeddings (B, U, E) -> log(frames + 1), (B, U)."""

    def __init__(self, config: DurationConfig):
        super().__init__()
        width = config.var_pred_hidden_dim
        kernel = config.var_pred_kernel_size
        self.conv1 = nn.Sequential(same_conv(config.encoder_embed_dim, width, kernel), nn.ReLU())
        self.ln1 = nn.LayerNorm(width)
        self.conv2 = nn.Sequential(same_conv(width, width, kernel), nn.ReLU())
        self.ln2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)
        self.dropout = config.var_pred_dropout

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = conv(x.transpose(1, 2)).transpose(1, 2)  # (B, U, E) -> (B, E, U) -> (B, U, width)
            x = F.dropout(norm(x), self.dropout, self.training)
        return self.proj(x).squeeze(-1)


class UnitVocoder(nn.Module):
    """The generator with its duration predictor: units -> waveform."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        widths = config.channels
        self.dict = nn.Embedding(config.num_embeddings, config.embedding_dim)
        if config.embedder_params:
            self.spkr = nn.Linear(config.embedder_params.embedder_dim, config.embedding_dim)
        elif config.speakers:
            self.spkr = nn.Embedding(config.num_speakers, config.embedding_dim)
        self.conv_pre = same_conv(config.model_in_dim, widths[0], 7)
        add_context(self)  # ours, see the last section; nothing in the released vocoder

        self.ups = nn.ModuleList()
        for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes)):
            padding = (kernel - rate) // 2  # T -> exactly T * rate
            self.ups.append(nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, rate, padding))
        self.resblocks = nn.ModuleList()
        for channels in widths[1:]:
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes):
                self.resblocks.append(ResBlock(config.resblock, channels, kernel, dilations))

        self.conv_post = same_conv(widths[-1], 1, 7)
        if config.dur_predictor_params:
            self.dur_predictor = DurationPredictor(config.dur_predictor_params)

    def embed(self, codes: Tensor, speaker: Tensor | None) -> Tensor:
        """Codes (B, T) -> (B, E, T), or with the speaker's embedding at every frame (B, 2 E, T)."""
        x = self.dict(codes).transpose(1, 2)  # (B, T, E) -> (B, E, T)
        if self.config.speakers:
            assert speaker is not None, "a multi-speaker vocoder needs a speaker for each row"
            embedding = self.spkr(speaker)[:, :, None]  # (B, E, 1)
            x = torch.cat([x, embedding.expand(-1, -1, x.shape[2])], 1)
        return x

    def frame_features(self, codes: Tensor, speaker: Tensor | None = None, n_units=None) -> Tensor:
        """The half before upsampling: codes (B, T), speakers (B,) -> (B, C, T). n_units: of `deduplicate`."""
        if self.config.unit_dilations:
            x = expand_units(self, codes, speaker, n_units)  # ours
        else:
            x = self.conv_pre(self.embed(codes, speaker))
        if self.config.context_dilations:
            x = self.context(x)  # ours
        return x

    def generate(self, codes: Tensor, speaker: Tensor | None = None, margin: int = 0, n_units=None) -> Tensor:
        """Codes (B, T), one every 20 ms, and speakers (B,) -> waveforms (B, T * 320) in [-1, 1].

        The first and last `margin` frames are context and produce no samples: (B, (T - 2 * margin) * 320)."""
        x = self.frame_features(codes, speaker, n_units)
        x = x[..., margin : x.shape[2] - margin]
        n = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # (B, C, T) -> (B, C', T * rate)
            blocks = self.resblocks[i * n : (i + 1) * n]
            x = sum(block(x) for block in blocks) / n  # "multi-receptive field fusion"
        x = F.leaky_relu(x, 0.01)  # not SLOPE: the released weights were trained so
        return torch.tanh(self.conv_post(x)).squeeze(1)  # (B, 1, T * 320) -> (B, T * 320)

    def duration_loss(self, units: Tensor, durations: Tensor, total: int | None = None) -> Tensor:
        """Mean squared error of log(frames + 1) over the units (B, U) whose duration is not 0 (padding).

        With `total` the sum divided by that, the number of such units in all processes."""
        mask = durations > 0
        predicted = self.dur_predictor(self.dict(units))
        errors = (predicted - torch.log(durations + 1.0)).square()
        return (errors * mask).sum() / (total or mask.sum())

    @torch.no_grad()
    def durations(self, units: Tensor) -> Tensor:
        """Predicted frames of each of the units (U,), at least one; halves round to even."""
        log_frames = self.dur_predictor(self.dict(units[None]))[0].float()
        if not (log_frames < math.log(MAX_FRAMES)).all():  # nor NaN
            raise ValueError(f"a unit would last {log_frames.max().exp():.3g} frames: damaged weights")
        frames = torch.exp(log_frames) - 1
        if self.config.running_durations:
            return round_keeping_sum(frames)  # ours
        return torch.clamp(torch.round(frames), min=1).long()

    @torch.no_grad()
    def forward(
        self, units: list[int], speaker: int | Tensor | None = None, durations: list[int] | None = None
    ) -> Tensor:
        """Reduced units -> waveform (N,), float32 at 16 kHz; N = 320 * (sum of all durations).

        `durations` are the frames of each unit; None: predicted. `speaker` is a number (None: 0), or a vector
        where the vocoder was trained on vectors. Negative units are dropped, as by the released code."""
        device = self.dict.weight.device
        if durations is not None and len(durations) != len(units):
            raise ValueError(f"{len(units)} units but {len(durations)} durations; give one for each unit")
        kept = [i for i, unit in enumerate(units) if unit >= 0]
        if not kept:
            raise ValueError("there are no units to speak")
        codes = torch.tensor([units[i] for i in kept], device=device)
        if codes.max() >= self.config.num_embeddings:
            n = self.config.num_embeddings
            raise ValueError(f"unit {codes.max()} is unknown: the vocoder has {n}; is it of the same model?")
        if durations is not None:
            frames = torch.tensor([durations[i] for i in kept], device=device)
        elif hasattr(self, "dur_predictor"):
            frames = self.durations(codes)
        else:
            raise ValueError("this vocoder has no duration predictor; give durations (frames of each unit)")
        codes = codes.repeat_interleave(frames)  # (U,) -> (T,)
        wav = self.generate(codes[None], self.speaker_input(speaker)).squeeze(0).float()
        if not wav.isfinite().all():
            raise ValueError("the vocoder computes NaN: its weights are damaged")
        return wav

    def speaker_input(self, speaker: int | Tensor | None) -> Tensor | None:
        """The speaker as `generate` takes it for one row: None, (1,) or (1, embedder_dim)."""
        if not self.config.speakers:
            return None
        if self.config.embedder_params:
            if not isinstance(speaker, Tensor) or speaker.shape != (self.spkr.in_features,):
                raise ValueError(f"this vocoder needs a speaker vector of {self.spkr.in_features} numbers")
            return speaker[None].to(self.dict.weight)
        number = int(speaker or 0)
        if not 0 <= number < self.config.num_speakers:
            raise ValueError(f"speaker {number} is unknown: they are 0 to {self.config.num_speakers - 1}")
        return torch.tensor([number], device=self.dict.weight.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> "UnitVocoder":
        """From a folder with config.json and one file of weights, ours or the released; float32."""
        config, tensors, source = read_folder(Path(folder))
        with torch.device("meta"):  # no memory before the shapes of config and file have been compared
            vocoder = cls(config)
        checkpoint.assign(vocoder, tensors, source, dtype=torch.float32)
        return vocoder.to(device or "cpu").eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "generator.safetensors", self.state_dict(), dtype=dtype)
        write_json(folder / "config.json", dataclasses.asdict(self.config))


# ---- Discriminators ----------------------------------------------------------------------------------------

Scored = list[tuple[Tensor, list[Tensor]]]  # of each discriminator its scores (B, places) and feature maps
MPD_PERIODS = (2, 3, 5, 7, 11)
MPD_CHANNELS = (32, 128, 512, 1024, 1024)
MSD_LAYERS = (  # (channels, kernel, stride, groups)
    (128, 15, 1, 1),
    (128, 41, 2, 4),
    (256, 41, 2, 16),
    (512, 41, 4, 16),
    (1024, 41, 4, 16),
    (1024, 41, 1, 16),
    (1024, 5, 1, 1),
)


class PeriodDiscriminator(nn.Module):
    """Folds the waveform into rows of `period` samples and convolves along the columns."""

    def __init__(self, period: int, channels: tuple[int, ...]):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList()
        widths = (1, *channels)
        for i, c_out in enumerate(channels):
            stride = 3 if i < len(channels) - 1 else 1
            self.convs.append(weight_norm(nn.Conv2d(widths[i], c_out, (5, 1), (stride, 1), (2, 0))))
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        wav = F.pad(wav[:, None], (0, -wav.shape[1] % self.period), "reflect")
        x = wav.unflatten(2, (-1, self.period))  # (B, 1, N) -> (B, 1, N / p, p)
        return scores_and_maps(x, self.convs, self.conv_post)


class ScaleDiscriminator(nn.Module):
    """Strided, grouped convolutions along the waveform."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], norm):
        super().__init__()
        self.convs = nn.ModuleList()
        c_in = 1
        for c_out, kernel, stride, groups in layers:
            padding = (kernel - 1) // 2
            self.convs.append(norm(nn.Conv1d(c_in, c_out, kernel, stride, padding, groups=groups)))
            c_in = c_out
        self.conv_post = norm(nn.Conv1d(c_in, 1, 3, padding=1))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        return scores_and_maps(wav[:, None], self.convs, self.conv_post)


def scores_and_maps(x: Tensor, convs: nn.ModuleList, conv_post: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The score at every place, (B, places), and the output of every layer: the feature maps."""
    maps = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        maps.append(x)
    x = conv_post(x)
    return x.flatten(1), [*maps, x]


class MultiPeriodDiscriminator(nn.Module):
    """Waveforms (B, N) -> (scores, feature maps) for each period."""

    def __init__(self, periods: tuple[int, ...] = MPD_PERIODS, channels: tuple[int, ...] = MPD_CHANNELS):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(p, channels) for p in periods)

    def forward(self, wav: Tensor) -> Scored:
        return [discriminator(wav) for discriminator in self.discriminators]


class MultiScaleDiscriminator(nn.Module):
    """Waveforms (B, N) -> (scores, feature maps) at full rate, half, a quarter, ..."""

    def __init__(self, scales: int = 3, layers: tuple[tuple[int, ...], ...] = MSD_LAYERS):
        super().__init__()
        self.discriminators = nn.ModuleList()
        for i in range(scales):
            self.discriminators.append(ScaleDiscriminator(layers, weight_norm if i else spectral_norm))

    def forward(self, wav: Tensor) -> Scored:
        results = []
        for i, discriminator in enumerate(self.discriminators):
            if i > 0:
                wav = F.avg_pool1d(wav[:, None], 4, 2, padding=2).squeeze(1)
            results.append(discriminator(wav))
        return results


# ---- Losses (HiFi-GAN §2.4) --------------------------------------------------------------------------------


@lru_cache
def mel_filters(n_fft: int, n_mels: int, rate: int = 16000) -> Tensor:
    """Slaney's triangles (n_mels, n_fft // 2 + 1): linear below 1 kHz, logarithmic above, of area one."""
    step = math.log(6.4) / 27
    top = 15 + math.log(rate / 2 / 1000) / step  # in mels; 1 kHz is 15
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    hz = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    low, center, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - low) / (center - low)
    falling = (high - bins) / (high - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def log_mel(wav: Tensor, n_fft: int = 1024, n_mels: int = 80) -> Tensor:
    """Waveforms (B, N) -> HiFi-GAN's log-mel spectrogram (B, n_mels, N // hop), hop = n_fft / 4."""
    hop = n_fft // 4
    wav = F.pad(wav[:, None], ((n_fft - hop) // 2,) * 2, "reflect").squeeze(1)
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.stft(wav, n_fft, hop, window=window, center=False, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)  # (B, n_fft // 2 + 1, frames)
    filters = mel_filters(n_fft, n_mels).to(wav.device)
    return torch.log(torch.clamp(filters @ torch.sqrt(power + 1e-9), min=1e-5))


def mel_loss(fake: Tensor, real: Tensor, n_fft: int = 1024, n_mels: int = 80) -> Tensor:
    """Mean absolute difference of the log-mel spectrograms (eq. 3)."""
    return F.l1_loss(log_mel(fake, n_fft, n_mels), log_mel(real, n_fft, n_mels))


def discriminator_loss(real: Scored, fake: Scored) -> Tensor:
    """LSGAN (eq. 1): scores of real speech towards 1, of generated speech towards 0; summed."""
    return sum((r - 1).pow(2).mean() + f.pow(2).mean() for (r, _), (f, _) in zip(real, fake))


def adversarial_loss(fake: Scored) -> Tensor:
    """LSGAN (eq. 2), the generator's side: its scores towards 1."""
    return sum((f - 1).pow(2).mean() for f, _ in fake)


def feature_loss(real: Scored, fake: Scored) -> Tensor:
    """Feature matching (eq. 4): L1 between the feature maps of real and of generated speech."""
    pairs = [pair for (_, reals), (_, fakes) in zip(real, fake) for pair in zip(reals, fakes)]
    return sum(F.l1_loss(f, r.detach()) for r, f in pairs)


# ---- Weight files ------------------------------------------------------------------------------------------

WEIGHT_FILES = ("generator.safetensors", "vocoder.pt", "g_*")
# Names in the files are those of the modules above, but the released file keeps the generator's convolutions
# as length and direction; torch has two spellings:
WEIGHT_NORM = {
    ".weight_g": ".weight_v",
    ".parametrizations.weight.original0": ".parametrizations.weight.original1",
}


KEYS = Keys(
    {field.name: field.name for field in dataclasses.fields(VocoderConfig)},
    {"f0_quant_num_bin": (0, False), "multistyle": (False, 0)},
    VOCODER_TRAINING,
)


def read_folder(folder: Path) -> tuple[VocoderConfig, dict[str, Tensor], str]:
    """(config, tensors by the names above, path of the weights)."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a vocoder is a folder of config.json and weights")
    found = sorted(path for name in WEIGHT_FILES for path in folder.glob(name))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no weights"
        raise ValueError(f"{folder}: found {names}; keep exactly one of {', '.join(WEIGHT_FILES)}")
    source = str(found[0])
    config = read_config(folder / "config.json")
    tensors = checkpoint.read_tensors(source)  # of the released {"generator": {...}}, the inner table
    return config, fold_weight_norm(tensors, source), source


def read_config(path: Path) -> VocoderConfig:
    table = {"dur_predictor_params": None} | read_table(path)
    without = {} if table["dur_predictor_params"] else {"dur_predictor_params": None}  # there is no predictor
    return settings(VocoderConfig, KEYS, table, path, **without)


def fold_weight_norm(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Each pair g, v becomes the weight g * v / ||v||, the norm over all dimensions but the first.

    For a transposed convolution, stored (in, out, kernel), that is one length for each INPUT channel."""
    folded = dict(tensors)
    for name in tensors:
        for length, direction in WEIGHT_NORM.items():
            if not name.endswith(length):
                continue
            stem = name.removesuffix(length)
            if stem + direction not in tensors:
                raise ValueError(f"{source}: {name} has no partner {stem + direction}")
            g = folded.pop(name).float()
            v = folded.pop(stem + direction).float()
            if g.shape != (*v.shape[:1], *(1 for _ in v.shape[1:])):
                raise ValueError(f"{source}: {name} {show(g.shape)} is no length of {show(v.shape)}")
            folded[stem + ".weight"] = g * v / v.norm(dim=tuple(range(1, v.ndim)), keepdim=True)
    return folded


# ---- Ours, for small models --------------------------------------------------------------------------------
# A small vocoder with minutes to learn does better in two halves. The half at the frame rate, where width is
# cheap, sees more context, and learns alone, from spectra (`FrameSpectrum`). Then the upsampling learns.

MAX_POSITION = 8  # frames of a unit, from either end, that have an embedding of their own


def add_context(vocoder: UnitVocoder):
    """The modules of unit_dilations and context_dilations, between conv_pre and the upsampling."""
    config = vocoder.config
    width = config.channels[0]
    if config.unit_dilations:
        vocoder.unit_context = ResBlock("2", width, 3, config.unit_dilations)
        vocoder.since = nn.Embedding(MAX_POSITION, width)
        vocoder.until = nn.Embedding(MAX_POSITION, width)
        nn.init.zeros_(vocoder.since.weight)
        nn.init.zeros_(vocoder.until.weight)
    if config.context_dilations:
        vocoder.context = ResBlock("2", width, 3, config.context_dilations)


def expand_units(vocoder: UnitVocoder, codes: Tensor, speaker: Tensor | None, n_units: int | None) -> Tensor:
    """Codes (B, T), speakers (B,) -> (B, C, T): convolutions over the reduced units, expanded to frames. The
    context of a unit so does not depend on durations: predicted ones are never quite the real ones."""
    units, index, since, until = deduplicate(codes, n_units)
    x = vocoder.unit_context(vocoder.conv_pre(vocoder.embed(units, speaker)))  # (B, C, U)
    x = x.gather(2, index[:, None].expand(-1, x.shape[1], -1))  # (B, C, U) -> (B, C, T)
    since = vocoder.since(since.clamp(max=MAX_POSITION - 1))  # (B, T, C)
    until = vocoder.until(until.clamp(max=MAX_POSITION - 1))
    return x + (since + until).transpose(1, 2)


def deduplicate(codes: Tensor, n_units: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (B, T) -> the reduced units (B, U), rows with fewer padded with their last; and for each frame,
    (B, T), the index of its unit, the number of frames since that began, and the number until it ends.

    [7, 7, 3, 9, 9, 9] -> [7, 3, 9], [0, 0, 1, 2, 2, 2], [0, 1, 0, 0, 1, 2], [1, 0, 0, 2, 1, 0]
    U: the longest row of this batch; on several ranks n_units, the longest of the whole step's."""
    begins = torch.ones_like(codes)
    begins[:, 1:] = codes[:, 1:] != codes[:, :-1]
    index = begins.cumsum(1) - 1
    units = codes[:, -1:].repeat(1, n_units or int(index.max()) + 1).scatter(1, index, codes)
    lengths = torch.zeros_like(units).scatter_add(1, index, torch.ones_like(codes))
    first = lengths.cumsum(1) - lengths  # (B, U), the first frame of each unit
    since = torch.arange(codes.shape[1], device=codes.device) - first.gather(1, index)
    until = lengths.gather(1, index) - 1 - since
    return units, index, since, until


def round_keeping_sum(frames: Tensor) -> Tensor:
    """Durations (U,) as whole numbers of at least 1 whose running sum is that of `frames`, rounded. Rounding
    each alone would make hurried speech of many units of 1.4 frames."""
    rounded = []
    used = 0
    for end in frames.cumsum(0).tolist():  # what one unit is rounded off, the next ones get
        rounded.append(max(1, round(end) - used))
        used += rounded[-1]
    return torch.tensor(rounded, device=frames.device)


def frame_parameters(vocoder: UnitVocoder) -> list[nn.Parameter]:
    """Parameters used by `frame_features` (the frame-rate half)."""
    names = ("dict", "spkr", "conv_pre", "unit_context", "since", "until", "context")
    return [p for name in names if hasattr(vocoder, name) for p in getattr(vocoder, name).parameters()]


class FrameSpectrum(nn.Module):
    """Frame features (B, C, T) -> log-mel spectrogram (B, 80, 2 T), one column every 10 ms. For training: the
    frame-rate half learns alone, from whole recordings, at a seventh of the cost of generating samples."""

    N_FFT = 640  # of `log_mel`, so the hop is 160: twice a frame
    N_MELS = 80

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv1d(channels, 2 * self.N_MELS, 1)
        nn.init.constant_(self.proj.bias, -5.0)  # about the mean of speech

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(F.leaky_relu(x.float(), SLOPE)).unflatten(1, (2, -1))  # (B, 2, 80, T)
        return x.permute(0, 2, 3, 1).flatten(2)  # (B, 80, T, 2) -> (B, 80, 2 T)

    @classmethod
    def target(cls, wav: Tensor) -> Tensor:
        """Target log-mel of waveforms (B, T * 320): (B, 80, 2 T)."""
        return log_mel(wav, cls.N_FFT, cls.N_MELS)

    def loss(self, x: Tensor, target: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
        """Mean absolute error over the first `lengths` (B,) frames of each row; `total` as for durations."""
        inside = torch.arange(target.shape[2], device=target.device) < 2 * lengths[:, None]  # (B, 2 T)
        errors = (self(x) - target).abs().mean(1)  # (B, 80, 2 T) -> (B, 2 T)
        return (errors * inside).sum() / (2 * (total or lengths.sum()))


def spectral_loss(fake: Tensor, real: Tensor, sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)) -> Tensor:
    """The mel loss averaged over several windows, where HiFi-GAN has one: long ones resolve harmonics, short
    ones onsets. A small generator with minutes to learn gains from them."""
    losses = [mel_loss(fake, real, size, min(80, size * 5 // 32)) for size in sizes]
    return sum(losses) / len(sizes)
