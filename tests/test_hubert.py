"""hubert.py: equal to transformers and fairseq's layout on tiny random weights; exact batches, pieces and
units."""

import argparse
import copy
import pickle
import sys
import time
import types
from dataclasses import replace
from functools import partial

import joblib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

import hubert
from hubert import (
    FeatureExtractor,
    HuBERT,
    HuBERTConfig,
    KMeans,
    UnitExtractor,
    dedup,
    n_frames,
    span_mask,
)
from hubert_formats import to_hugging_face
from kmeans import expand, mfcc

TINY = HuBERTConfig(
    conv_dim=(16, 16, 24, 24, 32, 32, 32),
    dim=32,
    n_layers=3,
    n_heads=4,
    ffn_dim=64,
    pos_kernel=16,
    pos_groups=4,
    proj_dim=16,
)
LARGE = replace(TINY, extractor_norm="layer", pre_norm=True, conv_bias=True)  # HuBERT large's arrangement
BOTH = pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        LARGE,
        replace(TINY, conv_bias=True),
        replace(LARGE, standardize_wav=True),
        replace(TINY, standardize_wav=True, pos_kernel=15),
    ],
    ids=["group-post", "layer-pre", "group-bias", "large", "group-standardize"],
)


def randomized(cfg: HuBERTConfig, seed: int = 0) -> HuBERT:
    """Every parameter random, so that a forgotten bias or norm shows."""
    torch.manual_seed(seed)
    model = HuBERT(cfg).eval()
    for name, p in model.named_parameters():
        p.data.add_(torch.randn_like(p) * (0.02 if name.startswith("feature_extractor") else 0.1))
    return model


def speech(seconds: float, seed: int = 0) -> torch.Tensor:
    """Something with pauses, loudness and pitch that change: (N,)."""
    g = torch.Generator().manual_seed(seed)
    n = int(seconds * 16000)
    loud = F.interpolate(torch.rand(1, 1, int(seconds * 8) + 2, generator=g), n, mode="linear")[0, 0] ** 2
    pitch = F.interpolate(80 + 120 * torch.rand(1, 1, int(seconds * 3) + 2, generator=g), n, mode="linear")[
        0, 0
    ]
    phase = (pitch * (2 * torch.pi / 16000)).cumsum(0)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20))
    return 0.1 * loud * tone + 0.02 * loud * torch.randn(n, generator=g) + 0.003


def hf_model(cfg: HuBERTConfig):
    from transformers import HubertConfig, HubertModel

    table = {k: v for k, v in to_hugging_face(cfg).items() if k not in ("architectures", "model_type")}
    theirs = HubertModel(
        HubertConfig(**table, hidden_dropout=0, attention_dropout=0, activation_dropout=0)
    ).eval()
    torch.manual_seed(1)
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return theirs


def extractor(cfg: HuBERTConfig = TINY, k: int = 20, layer: int = 2) -> UnitExtractor:
    model = randomized(cfg)
    with torch.no_grad():
        x = model.features(speech(6)[None], layer)[0]
    return UnitExtractor(model, KMeans.fit(x, k), layer)


# ---- the encoder


@BOTH
def test_hidden_states_equal_those_of_transformers(cfg, tmp_path):
    theirs = hf_model(cfg)
    theirs.save_pretrained(tmp_path)
    ours = HuBERT.from_pretrained(tmp_path)
    wav = torch.stack([speech(1.3, 1), speech(1.3, 2)])
    with torch.no_grad():
        standardized = wav if not cfg.standardize_wav else F.layer_norm(wav, wav.shape[1:])
        want = theirs(standardized, output_hidden_states=True)
        got = ours.hidden_states(wav)
        if cfg.pre_norm:  # what transformers puts out last has the final norm
            got[-1] = ours.encoder.layer_norm(got[-1])
    assert len(got) == len(want.hidden_states) == cfg.n_layers + 1
    for a, b in zip(got, [*want.hidden_states[:-1], want.last_hidden_state]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert want.last_hidden_state.std() > 0.1  # not equal because both are nothing


@BOTH
def test_what_we_save_loads_in_transformers(cfg, tmp_path):
    from transformers import HubertModel

    ours = randomized(replace(cfg, n_classes=7))
    ours.save_pretrained(tmp_path)
    theirs, report = HubertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    wav = speech(1.1)[None]
    with torch.no_grad():
        standardized = wav if not cfg.standardize_wav else F.layer_norm(wav, wav.shape[1:])
        got = theirs.eval()(standardized).last_hidden_state
        want = ours.features(wav, cfg.n_layers)
        want = ours.encoder.layer_norm(want) if cfg.pre_norm else want
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    again = HuBERT.from_pretrained(tmp_path)
    assert replace(again.config, proj_dim=cfg.proj_dim) == cfg
    torch.testing.assert_close(again.features(wav, 2), ours.features(wav, 2), atol=1e-5, rtol=0)


@given(st.integers(400, 5000))
@settings(max_examples=30, deadline=None)
def test_number_of_frames(n):
    model = _ONE.setdefault("model", randomized(TINY))
    assert model.features(torch.randn(1, n), 1).shape == (1, n_frames(n), TINY.dim)
    assert mfcc(torch.randn(2, n)).shape == (2, n_frames(n), 39)


_ONE: dict = {}


def test_number_of_frames_of_known_lengths():
    assert [n_frames(n) for n in (400, 719, 720, 16000, 160000, 1_600_000)] == [1, 1, 2, 49, 499, 4999]


def test_a_layer_does_not_need_the_layers_above(tmp_path):
    model = randomized(TINY)
    model.save_pretrained(tmp_path)
    low = HuBERT.from_pretrained(tmp_path, n_layers=2)
    assert len(low.encoder.layers) == 2 and low.config.n_layers == 2
    wav = speech(1)[None]
    assert torch.equal(low.features(wav, 2), model.features(wav, 2))
    for layer in model.encoder.layers[2:]:  # and does not run them
        layer.forward = None
    model.features(wav, 2)
    with pytest.raises(ValueError, match="layer 4 asked for"):
        HuBERT.from_pretrained(tmp_path, n_layers=4)


@BOTH
def test_pieces_and_gradients_give_the_same_features(cfg):
    """Without gradients the convolutions run two seconds at a time, with them at once."""
    model, wav = randomized(cfg), speech(5.003)[None]
    with torch.no_grad():
        pieces = model.features(wav, 3)
    torch.testing.assert_close(pieces, model.features(wav, 3).detach(), atol=2e-5, rtol=0)


@BOTH
def test_padded_batch_equals_one_by_one(cfg):
    model = randomized(cfg)
    wavs = [speech(s, i) for i, s in enumerate((1.0, 0.3, 2.345, 0.025))]
    padded = torch.nn.utils.rnn.pad_sequence(
        wavs, batch_first=True, padding_value=9.0
    )  # padding changes nothing
    if cfg.standardize_wav or cfg.extractor_norm == "group":
        assert not torch.allclose(
            model.features(padded, 3)[0, :49], model.features(wavs[0][None], 3)[0], atol=1e-2
        )
    batch = model.features(padded, 3, torch.tensor([len(w) for w in wavs]))
    for wav, row in zip(wavs, batch):
        alone = model.features(wav[None], 3)[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        replace(TINY, conv_bias=True),
        LARGE,
        replace(LARGE, conv_bias=False),
        replace(TINY, conv_dim=(160,) * 7),
    ],
    ids=["group", "group-bias", "layer-bias", "layer", "wide"],  # wide: channels are not last in memory
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_feature_extractor_equals_the_plain_one(cfg, dtype):
    """Of recordings one by one, of a padded batch, in pieces of two seconds, and (float64) its gradients."""
    fast = randomized(cfg).feature_extractor.to(dtype)
    plain = FeatureExtractor(cfg).to(dtype)
    plain.load_state_dict(fast.state_dict())
    assert fast.channels_last == (cfg.conv_dim[0] != 160)
    wavs = [speech(seconds, i).to(dtype) for i, seconds in enumerate((4.123, 5.003, 0.3, 0.025))]
    lengths = torch.tensor([len(wav) for wav in wavs])
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True, padding_value=9.0)
    folded = fast.fold(padded, lengths)
    at_once = fast(padded, folded)
    with torch.no_grad():
        in_pieces = fast(padded, folded)
    total = 0
    for i, wav in enumerate(wavs):
        want = plain(wav[None])[0]
        assert want.shape == (n_frames(len(wav)), cfg.conv_dim[-1]) and want.std() > 0.01
        alone = fast(wav[None], fast.fold(wav[None]))[0]
        for got in (alone, at_once[i], in_pieces[i]):
            torch.testing.assert_close(got[: len(want)], want, atol=2e-5, rtol=1e-4)
        total = total + want.square().sum() - at_once[i, : len(want)].square().sum()
    if dtype == torch.float32:  # sums over seconds of sound: they differ by the order of addition
        return
    total.backward()  # gradients of one minus those of the other
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters()):
        if name != "conv_layers.0.conv.bias" or cfg.extractor_norm == "layer":  # group norm removes that bias
            torch.testing.assert_close(a.grad, -b.grad, atol=1e-6, rtol=1e-6)


def test_group_norm_in_the_weights_has_the_gradients_of_group_norm():
    model, wav = randomized(TINY), torch.stack([speech(0.5, 1), speech(0.5, 2)])
    layer = model.feature_extractor.conv_layers[0]
    plain = copy.deepcopy(layer)
    want = plain.layer_norm(F.conv1d(wav[:, None], plain.conv.weight, stride=5)).transpose(1, 2)
    weight, bias = model.feature_extractor.fold(wav)
    got = torch.baddbmm(bias, wav.unfold(1, 10, 5), weight)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    signal = torch.randn(got.shape)
    (got * signal).sum().backward()
    (want * signal).sum().backward()
    for a, b in zip(layer.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-3, rtol=1e-3)


def test_silence_gives_numbers():
    for cfg in (TINY, LARGE, replace(LARGE, standardize_wav=True)):
        assert torch.isfinite(randomized(cfg).features(torch.zeros(1, 4000), 3)).all()
    assert torch.isfinite(mfcc(torch.zeros(1, 4000))).all()


# ---- training


def test_span_mask():
    mask = span_mask(400, 99, prob=0.08, span=10, generator=torch.Generator().manual_seed(0))
    assert 0.5 < mask.float().mean() < 0.62  # 8 starts x 10 frames of 99, overlaps away
    assert mask.any(1).all() and not mask.all(1).any()
    for row in mask[:50].tolist():  # every run of masked frames is a whole span or more
        runs = dedup([int(masked) for masked in row])
        assert all(n >= 10 for masked, n in zip(*runs) if masked)
    assert mask[:, :10].float().mean() > 0.2 and mask[:, -10:].float().mean() > 0.2  # the ends too
    assert torch.equal(mask, span_mask(400, 99, 0.08, 10, torch.Generator().manual_seed(0)))
    assert not torch.equal(mask, span_mask(400, 99, 0.08, 10, torch.Generator().manual_seed(1)))
    assert span_mask(5, 3).any(1).all() and span_mask(1, 1).all()
    with pytest.raises(AssertionError, match="0.8 x 10 masks nearly all"):
        span_mask(2, 99, prob=0.8, span=10)


def mean_loss(model: HuBERT, *batch, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean loss, accuracy on the masked frames)."""
    total, weight, correct, n_masked = model.masked_losses(*batch, **options)
    return total / weight, correct / n_masked


@pytest.mark.parametrize("cfg", [TINY, LARGE])
def test_masked_loss_counts_masked_frames_only(cfg):
    model = randomized(replace(cfg, n_classes=11))
    wav = torch.stack([speech(1, 1), speech(1, 2)])
    labels, mask = torch.randint(0, 11, (2, 49)), span_mask(2, 49)
    loss, accuracy = mean_loss(model, wav, labels, mask)
    other = torch.where(mask, labels, (labels + 1) % 11)
    assert mean_loss(model, wav, other, mask)[0] == loss
    assert mean_loss(model, wav, torch.where(mask, (labels + 1) % 11, labels), mask)[0] != loss
    assert mean_loss(model, wav, torch.where(mask, labels, -1), mask)[0] == loss
    assert mean_loss(model, wav, other, mask, unmasked_weight=0.5)[0] != loss
    assert 0 <= accuracy <= 1
    total, weight, _, n = model.masked_losses(wav, labels, mask, unmasked_weight=0.5)
    seen = model.masked_losses(wav, labels, mask, unmasked_weight=1.0)[0] - loss * n
    torch.testing.assert_close(total, loss * n + 0.5 * seen)
    assert weight == n + 0.5 * (labels.numel() - n) and n == mask.sum()
    # eq. 3 in full: cosines of every frame with every codeword, over 0.1
    x = model.hidden_states(wav, mask=mask)[-1]
    x = model.encoder.layer_norm(x) if cfg.pre_norm else x
    logits = torch.cosine_similarity(model.final_proj(x)[:, :, None], model.label_embs, dim=-1) / 0.1
    torch.testing.assert_close(loss, F.cross_entropy(logits[mask], labels[mask]))
    # a masked frame's own sound is gone: its feature is the mask's, wherever the sound goes
    quiet = model.hidden_states(wav, 0, mask=torch.ones_like(mask))[0]
    loud = model.hidden_states(wav.flip(1), 0, mask=torch.ones_like(mask))[0]
    assert torch.equal(quiet, loud)


@pytest.mark.parametrize("cfg", [TINY, LARGE])
def test_masked_prediction_learns(cfg):
    torch.manual_seed(0)
    wav = torch.stack([speech(1, i) for i in range(6)])
    labels = KMeans.fit(mfcc(wav).flatten(0, 1), 6).predict(mfcc(wav))
    model = HuBERT(replace(cfg, n_classes=6))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss, _ = mean_loss(model, wav, labels, span_mask(6, 49))
        optimizer.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None
            for n, p in model.named_parameters()
            if n != "encoder.layer_norm.bias"
            and not n.startswith("feature_extractor.conv_layers.0.conv.bias")
        )
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2, losses


# ---- units


@BOTH
@pytest.mark.parametrize("smooth", [1, 3])
def test_units_of_a_batch_are_those_of_one_by_one(cfg, smooth):
    unit = extractor(cfg)
    unit.smooth = smooth
    batches, features = [], unit.model.features
    unit.model.features = lambda wav, *rest: batches.append(wav.shape) or features(wav, *rest)
    wavs = [speech(s, i) for i, s in enumerate((1.0, 0.3, 2.345, 0.025, 1.7, 1.71))]
    batch = hubert.units_by_batches(unit, wavs, seconds=4)
    assert max(size for size, _ in batches) > 1  # not one by one
    one_by_one = [unit.frame_units(wav) for wav in wavs]
    assert [len(b) for b in batch] == [n_frames(len(w)) for w in wavs]
    differing = sum((a != b).sum().item() for a, b in zip(batch, one_by_one))
    assert differing <= 1  # a frame exactly between two clusters may fall to either
    assert len(set(torch.cat(one_by_one).tolist())) > 5
    units, durations = unit(wavs[2].numpy())
    assert expand(units, durations) == one_by_one[2].tolist()


@pytest.mark.parametrize("cfg", [TINY, replace(LARGE, standardize_wav=True)], ids=["group", "large"])
def test_chunks_agree_with_one_pass(cfg):
    torch.manual_seed(0)
    model, wav = HuBERT(cfg).eval(), speech(30.01)
    wav[: 16000 * 10] *= 0.1  # chunks differ in loudness, so statistics of their own would show
    x = model.features(wav[None], 2)[0].detach()
    unit = UnitExtractor(model, KMeans.fit(x, 20), 2)
    whole = unit.frame_units(wav)
    assert torch.equal(whole, unit.kmeans.predict(x)) and len(whole) == 1500
    unit.CHUNK, unit.CONTEXT, lengths, forward = 500, 125, [], model.encoder.forward
    model.encoder.forward = lambda x, *rest: lengths.append(x.shape[1]) or forward(x, *rest)
    chunked = unit.frame_units(wav)
    assert lengths == [625, 750, 625]  # memory is that of a chunk
    assert len(chunked) == 1500 and (chunked == whole).float().mean() >= 0.98


@pytest.mark.parametrize("cfg", [TINY, replace(LARGE, standardize_wav=True)], ids=["group", "large"])
def test_official_chunks(cfg):
    unit = extractor(cfg)
    unit.OFFICIAL = 16000
    for extra in (0, 399, 400, 5000):
        wav = speech(2 + extra / 16000)[: 32000 + extra]
        whole = F.layer_norm(wav, wav.shape) if cfg.standardize_wav else wav
        unit.model.config = replace(cfg, standardize_wav=False)
        pieces = [whole[:16000], whole[16000:32000]] + ([whole[32000:]] if extra >= 400 else [])
        want = torch.cat([unit.frame_units(piece) for piece in pieces])
        unit.model.config = cfg
        got = unit.frame_units(wav, official=True)
        assert torch.equal(got, want) and len(got) == 2 * 49 + (n_frames(extra) if extra >= 400 else 0)
        assert unit(wav, official=True) == dedup(want)
    assert UnitExtractor.OFFICIAL == 1_600_000


def test_bad_recordings_are_one_line():
    unit = extractor()
    for wav, why in (
        (torch.zeros(399), "399 samples"),
        (torch.zeros(0), "0 samples"),
        (np.zeros(1), "1 samples"),
        (torch.zeros(2, 16000), "one channel"),
        (torch.full((4000,), float("nan")), "NaN"),
        (np.full(4000, np.inf), "NaN or infinity"),
    ):
        for call in (unit, unit.frame_units, lambda w: hubert.units_by_batches(unit, [w])):
            with pytest.raises(ValueError, match=why) as caught:
                call(wav)
            assert "\n" not in str(caught.value)


def test_our_folder(tmp_path):
    unit, wav = extractor(), speech(2)
    unit.save_pretrained(tmp_path)
    again = UnitExtractor.from_pretrained(tmp_path)
    assert again.layer == 2 and len(again.model.encoder.layers) == 2 and not again.training
    assert torch.equal(again.frame_units(wav), unit.frame_units(wav))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json",
        "kmeans.safetensors",
        "model.safetensors",
        "units.json",
    ]
    (tmp_path / "units.json").write_text('{"layer": "two"}')
    with pytest.raises(ValueError, match="units.json"):
        UnitExtractor.from_pretrained(tmp_path)


# ---- other people's files


class Dictionary:
    """As in fairseq.data.dictionary: what makes torch refuse the file."""

    def __init__(self):
        self.symbols, self.count, self.indices, self.nspecial = ["<s>", "a"], [1, 1], {"<s>": 0, "a": 1}, 1


def fairseq_file(model: HuBERT, path, monkeypatch, cfg="cfg"):
    """Written by hand after formats.md: the names spelled out, the classes of fairseq, the optimizer's
    state."""
    c, ours, theirs = model.config, model.state_dict(), {}

    def put(name, source):
        theirs[name] = ours[source].clone()

    for i in range(7):
        put(f"feature_extractor.conv_layers.{i}.0.weight", f"feature_extractor.conv_layers.{i}.conv.weight")
        for p in ("weight", "bias"):
            if c.conv_bias and p == "bias":
                put(
                    f"feature_extractor.conv_layers.{i}.0.bias",
                    f"feature_extractor.conv_layers.{i}.conv.bias",
                )
            if c.extractor_norm == "layer" or i == 0:
                norm = "2.1" if c.extractor_norm == "layer" else "2"
                put(
                    f"feature_extractor.conv_layers.{i}.{norm}.{p}",
                    f"feature_extractor.conv_layers.{i}.layer_norm.{p}",
                )
    put("mask_emb", "masked_spec_embed")
    put("encoder.pos_conv.0.weight_g", "encoder.pos_conv_embed.conv.weight_g")
    put("encoder.pos_conv.0.weight_v", "encoder.pos_conv_embed.conv.weight_v")
    put("encoder.pos_conv.0.bias", "encoder.pos_conv_embed.conv.bias")
    for p in ("weight", "bias"):
        put(f"layer_norm.{p}", f"feature_projection.layer_norm.{p}")
        put(f"post_extract_proj.{p}", f"feature_projection.projection.{p}")
        put(f"encoder.layer_norm.{p}", f"encoder.layer_norm.{p}")
        for i in range(c.n_layers):
            for n in ("q", "k", "v", "out"):
                put(
                    f"encoder.layers.{i}.self_attn.{n}_proj.{p}", f"encoder.layers.{i}.attention.{n}_proj.{p}"
                )
            put(f"encoder.layers.{i}.self_attn_layer_norm.{p}", f"encoder.layers.{i}.layer_norm.{p}")
            put(f"encoder.layers.{i}.fc1.{p}", f"encoder.layers.{i}.feed_forward.intermediate_dense.{p}")
            put(f"encoder.layers.{i}.fc2.{p}", f"encoder.layers.{i}.feed_forward.output_dense.{p}")
            put(f"encoder.layers.{i}.final_layer_norm.{p}", f"encoder.layers.{i}.final_layer_norm.{p}")
    theirs |= {
        "final_proj.weight": torch.randn(256, c.dim),
        "final_proj.bias": torch.randn(256),
        "label_embs_concat": torch.randn(504, 256),
    }
    settings = {"encoder_attention_heads": c.n_heads, "layer_norm_first": c.pre_norm}
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fairseq.data.dictionary"].Dictionary = Dictionary
    monkeypatch.setattr(Dictionary, "__module__", "fairseq.data.dictionary")
    saved = {
        "args": None,
        "cfg": None,
        "model": theirs,
        "task_state": {"dictionaries": [Dictionary()]},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.randn(5)}}},
        "extra_state": {"epoch": 3},
    }
    if cfg == "cfg":
        saved["cfg"] = {"model": settings, "task": {"normalize": c.standardize_wav, "sample_rate": 16000}}
    elif isinstance(cfg, dict):
        saved["cfg"] = cfg
    elif cfg == "args":
        saved["args"] = argparse.Namespace(**settings, normalize=c.standardize_wav)
    torch.save(saved, path, pickle_protocol=2)
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@BOTH
@pytest.mark.parametrize("where", ["cfg", "args"])
def test_fairseq_file(cfg, where, tmp_path, monkeypatch):
    model = randomized(cfg)
    fairseq_file(model, tmp_path / "mhubert.pt", monkeypatch, where)
    loaded = HuBERT.from_pretrained(tmp_path / "mhubert.pt")
    assert replace(loaded.config, proj_dim=cfg.proj_dim) == cfg
    wav = speech(1)[None]
    torch.testing.assert_close(loaded.features(wav, 3), model.features(wav, 3), atol=1e-5, rtol=0)


def test_fairseq_file_without_settings_is_guessed_from_its_shapes(tmp_path, monkeypatch):
    cfg = replace(LARGE, standardize_wav=True, dim=128, n_heads=2)  # heads of 64, as in every released HuBERT
    fairseq_file(randomized(cfg), tmp_path / "large.pt", monkeypatch, None)
    loaded = HuBERT.from_pretrained(tmp_path / "large.pt").config
    assert (loaded.n_heads, loaded.pre_norm, loaded.standardize_wav, loaded.extractor_norm) == (
        2,
        True,
        True,
        "layer",
    )


@pytest.mark.parametrize(
    "model, task, why",
    [
        ({"conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"}, {}, None),
        (
            {"conv_feature_layers": "[(16, 10, 5), (16, 3, 2)] + [(24, 3, 2)]*3 + [(32,2,2),(32,2,2)]"},
            {},
            None,
        ),
        (
            {"activation_fn": "gelu", "layer_type": "transformer", "dropout": 0.1},
            {"sample_rate": 16000},
            None,
        ),
        (
            {"conv_feature_layers": "[(16,10,4)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"},
            {},
            "it must be 400 every 320",
        ),
        ({"conv_feature_layers": "__import__('os').system('echo')"}, {}, "conv_feature_layers cannot be"),
        ({"activation_fn": "relu"}, {}, "activation_fn is 'relu'; only 'gelu'"),
        ({"layer_type": "conformer"}, {}, "layer_type is 'conformer'"),
        ({"pos_conv_depth": 5}, {}, "pos_conv_depth is 5"),
        ({"layer_norm_first": "yes"}, {}, "key 'pre_norm': expected bool"),
        ({"encoder_attention_heads": 10**30}, {}, "key 'n_heads': must be"),
        ({}, {"sample_rate": 8000}, "sample_rate is 8000; only 16000"),
        ({}, {"normalize": 3}, "key 'standardize_wav': expected bool"),
    ],
)
def test_fairseqs_settings_are_honored_or_refused(model, task, why, tmp_path, monkeypatch):
    settings = {"model": {"encoder_attention_heads": 4} | model, "task": task}
    fairseq_file(randomized(TINY), tmp_path / "x.pt", monkeypatch, settings)
    if why is None:
        assert HuBERT.from_pretrained(tmp_path / "x.pt").config.conv_stride == TINY.conv_stride
        return
    with pytest.raises(ValueError, match=why) as caught:
        HuBERT.from_pretrained(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


def test_features_that_are_nan_are_no_units():
    """Finite weights can overflow on the way: a direction of length 0, for one."""
    unit = extractor()
    unit.model.encoder.pos_conv_embed.conv.weight_v.data[:, :, 3] = 0
    for call in (unit, unit.frame_units, lambda wav: hubert.units_by_batches(unit, [wav, wav])):
        with pytest.raises(ValueError, match="the weights of HuBERT are damaged"):
            call(speech(1))


def test_released_folder(tmp_path, monkeypatch):
    """mhubert .pt beside the joblib k-means, and Hugging Face's files beside it: layer 11 of 12, no final
    norm."""
    cfg = replace(TINY, n_layers=12)
    model, wav = randomized(cfg), speech(1.5)
    x = model.features(wav[None], 11)[0].detach()
    km = SklearnKMeans(10, n_init=1, random_state=0).fit(x.numpy())
    fairseq, hf = tmp_path / "fairseq", tmp_path / "hf"
    for folder in (fairseq, hf):
        folder.mkdir()
        joblib.dump(km, folder / "mhubert_base_vp_en_es_fr_it3_L11_km1000.bin")
    fairseq_file(model, fairseq / "mhubert_base_vp_en_es_fr_it3.pt", monkeypatch)
    model.save_pretrained(hf)
    tensors = {
        n.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): t
        for n, t in model.state_dict().items()
    }
    torch.save(tensors, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    (hf / "preprocessor_config.json").write_text('{"do_normalize": true}')  # wrong for mHuBERT
    want = torch.from_numpy(km.predict(x.numpy())).long()
    for folder in (fairseq, hf):
        unit = UnitExtractor.from_pretrained(folder)
        assert (
            unit.layer == 11
            and len(unit.model.encoder.layers) == 11
            and not unit.model.config.standardize_wav
        )
        assert (unit.frame_units(wav) == want).float().mean() >= 0.98
    assert UnitExtractor.from_pretrained(hf, layer=5).layer == 5


def test_files_that_do_not_fit_are_one_line(tmp_path, monkeypatch):
    unit = extractor()
    unit.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()

    def refused(why, load=UnitExtractor.from_pretrained, path=tmp_path):
        with pytest.raises((ValueError, OSError), match=why) as caught:
            load(path)
        assert "\n" not in str(caught.value)

    for old, new, why in (
        ('"gelu"', '"relu"', "hidden_act|feat_extract_activation"),
        ('"hubert"', '"wav2vec2"', "model_type"),
        ('"hidden_size": 32', '"hidden_size": "big"', "hidden_size"),
        ('"hidden_size": 32', '"hidden_size": 64', "expected"),
        ('"num_hidden_layers": 3', '"num_hidden_layers": 1', "layer 2 asked for"),
        ('"num_hidden_layers": 3', '"num_hidden_layers": 1000000000', "num_hidden_layers: must be 1 to 1000"),
        ('"hidden_size": 32', '"hidden_size": 0', "hidden_size: must be"),
        ('"conv_stride": [', '"conv_stride": ["x", ', "config.json"),
        ('"conv_stride": [', '"conv_stride": [5, ', "a size, a kernel and a stride each"),
        ('"conv_stride": [\n    5', '"conv_stride": [\n    4', "samples every"),
        ('"group"', '"batch"', "extractor_norm must be"),
        ('"num_attention_heads": 4', '"num_attention_heads": 5', "heads"),
    ):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        refused(why)
    (tmp_path / "config.json").write_text(config)
    tensors = dict(unit.model.state_dict())
    del tensors["masked_spec_embed"]
    hubert.checkpoint.save_tensors(tmp_path / "model.safetensors", tensors)
    refused("masked_spec_embed")
    hubert.checkpoint.save_tensors(
        tmp_path / "model.safetensors", unit.model.state_dict() | {"extra": torch.zeros(1)}
    )
    refused("extra")
    unit.save_pretrained(tmp_path)
    KMeans(torch.randn(4, 99)).save(tmp_path)
    refused("different models")
    hubert.checkpoint.save_tensors(tmp_path / "kmeans.safetensors", {"weight": torch.zeros(3)})
    refused("not a k-means")
    refused("missing|no such file|No such file", path=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("found none", path=empty)
    torch.save({"model": {"decoder.weight": torch.zeros(2)}}, empty / "other.pt")
    refused("not a HuBERT of fairseq", path=empty)
    fairseq_file(
        extractor().model, empty / "other.pt", monkeypatch, {"model": {"encoder_attention_heads": "4"}}
    )
    refused("key 'n_heads': expected int", path=empty)


# ---- speed


@pytest.mark.slow
def test_base_is_as_fast_as_transformers():
    """HuBERT base, random weights, all 12 layers, interleaved; run with -s to see the times."""
    from transformers import HubertConfig, HubertModel

    torch.set_num_threads(2)
    ours, theirs = HuBERT(HuBERTConfig()).eval(), HubertModel(HubertConfig()).eval()
    total = {"ours": 0.0, "transformers": 0.0}
    for seconds in (5, 15):
        wav, best = speech(seconds)[None], {}
        with torch.inference_mode():
            for _ in range(6):
                for name, run in (("ours", partial(ours.features, layer=12)), ("transformers", theirs)):
                    start = time.perf_counter()
                    run(wav)
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        total = {name: total[name] + s for name, s in best.items()}
        print(
            {name: f"{s:.3f} s, {seconds / s:.1f} x real time" for name, s in best.items()},
            f"ratio {best['transformers'] / best['ours']:.2f}",
        )
    assert total["ours"] <= total["transformers"]
