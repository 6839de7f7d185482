"""data/augment.py: each change does what it says, moves no sample, and is drawn the same again."""

import math

import numpy as np
import pytest
import soundfile

from config import load
from data import augment
from data.audio import RATE
from data.augment import Imitation, draw_of

NOTHING = Imitation(
    pace=0, pitch=0, formants=0, silence=0, level=0, room=0, noise=0, telephone=0, codec=0, clipping=0
)


def vowel(pitch: float = 120.0, formants=(700, 1800, 2900), seconds: float = 1.0) -> np.ndarray:
    """A buzz of harmonics under three resonances, louder in its middle."""
    t = np.arange(round(seconds * RATE)) / RATE
    wav = np.zeros(len(t))
    for harmonic in np.arange(pitch, 7000, pitch):
        gain = sum(1 / (1 + ((harmonic - f) / 120) ** 2) for f in formants)
        wav += gain * np.sin(2 * np.pi * harmonic * t + harmonic)
    wav *= np.hanning(len(t))
    return (0.5 * wav / np.abs(wav).max()).astype(np.float32)


def power(wav: np.ndarray, low: float, high: float) -> float:
    """Of the frequencies from `low` to `high` Hz."""
    hertz = np.fft.rfftfreq(len(wav), 1 / RATE)
    return float((np.abs(np.fft.rfft(wav)) ** 2)[(hertz >= low) & (hertz < high)].sum())


def middle(wav: np.ndarray, low: float, high: float) -> float:
    """Hz: where the power from `low` to `high` Hz lies on average."""
    hertz = np.fft.rfftfreq(len(wav), 1 / RATE)
    weight = np.abs(np.fft.rfft(wav)) ** 2 * ((hertz >= low) & (hertz < high))
    return float((hertz * weight).sum() / weight.sum())


def lag(a: np.ndarray, b: np.ndarray, most: int = 2000) -> int:
    """By how many samples b comes after a."""
    return int(np.correlate(np.pad(b, most), a, "valid").argmax()) - most


@pytest.mark.parametrize("factor", [0.87, 1.15])
def test_formants_move_and_the_pitch_stays(factor):
    wav = vowel()
    changed = augment.warp_formants(wav, factor)
    assert len(changed) == len(wav) and changed.dtype == np.float32
    for low, high in ((400, 1150), (1250, 2350), (2350, 3500)):  # around each resonance
        moved = middle(changed, low * factor, high * factor) / middle(wav, low, high)
        assert moved == pytest.approx(factor, abs=0.045)
    tone = np.abs(np.fft.rfft(changed)) ** 2  # still harmonics of 120 Hz
    hertz = np.fft.rfftfreq(len(wav), 1 / RATE)
    near = np.abs((hertz + 60) % 120 - 60) < 6
    assert tone[near].sum() > 0.95 * tone.sum()


def test_formants_at_their_own_place_are_the_recording():
    wav = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    np.testing.assert_allclose(augment.warp_formants(wav, 1.0), wav, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 1.0])
@pytest.mark.parametrize("ratio", [5.0, 17.0, 30.0])
def test_noise_is_as_far_below_the_speech_as_asked(slope, ratio):
    wav = vowel()
    noise = augment.noise(draw_of(0), len(wav), slope)
    found = augment.mix(wav, noise, ratio)
    added = found.astype(np.float64) - wav
    assert 10 * math.log10((wav**2).mean() / (added**2).mean()) == pytest.approx(ratio, abs=0.05)
    fall = power(noise, 200, 400) / power(noise, 3200, 6400)  # four octaves, each twice as wide
    assert fall == pytest.approx(1 / 16 if slope == 0 else 1.0, rel=0.3)


def test_silence_is_not_mixed_and_silent_speech_stays_finite():
    wav = vowel()
    assert augment.mix(wav, np.zeros_like(wav), 10) is wav
    silent = np.zeros(4000, np.float32)
    everything = Imitation(room=1, noise=1, telephone=1, codec=1, clipping=1)
    for number in range(6):
        assert np.isfinite(augment.imitate(silent, draw_of(number), everything).wav).all()


def test_a_room_decays_and_keeps_the_direct_sound():
    response = augment.room(draw_of(0), decay=0.4, direct=10.0)
    assert response[0] == 1.0 and len(response) == 0.4 * RATE
    assert 10 * math.log10((response[1:] ** 2).sum()) == pytest.approx(-10.0, abs=0.01)
    parts = response[1:6397].reshape(4, -1)
    level = 10 * np.log10((parts**2).mean(axis=1))
    np.testing.assert_allclose(np.diff(level), -15, atol=1.5)  # 60 dB in 0.4 s
    click = np.zeros(9000, np.float32)
    click[100] = 1
    heard = augment.reverberate(click, response)
    assert len(heard) == len(click) and not np.abs(heard[:100]).max() > 1e-5
    np.testing.assert_allclose(heard[100 : 100 + len(response)], response, atol=1e-5)


def test_a_telephone_has_its_band_and_eight_bits():
    wav = np.random.default_rng(0).standard_normal(RATE).astype(np.float32) / 8
    heard = augment.telephone(wav)
    inside = power(heard, 300, 3400)
    assert power(heard, 0, 280) + power(heard, 3500, 8000) < 0.01 * inside
    assert inside == pytest.approx(power(wav, 300, 3400), rel=0.05)
    assert len(np.unique(augment.mu_law(wav))) <= 256
    error = augment.mu_law(wav) - wav
    assert 10 * math.log10((wav**2).mean() / (error**2).mean()) > 30


@pytest.mark.parametrize("codec", augment.CODECS)
def test_a_codec_loses_something_and_moves_nothing(codec):
    wav = np.concatenate([vowel(pitch, seconds=0.3) for pitch in (90, 117, 143, 171, 201)])
    heard = augment.encode(wav, codec)
    assert heard.shape == wav.shape and heard.dtype == np.float32
    assert abs(lag(wav, heard)) <= 16  # of 320 in a frame
    assert 0.7 < np.corrcoef(wav, heard)[0, 1] < 0.99999


def test_a_codec_that_is_missing_is_mu_law(monkeypatch):
    def without(*_, **__):
        raise soundfile.LibsndfileError(1)

    wav = vowel()
    monkeypatch.setattr(soundfile, "write", without)
    np.testing.assert_array_equal(augment.encode(wav, "opus"), augment.mu_law(wav))


def test_clipping_and_level():
    wav = vowel()
    assert np.abs(augment.clip(wav, 0.3)).max() == pytest.approx(0.15)
    assert np.abs(augment.louder(wav, -20)).max() == pytest.approx(0.05)
    assert len(augment.clip(wav[:0], 0.3)) == 0


def test_octaves_are_as_much_louder_as_asked_and_the_whole_as_loud():
    wav = draw_of(0).standard_normal(RATE).astype(np.float32)
    raised = augment.equalize(wav, np.where(augment.OCTAVES == 1000, 20.0, 0.0))
    assert np.mean(raised**2) == pytest.approx(np.mean(wav**2), rel=1e-3)
    gains = {f: power(raised, f / 1.05, f * 1.05) / power(wav, f / 1.05, f * 1.05) for f in (250, 1000, 4000)}
    assert gains[1000] / gains[250] == pytest.approx(100, rel=0.3)
    assert gains[4000] / gains[250] == pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(augment.equalize(wav, np.zeros(8)), wav, atol=1e-5)
    assert not augment.equalize(np.zeros(100, np.float32), np.zeros(8)).any()
    assert not len(augment.equalize(wav[:0], np.zeros(8)))
    changed = augment.place(wav, draw_of(1), Imitation(**vars(NOTHING) | {"tone": 1.0}))
    assert changed.dtype == np.float32 and np.corrcoef(changed, wav)[0, 1] < 0.99


def test_silence_and_pace_say_where_the_samples_went():
    wav = vowel(seconds=2.0)
    how = Imitation(**vars(NOTHING) | {"pace": 0.3, "silence": 0.5})
    paces = []
    for number in range(20):
        changed, pace, before = augment.imitate(wav, draw_of(number), how)
        paces.append(pace)
        assert before % 320 == 0 and 0 <= before <= 8000
        assert len(wav) / pace + before <= len(changed) + 2 <= len(wav) / pace + before + 8200
        assert not np.abs(changed[: max(0, before - 400)]).max(initial=0) > 1e-3
        loudest = np.abs(changed).argmax() - before
        assert abs(pace * loudest - np.abs(wav).argmax()) < 0.06 * RATE
    assert min(paces) < 0.85 and max(paces) > 1.15


def test_nothing_asked_for_changes_nothing():
    wav = vowel()
    changed, pace, before = augment.imitate(wav, draw_of(0), NOTHING)
    assert (pace, before, len(changed)) == (1.0, 0, len(wav))
    np.testing.assert_allclose(changed[500:-500], wav[500:-500], atol=0.02)
    np.testing.assert_array_equal(augment.place(wav, draw_of(0), NOTHING), wav)


def test_the_same_draw_is_the_same_imitation_and_another_is_not():
    wav = vowel()
    other = vowel(210.0, (500, 1500, 2500))
    always = Imitation(room=1, noise=1, telephone=0.5, codec=0.5, clipping=0.5)

    def imitated(*what):
        return augment.imitate(wav, draw_of(*what), always, lambda draw: other).wav

    np.testing.assert_array_equal(imitated(3, "crop", 7), imitated(3, "crop", 7))
    assert not np.array_equal(imitated(3, "crop", 7)[:8000], imitated(3, "crop", 8)[:8000])


def test_babble_is_of_other_people():
    wav = vowel()
    asked = []

    def babble(draw):
        asked.append(draw.random())
        return vowel(200.0, seconds=0.3)

    how = Imitation(**vars(NOTHING) | {"noise": 1.0, "ratio": (5.0, 5.0)})
    found = [augment.place(wav, draw_of(number), how, babble) for number in range(12)]
    assert len(asked) >= 3 and all(len(x) == len(wav) for x in found)
    added = [10 * math.log10((wav**2).mean() / ((x - wav) ** 2).mean()) for x in found]
    np.testing.assert_allclose(added, 5.0, atol=0.1)


@pytest.mark.parametrize(
    "wrong", [{"room": 1.5}, {"pace": -0.1}, {"pitch": 2}, {"ratio": (30.0, 5.0)}, {"decay": (0.0, 0.5)}]
)
def test_a_setting_that_makes_no_sense_is_one_line(wrong):
    with pytest.raises(ValueError) as error:
        load(Imitation, wrong, "[imitation]")
    assert "\n" not in str(error.value)
