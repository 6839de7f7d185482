"""Unit vocoder: discrete speech units -> waveform (paper §4.1, "Unit Vocoder").

    codes (T,)  --look-up table, speaker embedding beside every frame-->  (T, 2E)  --conv_pre-->
        five times: [ transposed convolution x5 x4 x4 x2 x2, mean of residual blocks ]  --conv_post, tanh-->  (320 T,)

A HiFi-GAN whose mel input is replaced by an embedding of the units. Units arrive without repetitions ("reduced"),
so a small convolutional predictor first says for how many 20 ms frames each of them lasts:

    units [7, 3, 9], frames [2, 1, 3]  ->  codes [7, 7, 3, 9, 9, 9]  ->  6 * 320 = 1920 samples at 16 kHz

It learns against two kinds of discriminators: one looks at every p-th sample (periods), one at smoothed copies of
the wave (scales). The losses are free functions; `train_vocoder.py` puts them together.

A vocoder on disk is a folder: `config.json` and one file of weights, ours (`generator.safetensors`) or the released
one (`g_00500000`, often renamed `vocoder.pt`). The names of the tensors are the same in both.

References: Kong et al. 2020 (HiFi-GAN, arXiv:2010.05646); Polyak et al. 2021 (speech from discrete units,
arXiv:2104.00355); Ren et al. 2021 (FastSpeech 2: the duration predictor, arXiv:2006.04558); Mao et al. 2017 (LSGAN).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import checkpoint
from files import read_json, write_json

SLOPE = 0.1  # of every leaky ReLU but the generator's last


@dataclass
class VocoderConfig:
    """The keys of the released config.json; the defaults are its values. Our own additions come last."""

    num_embeddings: int = 1000  # K, the number of units
    embedding_dim: int = 128
    model_in_dim: int = 128  # embedding_dim, twice that with a speaker
    multispkr: bool | str | None = None  # the released family writes a file-name rule here, or leaves it out
    num_speakers: int = 200
    embedder_params: dict | None = None  # or speakers are outside vectors of "embedder_dim" numbers
    f0: bool = False
    resblock: str = "1"  # HiFi-GAN's two kinds of residual block
    upsample_rates: tuple[int, ...] = (5, 4, 4, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 8, 8, 4, 4)
    upsample_initial_channel: int = 512
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    dur_predictor_params: dict | None = field(
        default_factory=lambda: {
            "encoder_embed_dim": 128,
            "var_pred_hidden_dim": 128,
            "var_pred_kernel_size": 3,
            "var_pred_dropout": 0.5,
        }
    )
    code_hop_size: int = 320  # samples a frame: 20 ms
    sampling_rate: int = 16000
    # ours, for small models; None and () are HiFi-GAN as published
    upsample_channels: tuple[int, ...] | None = None  # after each upsampling; None halves them every time
    unit_dilations: tuple[
        int, ...
    ] = ()  # residual convolutions over the units, before they are given their durations
    context_dilations: tuple[int, ...] = ()  # and at the frame rate, where width is cheap
    running_durations: bool = False  # round predicted durations so that their sum stays

    def __post_init__(self):
        rates, kernels, inputs = self.upsample_rates, self.upsample_kernel_sizes, self.embedding_dim
        inputs *= 2 if self.speakers else 1
        for problem, message in (
            (
                self.f0,
                "f0 is true, but this vocoder reads units (and a speaker) only; take one trained without f0",
            ),
            (
                len(rates) != len(kernels) or any(k < u or (k - u) % 2 for u, k in zip(rates, kernels)),
                f"upsample_kernel_sizes {kernels} must be one for each of the upsample_rates {rates}, "
                "larger by an even number",
            ),
            (
                math.prod(rates) != self.code_hop_size,
                f"upsample_rates {rates} multiply to {math.prod(rates)}, but code_hop_size is {self.code_hop_size}",
            ),
            (
                len(self.channels) != len(rates) + 1,
                f"upsample_channels {self.upsample_channels} must be one for each of the upsample_rates {rates}",
            ),
            (self.resblock not in ("1", "2"), f'resblock is {self.resblock!r}; it must be "1" or "2"'),
            (
                len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes),
                f"resblock_dilation_sizes must be one list for each of the kernels {self.resblock_kernel_sizes}",
            ),
            (
                not all(
                    type(d) is int and 1 <= d <= 1000 for d in (*self.unit_dilations, *self.context_dilations)
                ),
                f"unit_dilations {self.unit_dilations} and context_dilations {self.context_dilations} must be whole "
                "numbers of 1 to 1000",
            ),
            (
                self.model_in_dim != inputs,
                f"model_in_dim is {self.model_in_dim}, but embeddings of "
                f"{self.embedding_dim} (units{', speaker' * self.speakers}) make {inputs}",
            ),
            (
                (self.dur_predictor_params or {}).get("var_pred_kernel_size", 3) != 3,
                "var_pred_kernel_size must be 3, to keep one duration a unit",
            ),
        ):
            if problem:
                raise ValueError(f"vocoder config: {message}")

    @property
    def speakers(self) -> bool:
        return bool(self.multispkr or self.embedder_params)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels after conv_pre and after each upsampling."""
        first = self.upsample_initial_channel
        return (first, *(self.upsample_channels or (first >> i + 1 for i in range(len(self.upsample_rates)))))


# ------------------------------------------------------------------------------------------------- generator


def same_conv(c_in: int, c_out: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(c_in, c_out, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


class ResBlock(nn.Module):
    """For each dilation: kind "1" x + conv(lrelu(dilated conv(lrelu(x)))), kind "2" x + dilated conv(lrelu(x))."""

    def __init__(self, kind: str, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        dilated = nn.ModuleList(same_conv(channels, channels, kernel, d) for d in dilations)
        if kind == "1":
            self.convs1, self.convs2 = (
                dilated,
                nn.ModuleList(same_conv(channels, channels, kernel) for _ in dilations),
            )
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

    def __init__(
        self,
        encoder_embed_dim: int,
        var_pred_hidden_dim: int,
        var_pred_kernel_size: int = 3,
        var_pred_dropout: float = 0.5,
    ):
        super().__init__()
        width, kernel = var_pred_hidden_dim, var_pred_kernel_size
        self.conv1 = nn.Sequential(same_conv(encoder_embed_dim, width, kernel), nn.ReLU())
        self.ln1 = nn.LayerNorm(width)
        self.conv2 = nn.Sequential(same_conv(width, width, kernel), nn.ReLU())
        self.ln2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)
        self.dropout = var_pred_dropout

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = norm(conv(x.transpose(1, 2)).transpose(1, 2))  # (B, U, E) -> (B, E, U) -> (B, U, width)
            x = F.dropout(x, self.dropout, self.training)
        return self.proj(x).squeeze(-1)


def runs(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (B, T) -> the reduced units (B, U), where rows with fewer end in their last one again; and of each frame,
    (B, T), which of the units it belongs to, the frames since that began, and those until it ends.

    [7, 7, 3, 9, 9, 9] -> [7, 3, 9], [0, 0, 1, 2, 2, 2], [0, 1, 0, 0, 1, 2], [1, 0, 0, 2, 1, 0]"""
    begins = torch.ones_like(codes)
    begins[:, 1:] = codes[:, 1:] != codes[:, :-1]
    index = begins.cumsum(1) - 1
    units = codes[:, -1:].repeat(1, int(index.max()) + 1).scatter(1, index, codes)
    lengths = torch.zeros_like(units).scatter_add(1, index, torch.ones_like(codes))
    since = torch.arange(codes.shape[1], device=codes.device) - (lengths.cumsum(1) - lengths).gather(1, index)
    return units, index, since, lengths.gather(1, index) - 1 - since


class UnitVocoder(nn.Module):
    LONGEST = 8  # frames of a unit that are told apart, see `since`

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        widths, dim = config.channels, config.embedding_dim
        self.dict = nn.Embedding(config.num_embeddings, dim)
        if config.embedder_params:
            self.spkr = nn.Linear(config.embedder_params.get("embedder_dim", 256), dim)
        elif config.speakers:
            self.spkr = nn.Embedding(config.num_speakers, dim)
        self.conv_pre = same_conv(config.model_in_dim, widths[0], 7)
        if config.unit_dilations:
            self.unit_context = ResBlock("2", widths[0], 3, config.unit_dilations)
            self.since, self.until = (nn.Embedding(self.LONGEST, widths[0]) for _ in range(2))
            nn.init.zeros_(self.since.weight)
            nn.init.zeros_(self.until.weight)
        if config.context_dilations:
            self.context = ResBlock("2", widths[0], 3, config.context_dilations)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(
                c_in, c_out, kernel, rate, padding=(kernel - rate) // 2
            )  # T -> exactly T * rate
            for c_in, c_out, rate, kernel in zip(
                widths, widths[1:], config.upsample_rates, config.upsample_kernel_sizes
            )
        )
        self.resblocks = nn.ModuleList(  # one of each kernel size after every upsampling, in this order
            ResBlock(config.resblock, channels, kernel, dilations)
            for channels in widths[1:]
            for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
        )
        self.conv_post = same_conv(widths[-1], 1, 7)
        if config.dur_predictor_params:
            self.dur_predictor = DurationPredictor(**config.dur_predictor_params)

    def frames(self, codes: Tensor, speaker: Tensor | None = None) -> Tensor:
        """Codes (B, T), speakers (B,) -> what is to be heard in each frame, (B, C, T): the half before upsampling.

        With unit_dilations the reduced units are understood first, among their neighbours, whatever their durations:
        predicted ones are never quite those of real speech. Then each is laid out over its frames."""
        if self.config.unit_dilations:
            units, index, *place = runs(codes)
            since, until = (frames.clamp(max=self.LONGEST - 1) for frames in place)
            x = self.unit_context(self.conv_pre(self.symbols(units, speaker)))  # (B, C, U)
            x = x.gather(2, index[:, None].expand(-1, x.shape[1], -1))  # -> (B, C, T)
            x = x + (self.since(since) + self.until(until)).transpose(1, 2)
        else:
            x = self.conv_pre(self.symbols(codes, speaker))
        return self.context(x) if self.config.context_dilations else x

    def symbols(self, codes: Tensor, speaker: Tensor | None) -> Tensor:
        """The embedding of each code, and beside it the speaker's, if there are several: (B, E or 2 E, T)."""
        x = self.dict(codes).transpose(1, 2)  # (B, T, E) -> (B, E, T)
        if self.config.speakers:
            assert speaker is not None, "a multi-speaker vocoder needs a speaker for each row"
            voice = self.spkr(speaker).unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, E) -> (B, E, T)
            x = torch.cat([x, voice], 1)
        return x

    def frame_parameters(self) -> list[nn.Parameter]:
        """Those of `frames`."""
        names = ("dict", "spkr", "conv_pre", "unit_context", "since", "until", "context")
        return [p for name in names if hasattr(self, name) for p in getattr(self, name).parameters()]

    def generate(self, codes: Tensor, speaker: Tensor | None = None, margin: int = 0) -> Tensor:
        """Frames (B, T), one code every 20 ms, and speakers (B,) -> waveforms (B, T * 320) in [-1, 1].

        With a margin, the first and the last `margin` frames are only looked at: (B, (T - 2 * margin) * 320)."""
        x = self.frames(codes, speaker)
        x = x[..., margin : x.shape[2] - margin]
        per_stage = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))  # (B, C, T) -> (B, C', T * rate)
            x = sum(block(x) for block in self.resblocks[i * per_stage : (i + 1) * per_stage]) / per_stage
        x = F.leaky_relu(x, 0.01)  # not SLOPE: the released weights were trained so
        return torch.tanh(self.conv_post(x)).squeeze(1)  # (B, 1, T * 320) -> (B, T * 320)

    def duration_loss(self, units: Tensor, durations: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of log(frames + 1) over the units (B, U) where `mask` is True."""
        predicted = self.dur_predictor(self.dict(units))
        return F.mse_loss(predicted[mask], torch.log(durations[mask] + 1.0))

    @torch.no_grad()
    def durations(self, units: Tensor) -> Tensor:
        """Frames for each of the reduced units (U,), at least one; halves round to even. Rounded each for itself, or
        (running_durations) so that the sum is right: many units of 1.4 frames would make hurried speech."""
        frames = torch.exp(self.dur_predictor(self.dict(units[None]))[0].float()) - 1
        if not self.config.running_durations:
            return torch.clamp(torch.round(frames), min=1).long()
        whole, used = [], 0
        for end in frames.cumsum(0).tolist():  # what one unit is rounded off, the next ones get
            whole.append(max(1, round(end) - used))
            used += whole[-1]
        return torch.tensor(whole, device=units.device)

    @torch.no_grad()
    def forward(
        self, units: list[int], speaker: int | Tensor | None = None, durations: list[int] | None = None
    ) -> Tensor:
        """Reduced units -> waveform (N,), float32 at 16 kHz; N = 320 * (sum of the frames of each unit).

        `durations` are the frames of each unit, predicted if None. `speaker` is a number (None: 0), or a vector
        where the vocoder was trained on outside speaker embeddings. Negative units are dropped, as officially.
        """
        where = self.dict.weight.device
        if durations is not None and len(durations) != len(units):
            raise ValueError(f"{len(units)} units but {len(durations)} durations; give one for each unit")
        kept = [i for i, unit in enumerate(units) if unit >= 0]
        if not kept:
            raise ValueError("there are no units to speak")
        codes = torch.tensor([units[i] for i in kept], device=where)
        if codes.max() >= self.config.num_embeddings:
            raise ValueError(
                f"unit {codes.max()} is unknown: this vocoder has {self.config.num_embeddings}; "
                "take units and vocoder of the same model"
            )
        if durations is not None:
            frames = torch.tensor([durations[i] for i in kept], device=where)
        elif hasattr(self, "dur_predictor"):
            frames = self.durations(codes)
        else:
            raise ValueError("this vocoder has no duration predictor; give durations (frames of each unit)")
        codes = codes.repeat_interleave(frames)  # (U,) -> (T,)
        return self.generate(codes[None], self.voice(speaker)).squeeze(0).float()

    def voice(self, speaker: int | Tensor | None) -> Tensor | None:
        """What `generate` wants for one row: None, (1,) or (1, embedder_dim)."""
        where = self.dict.weight.device
        if not self.config.speakers:
            return None
        if self.config.embedder_params:
            if not isinstance(speaker, Tensor) or speaker.shape != (self.spkr.in_features,):
                raise ValueError(f"this vocoder needs a speaker vector of {self.spkr.in_features} numbers")
            return speaker[None].to(self.dict.weight)
        number = int(speaker or 0)
        if not 0 <= number < self.config.num_speakers:
            raise ValueError(f"speaker {number} is unknown: they are 0 to {self.config.num_speakers - 1}")
        return torch.tensor([number], device=where)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> "UnitVocoder":
        """From a folder with config.json and one file of weights, ours or the released; float32."""
        config, tensors, source = read_folder(Path(folder))
        vocoder = cls(config)
        checkpoint.assign(vocoder, tensors, source, dtype=torch.float32)
        return vocoder.to(device or "cpu").eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}
        checkpoint.save_tensors(folder / "generator.safetensors", tensors)
        write_json(folder / "config.json", dataclasses.asdict(self.config))


class FrameSpectrum(nn.Module):
    """`UnitVocoder.frames` (B, C, T) -> a log mel spectrogram (B, 80, 2 T), a window every 10 ms.

    Only for training, and ours: it lets the frame-rate half learn by itself, from whole recordings and without the
    samples, which cost seven times as much. What is said is settled there; the rest only has to make it sound."""

    N_FFT, N_MELS = 640, 80  # of `log_mel`, hop 160: twice a frame

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Conv1d(channels, 2 * self.N_MELS, 1)
        nn.init.constant_(self.proj.bias, -5.0)  # about the mean of speech

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(F.leaky_relu(x.float(), SLOPE)).unflatten(1, (2, -1))  # (B, 2, 80, T)
        return x.permute(0, 2, 3, 1).flatten(2)

    @classmethod
    def of(cls, wav: Tensor) -> Tensor:
        """What it should say of recordings (B, T * 320): (B, 80, 2 T)."""
        return log_mel(wav, cls.N_FFT, cls.N_MELS)

    def loss(self, x: Tensor, wanted: Tensor, lengths: Tensor) -> Tensor:
        """Mean absolute error against `of` the recordings, of which the first `lengths` (B,) frames count."""
        inside = torch.arange(wanted.shape[2], device=wanted.device) < 2 * lengths[:, None]
        return (self(x) - wanted).abs().mean(1)[inside].mean()


# -------------------------------------------------------------------------------------------- discriminators


class PeriodDiscriminator(nn.Module):
    """Folds the wave into rows of `period` samples and convolves along each column: every p-th sample."""

    def __init__(self, period: int, channels: tuple[int, ...]):
        super().__init__()
        self.period = period
        strides = (3,) * (len(channels) - 1) + (1,)
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c_in, c_out, (5, 1), (stride, 1), padding=(2, 0)))
            for c_in, c_out, stride in zip((1, *channels), channels, strides)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        wav = F.pad(wav[:, None], (0, -wav.shape[1] % self.period), "reflect")
        x = wav.unflatten(2, (-1, self.period))  # (B, 1, N) -> (B, 1, N / p, p)
        return score_and_maps(x, self.convs, self.conv_post)


class ScaleDiscriminator(nn.Module):
    """Strided, grouped convolutions along the wave; each layer is (channels, kernel, stride, groups)."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], norm):
        super().__init__()
        widths = (1, *(layer[0] for layer in layers))
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(c_in, c_out, kernel, stride, groups=groups, padding=(kernel - 1) // 2))
            for c_in, (c_out, kernel, stride, groups) in zip(widths, layers)
        )
        self.conv_post = norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        return score_and_maps(wav[:, None], self.convs, self.conv_post)


def score_and_maps(x: Tensor, convs: nn.ModuleList, conv_post: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The score at every place, (B, places), and what each layer saw: the feature maps."""
    maps = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        maps.append(x)
    x = conv_post(x)
    return x.flatten(1), [*maps, x]


class MultiPeriodDiscriminator(nn.Module):
    """Waveforms (B, N) -> a list of (score, feature maps), one for each period."""

    def __init__(
        self,
        periods: tuple[int, ...] = (2, 3, 5, 7, 11),
        channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(p, channels) for p in periods)

    def forward(self, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [discriminator(wav) for discriminator in self.discriminators]


class MultiScaleDiscriminator(nn.Module):
    """Waveforms (B, N) -> a list of (score, feature maps): the wave itself, then each time half as fast."""

    def __init__(
        self,
        scales: int = 3,
        layers: tuple[tuple[int, ...], ...] = (
            (128, 15, 1, 1),
            (128, 41, 2, 4),
            (256, 41, 2, 16),
            (512, 41, 4, 16),
            (1024, 41, 4, 16),
            (1024, 41, 1, 16),
            (1024, 5, 1, 1),
        ),
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(
            ScaleDiscriminator(layers, weight_norm if i else spectral_norm) for i in range(scales)
        )

    def forward(self, wav: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        results = []
        for i, discriminator in enumerate(self.discriminators):
            if i:
                wav = F.avg_pool1d(wav[:, None], 4, 2, padding=2).squeeze(1)
            results.append(discriminator(wav))
        return results


# ---------------------------------------------------------------------------------------------------- losses


@lru_cache
def mel_filters(rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Tensor:
    """Slaney's triangles (n_mels, n_fft // 2 + 1): linear below 1 kHz, logarithmic above, all of area one."""
    step = math.log(6.4) / 27
    to_mel = lambda hz: hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step  # noqa: E731
    mels = torch.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2, dtype=torch.float64)
    hz = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    low, centre, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def log_mel(
    wav: Tensor,
    n_fft: int = 1024,
    n_mels: int = 80,
    rate: int = 16000,
    fmin: float = 0.0,
    fmax: float | None = None,
) -> Tensor:
    """Waveforms (B, N) -> HiFi-GAN's log mel spectrogram (B, n_mels, N // hop); windows of n_fft, hop a quarter."""
    hop = n_fft // 4
    wav = F.pad(wav[:, None], ((n_fft - hop) // 2,) * 2, "reflect").squeeze(1)
    window = torch.hann_window(n_fft, device=wav.device)
    spectrum = torch.view_as_real(
        torch.stft(wav, n_fft, hop, window=window, center=False, return_complex=True)
    )
    magnitudes = torch.sqrt(spectrum.square().sum(-1) + 1e-9)  # (B, n_fft // 2 + 1, frames)
    filters = mel_filters(rate, n_fft, n_mels, fmin, fmax or rate / 2).to(wav.device)
    return torch.log(torch.clamp(filters @ magnitudes, min=1e-5))


def mel_loss(fake: Tensor, real: Tensor, n_fft: int = 1024, n_mels: int = 80) -> Tensor:
    """Mean absolute difference of the log mel spectrograms."""
    return F.l1_loss(log_mel(fake, n_fft, n_mels), log_mel(real, n_fft, n_mels))


def spectral_loss(fake: Tensor, real: Tensor, sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128)) -> Tensor:
    """The mel loss, mean over several windows: long ones see harmonics, short ones when a sound begins.

    HiFi-GAN has one window only. With a generator that is small and has minutes to learn, several teach it faster.
    """
    return sum(mel_loss(fake, real, size, min(80, size * 5 // 32)) for size in sizes) / len(sizes)


def discriminator_loss(real: list, fake: list) -> Tensor:
    """LSGAN: scores of real speech towards 1, of the generator's towards 0, summed over discriminators."""
    return sum((r - 1).pow(2).mean() + f.pow(2).mean() for (r, _), (f, _) in zip(real, fake))


def adversarial_loss(fake: list) -> Tensor:
    """LSGAN, the generator's side: its scores towards 1."""
    return sum((f - 1).pow(2).mean() for f, _ in fake)


def feature_loss(real: list, fake: list) -> Tensor:
    """L1 between what each layer of each discriminator sees in real speech and in the generator's."""
    return sum(
        F.l1_loss(f, r.detach()) for (_, reals), (_, fakes) in zip(real, fake) for r, f in zip(reals, fakes)
    )


# ----------------------------------------------------------------------------------------------- weight files

WEIGHT_FILES = ("generator.safetensors", "vocoder.pt", "g_*")
# Names in the files are those of the modules above:
#   dict.weight  spkr.weight [spkr.bias]  conv_pre.*  ups.I.*  conv_post.*
#   unit_context.convs.N.*  since.weight  until.weight  context.convs.N.*  (ours)
#   resblocks.N.convs1.J.*  resblocks.N.convs2.J.*  (resblock "1")     resblocks.N.convs.J.*  (resblock "2")
#   dur_predictor.{conv1.0, ln1, conv2.0, ln2, proj}.*
# but the released file keeps the generator's convolutions as length and direction; torch has two spellings:
WEIGHT_NORM = {
    ".weight_g": ".weight_v",
    ".parametrizations.weight.original0": ".parametrizations.weight.original1",
}


def read_folder(folder: Path) -> tuple[VocoderConfig, dict[str, Tensor], str]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; a vocoder is a folder of config.json and weights")
    found = sorted(path for name in WEIGHT_FILES for path in folder.glob(name))
    if len(found) != 1:
        raise ValueError(
            f"{folder}: found {', '.join(p.name for p in found) or 'no weights'}; keep exactly one of "
            f"{', '.join(WEIGHT_FILES)}"
        )
    config = read_config(folder / "config.json")
    tensors = checkpoint.read_tensors(found[0])  # of the released {"generator": {...}}, what is inside
    return config, fold_weight_norm(tensors, str(found[0])), str(found[0])


def read_config(path: Path) -> VocoderConfig:
    """Keys that say how it was trained (batch_size, mel settings, data) are passed over."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a vocoder config (a JSON object of settings)")
    if table.get("multistyle") or table.get("f0_quant_num_bin"):
        raise ValueError(f"{path}: wants style or f0 inputs; this vocoder reads units (and a speaker)")
    names = {field.name for field in dataclasses.fields(VocoderConfig)}
    known = {key: tuplify(value) for key, value in table.items() if key in names}
    known.setdefault("dur_predictor_params", None)  # a file without the key has no duration predictor
    try:
        return VocoderConfig(**known)
    except TypeError as problem:
        raise ValueError(f"{path}: a setting has the wrong type ({problem})") from None


def tuplify(value):
    return tuple(tuplify(item) for item in value) if isinstance(value, list) else value


def fold_weight_norm(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Each pair g, v becomes the weight g * v / ||v||, the norm over all dimensions but the first.

    For a transposed convolution, stored (in, out, kernel), that is one length for each INPUT channel.
    """
    folded = dict(tensors)
    for name in tensors:
        for length, direction in WEIGHT_NORM.items():
            if name.endswith(length):
                stem = name.removesuffix(length)
                if stem + direction not in tensors:
                    raise ValueError(f"{source}: {name} has no partner {stem + direction}")
                g, v = folded.pop(name), folded.pop(stem + direction)
                norm = v.float().norm(dim=tuple(range(1, v.ndim)), keepdim=True)
                folded[stem + ".weight"] = g.float() * v.float() / norm
    return folded
