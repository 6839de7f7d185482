"""kmeans.py: MFCCs have the properties of MFCCs; clusters and units as scikit-learn's; nothing lost by
dedup."""

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from test_hubert import speech

from kmeans import KMeans, dedup, expand, mfcc


def test_mfcc():
    wav = 10 * speech(2)[None]
    x = mfcc(wav)
    torch.testing.assert_close(x.mean(1), torch.zeros(1, 39), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(1, 39), atol=2e-2, rtol=0)
    raw, louder = mfcc(wav, cmvn=False), mfcc(4 * wav, cmvn=False)
    # loudness is the first coefficient alone: log 16 in each of 26 bands, times sqrt(2 / 26)
    torch.testing.assert_close(
        louder[..., 0] - raw[..., 0], torch.full((1, 99), np.log(16) * 52**0.5), atol=1, rtol=0
    )
    torch.testing.assert_close(louder[..., 1:], raw[..., 1:], atol=0.3, rtol=0)
    torch.testing.assert_close(
        raw[:, 2:-2, 13:26] * 10, (raw[:, 3:-1] - raw[:, 1:-3] + 2 * (raw[:, 4:] - raw[:, :-4]))[..., :13]
    )
    assert torch.equal(
        mfcc(wav[:, : 400 + 320 * 5], cmvn=False)[:, :4, :13], raw[:, :4, :13]
    )  # causal frames
    # different pitches, same cepstrum more or less; a high and a low band of noise: not at all
    noise = torch.fft.rfft(torch.randn(1, 16000, generator=torch.Generator().manual_seed(0)))
    low, high = noise.clone(), noise.clone()
    low[:, 2000:], high[:, :4000] = 0, 0
    c_low, c_high = (mfcc(torch.fft.irfft(s), cmvn=False)[..., 1].mean() for s in (low, high))
    assert c_low > 5 > -5 > c_high


def test_kmeans_predicts_as_sklearn(tmp_path):
    x = np.random.default_rng(0).normal(size=(3000, 13)).astype(np.float32)
    theirs = MiniBatchKMeans(25, random_state=0, n_init=1).fit(x)
    joblib.dump(theirs, tmp_path / "x_km25.bin")
    ours = KMeans.from_pretrained(tmp_path / "x_km25.bin")
    assert torch.equal(ours.predict(torch.from_numpy(x)), torch.from_numpy(theirs.predict(x)).long())
    assert ours.predict(torch.from_numpy(x).view(3, 1000, 13)).shape == (3, 1000)
    ours.save(tmp_path)
    assert torch.equal(KMeans.from_pretrained(tmp_path).centers, ours.centers)
    assert KMeans(torch.tensor([[1.0], [1.0], [-1.0]])).predict(torch.tensor([[2.0], [0.0]])).tolist() == [
        0,
        0,
    ]


def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    centers = torch.randn(8, 5) * 10
    truth = torch.arange(4000) % 8
    km = KMeans.fit(centers[truth] + torch.randn(4000, 5), 8, seed=1)
    got = km.predict(centers[truth])
    assert len({(a, b) for a, b in zip(truth.tolist(), got.tolist())}) == 8
    assert torch.equal(
        KMeans.fit(centers[truth], 8, seed=1).centers, KMeans.fit(centers[truth], 8, seed=1).centers
    )
    with pytest.raises(ValueError, match="3 frames of speech cannot make 8 clusters"):
        KMeans.fit(torch.randn(3, 5), 8)


def test_embeddings_keep_the_distances_of_the_centers():
    torch.manual_seed(0)
    centers = torch.randn(30, 5) * torch.tensor([1.0, 9.0, 2.0, 4.0, 0.5]) + 7
    kmeans = KMeans(centers)
    for dim in (5, 8):  # as many numbers as a center has, or more: all distances stay, but for one scale
        places = kmeans.embeddings(dim)
        assert places.shape == (30, dim)
        ratio = torch.pdist(places) / torch.pdist(centers)
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
        assert torch.allclose(places.mean(0), torch.zeros(dim), atol=1e-5)
        assert places.std() == pytest.approx(1, rel=1e-4)
    two = kmeans.embeddings(2)  # fewer: what differs most
    assert abs(torch.corrcoef(torch.stack([two[:, 0], centers[:, 1]]))[0, 1]) > 0.97
    assert abs(torch.corrcoef(torch.stack([two[:, 1], centers[:, 3]]))[0, 1]) > 0.9


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_dedup_then_expand_is_the_identity(frames):
    units, durations = dedup(frames)
    assert expand(units, durations) == frames
    assert all(a != b for a, b in zip(units, units[1:])) and min(durations) >= 1
    assert dedup(torch.tensor(frames)) == (units, durations)


def test_dedup_of_the_docstring():
    assert dedup([63, 63, 63, 991, 162, 162]) == ([63, 991, 162], [3, 1, 2])
    assert dedup([]) == ([], [])
