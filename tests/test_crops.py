"""data/crops.py: crops are where their labels are, whatever the file, the pace and the rank."""

import numpy as np
import pytest
import soundfile
import torch

from data import audio
from data.augment import Imitation
from data.crops import Recording, crops, imitated, weighted_crops


def hum(seconds: float, rate: int, channels: int) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    wav = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t)
    return np.column_stack([wav * (1 + 0.2 * channel) for channel in range(channels)])


@pytest.mark.parametrize("rate, channels", [(44100, 2), (8000, 1), (16000, 2), (48000, 1)])
def test_crops_hear_what_the_labels_were_made_from(tmp_path, rate, channels):
    """Of a recording at any rate, mono or stereo, they are those of the same sound at 16 kHz, mono."""
    here, there, labels = [], [], []
    for i in range(3):
        here.append(tmp_path / f"{i}.flac")
        soundfile.write(here[i], hum(1.5 + i, rate, channels), rate)
        wav = audio.load(here[i])  # what `map_speech` gives to HuBERT, which gives the labels
        labels.append(np.arange(audio.n_frames(len(wav))))
        there.append(tmp_path / f"{i}.wav")
        soundfile.write(there[i], wav, 16000, subtype="FLOAT")
    for perturb in (0.0, 0.2):
        for step in range(2):
            (one,) = crops(here, labels, 40, 0, 4, 1, perturb=perturb)(step)
            (other,) = crops(there, labels, 40, 0, 4, 1, perturb=perturb)(step)
            assert torch.equal(one.wav, other.wav) and torch.equal(one.labels, other.labels)
            assert one.wav.abs().max() > 0.2


def test_one_stereo_file_among_many_is_as_good_as_the_others(tmp_path):
    paths = [tmp_path / f"{i}.wav" for i in range(6)]
    for i, path in enumerate(paths):
        soundfile.write(path, hum(1.0, 16000, 1 + (i == 4)), 16000)
    labels = [np.arange(49)] * 6
    drawn = [crop for step in range(6) for crop in crops(paths, labels, 20, 0, 6, 1)(step)]
    assert all(crop.wav.shape == (6, 320 * 19 + 400) for crop in drawn)


def test_crops_are_the_frames_their_labels_say(tmp_path):
    rng = np.random.default_rng(0)
    paths, labels = [], []
    for i, n in enumerate((4000, 12000, 30001)):
        frames = (n - 400) // 320 + 1
        wav = np.zeros(n, np.float32)
        for t in range(frames):
            wav[320 * t] = t / 100  # every frame begins with its own number
        paths.append(tmp_path / f"{i}.wav")
        soundfile.write(paths[-1], wav, 16000, subtype="FLOAT")
        labels.append(np.arange(frames))
    for step in range(4):
        for crop in crops(paths, labels, 20, int(rng.integers(9)), 6, 2)(step):
            assert crop.wav.shape == (3, 320 * 19 + 400) and crop.labels.shape == (3, 20)
            assert torch.allclose(crop.wav[:, ::320][:, :20] * 100, crop.labels.float(), atol=1e-4)


@pytest.mark.parametrize("rate, channels, suffix", [(44100, 1, "wav"), (44100, 2, "flac"), (16000, 2, "wav"),
                                                    (8000, 1, "wav"), (16000, 1, "ogg")])  # fmt: skip
def test_crops_of_any_file_are_where_their_labels_are(tmp_path, rate, channels, suffix):
    pitch = np.repeat(200 + 100 * np.arange(10), rate // 5)  # a higher tone every 0.2 s
    wav = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate)
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.stack([wav] * channels, 1), rate)
    whole = audio.load(path)
    labels = np.arange(audio.n_frames(len(whole)))
    for step in range(3):
        (crop,) = crops([path], [labels], 20, 0, 4, 1)(step)
        assert crop.wav.dtype == torch.float32 and crop.wav.shape == (4, 320 * 19 + 400)
        for wav, label in zip(crop.wav.numpy(), crop.labels.tolist()):
            np.testing.assert_array_equal(wav, whole[320 * label[0] :][: len(wav)])
            assert label == list(range(label[0], label[0] + 20))
        (crop,) = crops([path], [labels], 20, 0, 4, 1, perturb=0.2)(step)
        assert crop.wav.shape == (4, 320 * 19 + 400) and torch.isfinite(crop.wav).all()


def test_perturbed_crops_are_resampled_and_their_labels_with_them(tmp_path):
    n, path = 60_000, tmp_path / "ramp.wav"  # every sample is its own index
    soundfile.write(path, np.arange(n, dtype=np.float32) / n, 16000, subtype="FLOAT")
    labels, rates = np.arange((n - 400) // 320 + 1), []
    for step in range(20):
        (crop,) = crops([path], [labels], 20, 0, 4, 1, perturb=0.3)(step)
        for wav, label in zip(crop.wav.double() * n, crop.labels):
            rates.append(((wav[-1000] - wav[0]) / (len(wav) - 1000)).item())
            middle = wav[200::320][:20]
            assert (
                middle - (320 * label + 200)
            ).abs().max() <= 161  # the recording's frame around that sample
    assert 0.74 < min(rates) < 0.8 and 1.25 < max(rates) < 1.35  # exp(0.3) = 1.35
    short = tmp_path / "short.wav"
    soundfile.write(short, np.ones(4000, np.float32) / 2, 16000, subtype="FLOAT")
    for step in range(9):
        (crop,) = crops([short], [np.arange(12)], 20, 0, 4, 1, perturb=0.3)(step)
        assert crop.wav.shape == (4, 320 * 19 + 400) and crop.labels.shape == (4, 20)
        assert torch.allclose(crop.wav, torch.tensor(0.5), atol=1e-3)
        assert set(crop.labels.unique().tolist()) <= {*range(12)}


def test_weighted_crops_keep_each_label_with_its_sound(tmp_path):
    steps = np.repeat(np.arange(20), 5)  # a tone for each label
    wav = 0.3 * np.sin(2 * np.pi * np.cumsum(np.repeat(300 + 150 * steps, 320)) / 16000)
    audio.save(tmp_path / "x.wav", np.pad(wav, (0, 80)))
    recordings = [Recording(tmp_path / "x.wav", steps, (0.15, 0.0), 1.0)] * 4
    batch_at = weighted_crops(recordings, 60, 0, 4, 1)
    right = total = 0
    for step in range(5):
        (batch,) = batch_at(step)
        assert batch.wav.shape == (4, 320 * 59 + 400) and batch.labels.shape == (4, 60)
        for x, label in zip(batch.wav, batch.labels):
            for t in range(60):
                if label[t] >= 0:
                    hertz = (
                        torch.fft.rfft(x[320 * t : 320 * t + 400] * torch.hann_window(400), 4096)
                        .abs()
                        .argmax()
                    )
                    right += abs(float(hertz) * 16000 / 4096 - 300 - 150 * int(label[t])) < 90
                    total += 1
    assert total > 900 and right > 0.9 * total
    again, other = batch_at(3)[0], weighted_crops(recordings, 60, 1, 4, 1)(3)[0]
    assert torch.equal(again.wav, batch_at(3)[0].wav) and not torch.equal(again.wav, other.wav)
    recordings = [recording._replace(perturb=(0.0, 0.0)) for recording in recordings]
    (long,) = weighted_crops(recordings, 150, 0, 4, 1)(0)  # longer than the recording
    assert (
        (long.labels[:, :100] >= 0).all()
        and (long.labels[:, 100:] == -1).all()
        and (long.wav[:, 32080:] == 0).all()
    )


def test_weighted_crops_are_drawn_by_their_weights_and_shared_between_ranks(tmp_path):
    for i in range(3):
        audio.save(tmp_path / f"{i}.wav", np.full(2000, 0.1 * i))
    weights = (1.0, 0.0, 3.0)
    recordings = [Recording(tmp_path / f"{i}.wav", np.full(6, i), (0.1, 0.1), weights[i]) for i in range(3)]

    def drawn(rank, world_size):
        batch_at = weighted_crops(recordings, 4, 0, 8, 2, rank, world_size)
        return [batch.labels[:, 0] for step in range(50) for batch in batch_at(step)]

    alone = torch.cat(drawn(0, 1))
    assert len(alone) == 400 and not (alone == 1).any() and 0.65 < (alone == 2).float().mean() < 0.85
    halves = [torch.cat(pair) for pair in zip(drawn(0, 2), drawn(1, 2))]
    assert torch.equal(torch.cat(halves), alone)


def test_imitated_crops_sound_otherwise_and_keep_their_labels(tmp_path):
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(paths):
        soundfile.write(path, hum(1.0 + i, 16000, 1), 16000)
    labels = [np.arange(49 + 50 * i) for i in range(3)]

    def drawn(share, rank=0, world_size=1):
        batch_at = crops(paths, labels, 40, 0, 8, 2, rank, world_size, perturb=0.1)
        return imitated(batch_at, Imitation(share=share, room=1.0), 0, paths)

    plain, some, again = drawn(0.0)(1), drawn(0.5)(1), drawn(0.5)(1)
    changed = 0
    for a, b, c in zip(plain, some, again):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.draws, b.draws)
        assert torch.equal(b.wav, c.wav) and b.wav.shape == a.wav.shape and b.wav.isfinite().all()
        changed += sum(not torch.equal(x, y) for x, y in zip(a.wav, b.wav))
    assert 1 <= changed <= 7  # of 8
    of_ranks = [drawn(0.5, rank, 2)(1) for rank in range(2)]
    together = torch.cat([batch[m].wav for m in range(2) for batch in of_ranks])
    assert torch.equal(together, torch.cat([batch.wav for batch in some]))
    assert all(not torch.equal(x, y) for a, b in zip(plain, drawn(1.0)(1)) for x, y in zip(a.wav, b.wav))
