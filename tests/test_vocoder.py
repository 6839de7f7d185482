"""The unit vocoder: lengths, durations, speakers, losses, and the released file against an independent
restatement."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vocoder as v
from vocoder import UnitVocoder, VocoderConfig


def small(**changes) -> VocoderConfig:
    table = dict(
        num_embeddings=20,
        embedding_dim=8,
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=(5, 8, 8),
        upsample_kernel_sizes=(11, 16, 16),
        resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1, 3), (1, 2)),
        dur_predictor_params={
            "encoder_embed_dim": 8,
            "var_pred_hidden_dim": 8,
            "var_pred_kernel_size": 3,
            "var_pred_dropout": 0.5,
        },
    )
    return VocoderConfig(**table | changes)


def make(seed: int = 0, **changes) -> UnitVocoder:
    torch.manual_seed(seed)
    return UnitVocoder(small(**changes)).eval()


SPEAKERS = dict(multispkr=True, num_speakers=3, model_in_dim=16)


# ---- speaking


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resblock": "2"},
        {"context_dilations": (1, 2)},
        SPEAKERS,
        {"upsample_channels": (12, 6, 2)},
        {
            "upsample_rates": (5, 4, 4, 2, 2),
            "upsample_kernel_sizes": (11, 8, 8, 4, 4),
            "upsample_initial_channel": 64,
        },
    ],
)
def test_every_frame_is_320_samples(changes):
    vocoder = make(**changes)
    for frames in (1, 2, 7):
        speaker = torch.zeros(2, dtype=torch.long) if vocoder.config.speakers else None
        wav = vocoder.generate(torch.zeros(2, frames, dtype=torch.long), speaker)
        assert wav.shape == (2, frames * 320) and wav.abs().max() <= 1


def test_durations_say_how_often_each_unit_is_repeated():
    vocoder = make()
    wav = vocoder([3, 9, 4], durations=[2, 1, 3])
    assert wav.shape == (6 * 320,) and wav.dtype == torch.float32
    assert torch.equal(wav, vocoder.generate(torch.tensor([[3, 3, 9, 4, 4, 4]]))[0])


def test_predicted_durations_round_half_to_even_and_are_at_least_one():
    vocoder = make()
    frames = torch.tensor([0.2, 0.5, 1.5, 2.5, 3.5, 7.49])  # what the predictor means
    vocoder.dur_predictor.forward = lambda x: torch.log(frames.double() + 1)[None]
    assert vocoder.durations(torch.arange(6)).tolist() == [1, 1, 2, 2, 4, 7]
    assert vocoder([0, 1, 2, 3, 4, 5]).shape == (17 * 320,)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("log_frames", [20.0, 1e30, math.inf, math.nan])
def test_a_unit_that_would_last_for_hours_is_refused(running, log_frames):
    vocoder = make(running_durations=running)
    vocoder.dur_predictor.forward = lambda x: torch.tensor([[0.5, log_frames, 0.5]])
    with pytest.raises(ValueError, match="a unit would last .* frames: damaged weights"):
        vocoder([1, 2, 3])
    vocoder.dur_predictor.forward = lambda x: torch.tensor([[0.5, math.log(900.0), 0.5]])
    assert len(vocoder([1, 2, 3])) == 320 * (899 + 2)


def test_sound_that_is_not_finite_is_refused():
    vocoder = make()
    vocoder.conv_post.bias.data.fill_(math.nan)  # finite weights can overflow on the way, too
    with pytest.raises(ValueError, match="the vocoder computes NaN"):
        vocoder([1, 2, 3], durations=[1, 1, 1])


def test_speaking_leaves_no_gradient_and_is_the_same_twice():
    vocoder = make()
    first = vocoder([1, 2, 3])
    assert not first.requires_grad and torch.equal(first, vocoder([1, 2, 3]))


def test_negative_units_are_dropped_with_their_durations():
    vocoder = make()
    assert torch.equal(vocoder([3, -1, 4], durations=[1, 5, 2]), vocoder([3, 4], durations=[1, 2]))
    assert torch.equal(vocoder([-1, 3, 4]), vocoder([3, 4]))


def test_the_speaker_is_heard_and_none_is_speaker_0():
    vocoder = make(**SPEAKERS)
    wavs = [vocoder([1, 2, 3], speaker, [2, 2, 2]) for speaker in (None, 0, 1, 2)]
    assert torch.equal(wavs[0], wavs[1])
    assert not torch.allclose(wavs[1], wavs[2]) and not torch.allclose(wavs[2], wavs[3])


def test_speakers_as_outside_vectors():
    vocoder = make(embedder_params={"embedder_dim": 5}, model_in_dim=16)
    a, b = (vocoder([1, 2], torch.randn(5), [1, 1]) for _ in range(2))
    assert not torch.allclose(a, b)
    with pytest.raises(ValueError, match="speaker vector of 5 numbers"):
        vocoder([1, 2], 0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m([]), "no units"),
        (lambda m: m([-1]), "no units"),
        (lambda m: m([20]), "unit 20 is unknown"),
        (lambda m: m([1, 2], durations=[1]), "2 units but 1 durations"),
        (lambda m: m([1], 3), "speaker 3 is unknown"),
        (lambda m: m([1], -1), "speaker -1 is unknown"),
    ],
)
def test_mistakes_in_a_call_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(make(**SPEAKERS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"f0": True}, "f0"),
        ({"upsample_rates": (5, 8, 4)}, "multiply to 160"),
        ({"model_in_dim": 9}, "make 8"),
        ({"upsample_kernel_sizes": (11, 16)}, "one for each"),
        ({"upsample_kernel_sizes": (11, 15, 16)}, "even number"),
        ({"resblock": "3"}, "resblock"),
        ({"resblock_kernel_sizes": (3,)}, "resblock_dilation_sizes"),
        ({"upsample_channels": (8,)}, "upsample_channels"),
        (
            {
                "dur_predictor_params": {
                    "encoder_embed_dim": 8,
                    "var_pred_hidden_dim": 8,
                    "var_pred_kernel_size": 5,
                }
            },
            "3",
        ),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


# ---- the released files


class Reference(nn.Module):
    """The released generator stated again, from formats.md alone, with torch's weight norm left on."""

    def __init__(self, c: VocoderConfig, norm):
        super().__init__()
        up, kernels = c.upsample_rates, c.upsample_kernel_sizes
        ch = [c.upsample_initial_channel >> i for i in range(len(up) + 1)]
        self.c = c
        self.dict = nn.Embedding(c.num_embeddings, c.embedding_dim)
        if c.multispkr:
            self.spkr = nn.Embedding(c.num_speakers, c.embedding_dim)
        self.conv_pre = norm(nn.Conv1d(c.model_in_dim, ch[0], 7, padding=3))
        self.ups = nn.ModuleList(
            norm(nn.ConvTranspose1d(ch[i], ch[i + 1], kernels[i], up[i], (kernels[i] - up[i]) // 2))
            for i in range(len(up))
        )
        self.resblocks = nn.ModuleList()
        for i in range(len(up)):
            for k, ds in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes):
                block = nn.Module()
                block.convs1 = nn.ModuleList(
                    norm(nn.Conv1d(ch[i + 1], ch[i + 1], k, dilation=d, padding=(k * d - d) // 2)) for d in ds
                )
                block.convs2 = nn.ModuleList(
                    norm(nn.Conv1d(ch[i + 1], ch[i + 1], k, padding=(k - 1) // 2)) for _ in ds
                )
                self.resblocks.append(block)
        self.conv_post = norm(nn.Conv1d(ch[-1], 1, 7, padding=3))
        d = self.dur_predictor = nn.Module()
        width = c.dur_predictor_params.var_pred_hidden_dim
        d.conv1 = nn.Sequential(nn.Conv1d(c.embedding_dim, width, 3, padding=1), nn.ReLU())
        d.ln1 = nn.LayerNorm(width)
        d.conv2 = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU())
        d.ln2 = nn.LayerNorm(width)
        d.proj = nn.Linear(width, 1)
        for (
            name,
            p,
        ) in self.named_parameters():  # lengths unlike the directions' norms, and a sound that is not tiny
            p.data.uniform_(0.8, 1.6) if name.endswith(("_g", "original0")) else p.data.normal_(std=0.3)
        d.proj.bias.data.fill_(1.2)  # some units last longer than one frame

    def forward(self, units, speaker=None):
        x = self.dict(torch.tensor(units))[None]
        d = self.dur_predictor
        y = d.ln1(d.conv1(x.transpose(1, 2)).transpose(1, 2))
        y = d.ln2(d.conv2(y.transpose(1, 2)).transpose(1, 2))
        frames = torch.clamp(torch.round(torch.exp(d.proj(y)[0, :, 0]) - 1), min=1).long()
        x = torch.repeat_interleave(x, frames, dim=1).transpose(1, 2)
        if speaker is not None:
            x = torch.cat([x, self.spkr(torch.tensor([speaker]))[:, :, None].repeat(1, 1, x.shape[2])], 1)
        x = self.conv_pre(x)
        n = len(self.c.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            total = 0
            for block in self.resblocks[i * n : i * n + n]:
                y = x
                for a, b in zip(block.convs1, block.convs2):
                    y = y + b(F.leaky_relu(a(F.leaky_relu(y, 0.1)), 0.1))
                total = total + y
            x = total / n
        return torch.tanh(self.conv_post(F.leaky_relu(x))).flatten()


RELEASED = {
    "resblock": "1",
    "num_gpus": 0,
    "batch_size": 16,
    "learning_rate": 0.0002,
    "adam_b1": 0.8,
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": 30,
    "embedding_dim": 8,
    "model_in_dim": 8,
    "segment_size": 8960,
    "code_hop_size": 320,
    "f0": False,
    "num_mels": 80,
    "n_fft": 1024,
    "hop_size": 256,
    "win_size": 1024,
    "dur_prediction_weight": 1.0,
    "sampling_rate": 16000,
    "dur_predictor_params": {
        "encoder_embed_dim": 8,
        "var_pred_hidden_dim": 8,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
    "fmin": 0,
    "fmax": 8000,
    "fmax_for_loss": None,
    "dist_config": {"dist_backend": "nccl"},
}


def released(folder, norm=torch.nn.utils.weight_norm, file="g_00500000", **changes) -> Reference:
    torch.manual_seed(1)
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    config = v.read_config(folder / "config.json")
    reference = Reference(config, norm).eval()
    torch.save({"generator": reference.state_dict()}, folder / file)
    return reference


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize(
    "file, changes",
    [
        ("g_00500000", {}),
        ("vocoder.pt", {}),
        ("g_00400000", dict(multispkr="path", num_speakers=4, model_in_dim=16)),
    ],
)
def test_a_released_file_sounds_as_its_restatement(tmp_path, norm, file, changes):
    reference = released(tmp_path, norm, file, **changes)
    vocoder = UnitVocoder.from_pretrained(tmp_path)
    assert not any("_g" in name or "original" in name for name in vocoder.state_dict())  # folded
    units = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    speaker = 2 if changes else None
    with torch.no_grad():
        expected = reference(units, speaker)
    assert 0.01 < expected.std() < 0.9 and len(expected) > 40 * 320  # neither silent nor stuck at 1
    assert (vocoder(units, speaker) - expected).abs().max() < 1e-4


def test_the_default_config_is_the_released_one():
    shapes = {name: tuple(t.shape) for name, t in UnitVocoder(VocoderConfig()).state_dict().items()}
    assert shapes["dict.weight"] == (1000, 128) and shapes["conv_pre.weight"] == (512, 128, 7)
    assert shapes["ups.0.weight"] == (512, 256, 11) and shapes["ups.4.weight"] == (32, 16, 4)
    assert shapes["resblocks.14.convs2.2.weight"] == (16, 16, 11) and shapes["conv_post.weight"] == (1, 16, 7)
    assert shapes["dur_predictor.conv2.0.weight"] == (128, 128, 3)
    lengths = sum(
        shape[0]
        for name, shape in shapes.items()  # weight norm stores one more number a row
        if name.endswith("weight") and len(shape) == 3 and not name.startswith("dur")
    )
    assert sum(math.prod(shape) for shape in shapes.values()) + lengths == 13_485_443


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_key_table_is_strict(tmp_path):
    tensors = released(tmp_path).state_dict()
    for change, message in [
        (lambda t: t.pop("ups.1.bias"), "ups.1.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop("conv_pre.weight_v"), "conv_pre.weight_g has no partner"),
        (lambda t: t.update({"conv_post.bias": torch.zeros(2)}), "conv_post.bias"),
        (
            lambda t: t.update({"conv_pre.weight_g": torch.ones(1, 8, 1)}),
            r"conv_pre.weight_g \[1, 8, 1\] is no length",
        ),
        (lambda t: t.update({"conv_pre.weight_g": torch.ones(())}), r"conv_pre.weight_g \[\] is no length"),
        (lambda t: t["conv_pre.weight_v"].zero_(), "conv_pre.weight holds NaN"),
    ]:
        bad = dict(tensors)
        change(bad)
        torch.save({"generator": bad}, tmp_path / "g_00500000")
        with pytest.raises(ValueError, match=message) as caught:
            UnitVocoder.from_pretrained(tmp_path)
        assert "g_00500000" in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"f0": True}, "f0"),
        ({"f0_quant_num_bin": 32}, "f0"),
        ({"multistyle": "x"}, "style"),
        ({"embedding_dim": 7}, "model_in_dim"),
        ({"upsample_rates": "fast"}, "config"),
        ({"sampling_rate": 24000}, "sampling_rate: must be 16000"),
        ({"resblock_kernel_sizes": [3, 7, 10]}, "must be odd"),
        ({"upsample_initial_channel": 16}, "halved"),
        (
            {"dur_predictor_params": {"encoder_embed_dim": 9, "var_pred_hidden_dim": 8}},
            "encoder_embed_dim must be",
        ),
        ({"dur_predictor_params": {"encoder_embed_dim": 8, "var_pred_hiden_dim": 8}}, "did you mean"),
        ({"code_vq_params": {"k": 2}}, "unknown key 'code_vq_params'"),
    ],
)
def test_a_released_config_that_cannot_be_read_is_refused(tmp_path, changes, message):
    released(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | changes))
    with pytest.raises(ValueError, match=message) as caught:
        UnitVocoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_or_with_two_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        UnitVocoder.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / "vocoder.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="exactly one"):
        UnitVocoder.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_without_a_duration_predictor_durations_must_be_given(tmp_path):
    make(dur_predictor_params=None).save_pretrained(tmp_path)
    vocoder = UnitVocoder.from_pretrained(tmp_path)
    assert vocoder([1, 2], durations=[3, 4]).shape == (7 * 320,)
    with pytest.raises(ValueError, match="give durations"):
        vocoder([1, 2])


def test_saved_and_loaded_is_the_same(tmp_path):
    vocoder = make(context_dilations=(1, 2), **SPEAKERS)
    vocoder.save_pretrained(tmp_path / "full")
    again = UnitVocoder.from_pretrained(tmp_path / "full")
    assert torch.equal(again([1, 2, 3], 1), vocoder([1, 2, 3], 1)) and again.config == vocoder.config
    vocoder.save_pretrained(tmp_path / "half", torch.float16)
    half = UnitVocoder.from_pretrained(tmp_path / "half")
    assert half.dict.weight.dtype == torch.float32
    assert torch.allclose(half([1, 2], 1, [3, 3]), vocoder([1, 2], 1, [3, 3]), atol=1e-2)
    size = [(tmp_path / kind / "generator.safetensors").stat().st_size for kind in ("full", "half")]
    assert size[1] < 0.7 * size[0]


# ---- losses and discriminators


def test_duration_loss_ignores_padding_and_reaches_the_embedding():
    vocoder = make()
    units, durations = torch.randint(0, 20, (2, 6)), torch.randint(1, 5, (2, 6))
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    durations[~mask] = 0  # padding
    loss = vocoder.duration_loss(units, durations)
    predicted = vocoder.dur_predictor(vocoder.dict(units))
    expected = np.mean(
        [
            (predicted[b, i].item() - math.log(durations[b, i].item() + 1)) ** 2
            for b in range(2)
            for i in range(6)
            if mask[b, i]
        ]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    in_parts = [vocoder.duration_loss(units[b : b + 1], durations[b : b + 1], total=9) for b in range(2)]
    assert sum(in_parts).item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    assert vocoder.dict.weight.grad.abs().sum() > 0


def test_discriminators_score_every_place_and_show_their_feature_maps():
    periods = v.MultiPeriodDiscriminator((2, 3), (4, 8))
    scales = v.MultiScaleDiscriminator(3, ((4, 15, 1, 1), (8, 41, 4, 4)))
    wav = torch.randn(2, 1001)
    results = periods(wav) + scales(wav)
    assert len(results) == 5
    for score, maps in results:
        assert score.shape[0] == 2 and score.ndim == 2
        assert len(maps) == 3 and torch.equal(maps[-1].flatten(1), score)  # two layers and the score
    assert results[0][1][0].shape == (2, 4, 167, 2)  # ceil(1001 / 2) rows of 2, every third
    assert [maps[0].shape[2] for _, maps in results[2:]] == [1001, 501, 251]  # each scale half as fast


def test_a_period_discriminator_sees_only_every_pth_sample():
    d = v.PeriodDiscriminator(5, (4, 4))
    wav = torch.randn(1, 500, requires_grad=True)
    d(wav)[1][-2][..., 2].sum().backward()  # a feature map's third column
    assert set(wav.grad[0].nonzero().flatten().tolist()) <= set(range(2, 500, 5))


def test_adversarial_losses_are_those_of_lsgan():
    real, fake = (
        [(torch.tensor([[1.0, 0.5]]), [torch.ones(3)])],
        [(torch.tensor([[0.0, 0.5]]), [torch.zeros(3)])],
    )
    assert v.discriminator_loss(real, fake).item() == pytest.approx((0 + 0.25) / 2 + (0 + 0.25) / 2)
    assert v.adversarial_loss(fake).item() == pytest.approx((1 + 0.25) / 2)
    assert v.feature_loss(real, fake).item() == pytest.approx(1.0)


def numpy_log_mel(wav: np.ndarray) -> np.ndarray:
    """Restated: frames of 1024 every 256, reflected edges, Hann, Slaney's mel scale with area-one
    triangles."""
    x = np.pad(wav, 384, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([x[s : s + 1024] * window for s in range(0, len(x) - 1023, 256)])
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9)

    def to_hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = [to_hz(top * i / 81) for i in range(82)]
    bank = np.zeros((80, 513))
    for m in range(80):
        lo, mid, hi = edges[m : m + 3]
        for k in range(513):
            f = k * 16000 / 1024
            up, down = (f - lo) / (mid - lo), (hi - f) / (hi - mid)
            bank[m, k] = max(0, min(up, down)) * 2 / (hi - lo)
    return np.log(np.maximum(bank @ magnitude.T, 1e-5))


def test_log_mel_equals_a_numpy_restatement():
    rng = np.random.default_rng(0)
    t = np.arange(4000) / 16000
    wav = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * rng.standard_normal(4000)
    ours = v.log_mel(torch.tensor(wav, dtype=torch.float32)[None])[0].numpy()
    reference = numpy_log_mel(wav)
    assert ours.shape == reference.shape == (80, 15)
    assert np.abs(ours - reference).max() < 1e-3
    assert v.log_mel(torch.zeros(1, 4000)).max().item() == pytest.approx(math.log(1e-5))  # silence is finite


def test_spectral_losses_are_zero_on_the_truth_and_have_finite_gradients_on_silence():
    real = torch.randn(2, 4096)
    assert v.spectral_loss(real, real).item() == 0 and v.mel_loss(real, real).item() == 0
    assert v.spectral_loss(0.5 * real, real) > 0.1
    for target in (real, torch.zeros(2, 4096)):
        fake = torch.zeros(2, 4096, requires_grad=True)
        (v.spectral_loss(fake, target) + v.mel_loss(fake, target)).backward()
        assert torch.isfinite(fake.grad).all()


def test_a_margin_is_seen_and_not_spoken():
    vocoder = make(context_dilations=(1, 2, 4))  # sees 3 + 7 frames on either side
    codes = torch.randint(0, 10, (2, 40))
    with torch.no_grad():
        whole, middle = vocoder.generate(codes), vocoder.generate(codes, margin=10)
        blind = vocoder.generate(codes[:, 10:-10])
    assert middle.shape == (2, 20 * 320)
    hop = (
        7 * 320
    )  # the upsampling itself reaches less than seven frames: beyond them the middle of the whole is spoken
    assert torch.allclose(middle[:, hop:-hop], whole[:, 10 * 320 + hop : -10 * 320 - hop], atol=1e-5)
    assert (
        blind[:, hop:-hop] - middle[:, hop:-hop]
    ).abs().max() > 1e-4  # without it the surroundings are missed


def test_the_loss_of_the_frame_spectrum_excludes_padding():
    torch.manual_seed(0)
    spectrum, x = v.FrameSpectrum(8), torch.randn(2, 8, 12)
    target, lengths = spectrum.target(torch.randn(2, 12 * 320)), torch.tensor([12, 7])
    assert spectrum(x).shape == (2, 80, 24) == target.shape
    loss = spectrum.loss(x, target, lengths)
    beyond = target.clone()
    beyond[1, :, 14:] = 0
    assert torch.equal(spectrum.loss(x, beyond, lengths), loss)
    beyond[1, :, 13] = 0
    assert not torch.equal(spectrum.loss(x, beyond, lengths), loss)
    errors = (spectrum(x) - target).abs()
    expected = (errors[0].sum() + errors[1, :, :14].sum()) / (80 * (24 + 14))
    assert torch.allclose(loss, expected)
    in_parts = [
        spectrum.loss(x[b : b + 1], target[b : b + 1], lengths[b : b + 1], total=19) for b in range(2)
    ]
    assert torch.allclose(sum(in_parts), loss)


def test_running_durations_keep_the_sum():
    torch.manual_seed(0)
    sizes = dict(
        num_embeddings=10,
        embedding_dim=8,
        model_in_dim=8,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        upsample_initial_channel=32,
        resblock="2",
        dur_predictor_params={"encoder_embed_dim": 8, "var_pred_hidden_dim": 8},
    )
    for running, expected in ((False, [1] * 10), (True, [1, 2, 1, 2, 1, 1, 2, 1, 2, 1])):
        speaker = UnitVocoder(v.VocoderConfig(**sizes, running_durations=running)).eval()
        nn.init.zeros_(speaker.dur_predictor.proj.weight)
        nn.init.constant_(speaker.dur_predictor.proj.bias, math.log(1.4 + 1))  # 1.4 frames each
        assert speaker.durations(torch.arange(10)).tolist() == expected
    nn.init.constant_(speaker.dur_predictor.proj.bias, math.log(0.2 + 1))
    assert speaker.durations(torch.arange(10)).tolist() == [1] * 10  # never none


def test_runs_are_the_reduced_units_and_the_places_of_their_frames():
    units, index, since, until = v.deduplicate(torch.tensor([[7, 7, 3, 9, 9, 9], [4, 4, 4, 4, 4, 4]]))
    assert units.tolist() == [[7, 3, 9], [4, 4, 4]]
    assert index.tolist() == [[0, 0, 1, 2, 2, 2], [0] * 6]
    assert v.deduplicate(torch.tensor([[7, 7, 3]]), n_units=4)[0].tolist() == [[7, 3, 3, 3]]
    assert since.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert until.tolist() == [[1, 0, 0, 2, 1, 0], [5, 4, 3, 2, 1, 0]]


def test_units_are_understood_whatever_their_durations():
    torch.manual_seed(0)
    small = v.VocoderConfig(
        num_embeddings=10,
        embedding_dim=8,
        model_in_dim=16,
        multispkr=True,
        num_speakers=2,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        upsample_initial_channel=32,
        resblock="2",
        unit_dilations=(1, 2),
        dur_predictor_params=None,
    )
    speaker, units = UnitVocoder(small).eval(), [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.no_grad():
        one = speaker.frame_features(torch.tensor([units]), torch.tensor([1]))  # (1, C, 8)
        durations = torch.tensor([2, 1, 3, 1, 1, 2, 9, 1])
        long = speaker.frame_features(
            torch.tensor(units).repeat_interleave(durations)[None], torch.tensor([1])
        )
        assert torch.allclose(
            long, one.repeat_interleave(durations, 2), atol=1e-5
        )  # places are zero before training
        nn.init.normal_(speaker.since.weight)
        placed = speaker.frame_features(
            torch.tensor(units).repeat_interleave(durations)[None], torch.tensor([1])
        )
        assert (placed - long).std(2).min() > 0
        other = speaker.frame_features(torch.tensor([units[:-1] + [7]]), torch.tensor([1]))
    assert not torch.allclose(other[..., -2], one[..., -2])  # a neighbor matters
    half, names = {id(p) for p in v.frame_parameters(speaker)}, ("unit_context", "since", "until")
    assert all(id(p) in half for name, p in speaker.named_parameters() if name.startswith(names))


@pytest.mark.parametrize("key", ["unit_dilations", "context_dilations"])
@pytest.mark.parametrize("value", [[0], [-1], ["2"], [1.5], [10**9], 3])
def test_impossible_dilations_are_one_line(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match="dilations"):
        v.read_config(tmp_path / "config.json")
