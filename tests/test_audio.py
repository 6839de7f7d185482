"""data/audio.py: every usable file gives the same 16 kHz mono sound, every other file one clear line."""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import audio


def tone(seconds: float = 0.5, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    fade = np.minimum(1, 20 * np.minimum(time, seconds - time) / seconds)
    return (0.5 * fade * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# ---- another pace, another pitch ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pace, pitch", [(1, 1), (1.3, 1), (0.7, 1), (1, 1.25), (1, 0.8), (1.16, 0.86), (0.86, 1.22)]
)
def test_pace_and_pitch_are_two_things(pace, pitch):
    first, second = tone(0.5, hertz=220), tone(0.5, hertz=330)
    changed = audio.change_pace_and_pitch(np.concatenate([first, second]), pace, pitch)
    assert len(changed) == pytest.approx(16000 / pace, abs=2) and changed.dtype == np.float32
    for part, hertz in ((changed[: len(changed) // 2], 220), (changed[len(changed) // 2 :], 330)):
        middle = part[len(part) // 4 : -len(part) // 4]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 16))
        assert spectrum.argmax() * 16000 / 65536 == pytest.approx(hertz * pitch, rel=0.02)
        assert np.sqrt((middle**2).mean()) == pytest.approx(
            0.5 / np.sqrt(2), rel=0.1
        )  # pieces go on in phase


def test_at_its_own_pace_a_recording_stays_as_it_is():
    wav = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    np.testing.assert_allclose(audio.stretch(wav, 1.0), wav, atol=1e-5)
    assert (
        len(audio.stretch(wav[:400], 1.7)) == round(400 / 1.7) and len(audio.stretch(wav[:400], 0.5)) == 800
    )


# ---- files that are fine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_stereo_give_the_same_sound(tmp_path, rate, channels):
    wav = tone(0.5, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wav] * channels, 1), rate, subtype="FLOAT")
    loaded = audio.load(tmp_path / "a.wav")
    assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
    assert abs(len(loaded) - 8000) <= 1
    n = min(len(loaded), 8000)
    assert np.abs(loaded[:n] - tone()[:n]).max() < 0.01


@pytest.mark.parametrize("suffix, subtype, tolerance", [
    ("wav", "PCM_U8", 0.01), ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-6), ("wav", "PCM_32", 1e-6),
    ("wav", "FLOAT", 0), ("wav", "DOUBLE", 0), ("flac", "PCM_16", 1e-4), ("flac", "PCM_24", 1e-6),
    ("ogg", "VORBIS", 0.1),
])  # fmt: skip
def test_formats(tmp_path, suffix, subtype, tolerance):
    soundfile.write(tmp_path / f"a.{suffix}", tone(), 16000, subtype=subtype)
    loaded = audio.load(tmp_path / f"a.{suffix}")
    assert len(loaded) == 8000 and np.abs(loaded - tone()).max() <= tolerance


def test_stereo_is_the_mean_of_both_sides(tmp_path):
    left, right = tone(hertz=300), tone(hertz=500)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("residue", [0, 0.02])
@pytest.mark.parametrize("offset", [0, 0.3])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_of_sides_that_cancel_each_other_out_the_louder_is_taken(tmp_path, residue, offset, rate):
    """As after a cable with two wires swapped. The mean of both would be silence, or what little differs."""
    left = tone(0.5, rate) + offset  # a constant is no sound
    right = -0.9 * (1 - residue) * tone(0.5, rate) + offset
    for sides, louder in (([left, right], left), ([right, left], left), ([left, right, 0 * left], left)):
        soundfile.write(tmp_path / "a.wav", np.stack(sides, 1), rate, subtype="FLOAT")
        soundfile.write(tmp_path / "one.wav", louder, rate, subtype="FLOAT")
        np.testing.assert_array_equal(audio.load(tmp_path / "a.wav"), audio.load(tmp_path / "one.wav"))
    audio.check_speech(audio.load(tmp_path / "a.wav"))


def test_sides_that_differ_are_mixed(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (8000, 2)).astype(np.float32)
    voice, nothing = tone(), np.zeros(8000, np.float32)
    for sides in ([voice, voice], [voice, nothing], list(noise.T), [voice, -0.7 * voice], [nothing, nothing]):
        soundfile.write(tmp_path / "a.wav", np.stack(sides, 1), 16000, subtype="FLOAT")
        np.testing.assert_allclose(audio.load(tmp_path / "a.wav"), np.mean(sides, axis=0), atol=1e-7)


def test_other_target_rate(tmp_path):
    audio.save(tmp_path / "a.wav", tone())
    assert len(audio.load(tmp_path / "a.wav", rate=24000)) == 12000


def test_thirty_minutes(tmp_path):
    minute = tone(60, 8000)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 8000, 2, subtype="PCM_16") as file:
        for _ in range(30):
            file.write(np.stack([minute, minute], 1))
    assert len(audio.load(tmp_path / "long.wav")) == 30 * 60 * 16000


def test_a_silent_file_loads_but_is_not_speech(tmp_path):
    audio.save(tmp_path / "a.wav", np.zeros(16000))
    wav = audio.load(tmp_path / "a.wav")
    assert len(wav) == 16000 and not wav.any()
    with pytest.raises(ValueError) as error:
        audio.check_speech(wav, "a.wav")
    one_line(error, "a.wav", "silent")
    audio.check_speech(np.concatenate([wav, tone(0.1)]))  # a short word in a long silence is speech


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF])
def test_streamed_wav_whose_length_was_never_filled_in(tmp_path, length):
    audio.save(tmp_path / "a.wav", tone())
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", length)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(audio.load(tmp_path / "a.wav")) == 8000


# ---- a part, and the length --------------------------------------------------------------------------


@pytest.mark.parametrize("rate, channels, suffix, subtype", [
    (16000, 1, "wav", "PCM_16"), (16000, 1, "wav", "FLOAT"), (16000, 1, "flac", "PCM_16"),
    (16000, 1, "ogg", "VORBIS"), (16000, 2, "wav", "PCM_16"), (44100, 1, "wav", "PCM_16"),
    (8000, 2, "flac", "PCM_16"),
])  # fmt: skip
def test_a_part_is_the_part_of_the_whole(tmp_path, rate, channels, suffix, subtype):
    noise = np.random.default_rng(0).normal(0, 0.1, (2 * rate, channels))
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise, rate, subtype=subtype)
    whole = audio.load(path)
    for start, n in ((0, 400), (320, 16000), (31000, 5000), (0, 99999), (40000, 10)):
        part = audio.load_part(path, start, n)
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, whole[start : start + n])
    assert audio.measure(path) == pytest.approx(2.0, abs=1e-3)


def test_only_the_part_is_decoded(tmp_path, monkeypatch):
    audio.save(tmp_path / "a.wav", tone())
    soundfile.write(tmp_path / "a.flac", tone(), 16000)
    monkeypatch.setattr(audio, "streams", None)
    for name in ("a.wav", "a.flac"):
        assert len(audio.load_part(tmp_path / name, 4000, 800)) == 800


def test_a_part_of_an_unusable_file_is_one_line(tmp_path):
    audio.save(tmp_path / "a.wav", np.full(399, 0.5))
    wav = tone()
    wav[4000] = np.nan
    soundfile.write(tmp_path / "nan.wav", wav, 16000, subtype="FLOAT")
    for name, words in (("a.wav", "25 ms"), ("nan.wav", "NaN"), ("gone.wav", "no such file")):
        with pytest.raises((ValueError, OSError)) as error:
            audio.load_part(tmp_path / name, 3900, 800)
        one_line(error, name, words)
    for name, words in (("a.wav", "25 ms"), ("nan.wav", "NaN"), ("gone.wav", "no such file")):
        with pytest.raises((ValueError, OSError)) as error:
            audio.measure(tmp_path / name)
        one_line(error, name, words)


# ---- files that are not ------------------------------------------------------------------------------------


def test_missing_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        audio.load(tmp_path / "nowhere.wav")
    one_line(error, "nowhere.wav", "no such file")
    with pytest.raises(IsADirectoryError) as error:
        audio.load(tmp_path)
    one_line(error, "folder")


@pytest.mark.parametrize("name, content, words", [
    ("empty.wav", b"", "empty"),
    ("text.wav", b"What is three plus four?\n" * 100, "not a sound file"),
    ("text.flac", b"What is three plus four?\n" * 100, "not a sound file"),
    ("noise.ogg", bytes(range(256)) * 40, "not a sound file"),
    ("head.wav", b"RIFF\x24\0\0\0WAVE", "cut short"),
    ("half.wav", b"RIFF\x24\0\0\0WAVEfmt \x10\0", "cut short"),
    ("tiny.wav", b"R", "not a sound file"),
    ("headerless.raw", b"\0\1" * 8000, "not a sound file"),
])  # fmt: skip
def test_not_sound(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        audio.load(tmp_path / name)
    one_line(error, name, words)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_too_short(tmp_path, samples):
    audio.save(tmp_path / "a.wav", np.full(samples, 0.5))
    with pytest.raises(ValueError) as error:
        audio.load(tmp_path / "a.wav")
    one_line(error, "a.wav", "25 ms")
    audio.save(tmp_path / "b.wav", np.full(400, 0.5))
    assert len(audio.load(tmp_path / "b.wav")) == 400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number(tmp_path, value):
    wav = tone()
    wav[4000] = value
    soundfile.write(tmp_path / "a.wav", wav, 16000, subtype="FLOAT")
    with pytest.raises(ValueError) as error:
        audio.load(tmp_path / "a.wav")
    one_line(error, "a.wav", "NaN")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.97])
def test_truncated(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32)
    soundfile.write(tmp_path / f"a.{suffix}", noise, 16000)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError) as error:
        audio.load(tmp_path / f"a.{suffix}")
    one_line(error, f"a.{suffix}")


def test_a_flac_that_asks_for_gigabytes(tmp_path, monkeypatch):
    """No more of it is held than the sound at 16 kHz."""
    seconds = np.zeros((400_000 * 5, 2), np.int16)
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 400_000, 2) as file:
        for _ in range(3):
            file.write(seconds)
    assert (tmp_path / "a.flac").stat().st_size < 50_000
    tracemalloc.start()
    assert len(audio.load(tmp_path / "a.flac")) == 15 * 16000
    assert tracemalloc.get_traced_memory()[1] < 5e6  # decoded it is 48 MB
    tracemalloc.stop()
    monkeypatch.setattr(audio, "MAX_VALUES", 14 * 400_000 * 2)
    with pytest.raises(ValueError, match="too long"):
        audio.load(tmp_path / "a.flac")
    monkeypatch.undo()
    monkeypatch.setattr(audio, "MAX_SECONDS", 14)
    for total in (None, 0, 1000):  # whatever the header says
        content = bytearray((tmp_path / "a.flac").read_bytes())
        if total is not None:
            numbers = int.from_bytes(content[18:26], "big") >> 36 << 36 | total
            content[18:26] = numbers.to_bytes(8, "big")
        (tmp_path / "b.flac").write_bytes(content)
        with pytest.raises(ValueError, match="too long"):
            audio.load(tmp_path / "b.flac")


def test_a_thousand_channels_and_extreme_rates(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile(tone()[:, None], (1, 1000)), 16000, subtype="PCM_16")
    np.testing.assert_allclose(audio.load(tmp_path / "a.wav"), tone(), atol=1e-4)
    for rate in (1000, 1002, 399_990, 400_000):
        soundfile.write(tmp_path / "a.wav", tone(0.5, rate, 200), rate, subtype="FLOAT")
        loaded = audio.load(tmp_path / "a.wav")
        assert abs(len(loaded) - 8000) <= 8 and np.abs(loaded[:7990] - tone(hertz=200)[:7990]).max() < 0.02
    for rate in (999, 400_001):
        soundfile.write(tmp_path / "a.wav", tone(0.5, rate), rate, subtype="FLOAT")
        with pytest.raises(ValueError, match="impossible sample rate"):
            audio.load(tmp_path / "a.wav")


def test_absurd_headers(tmp_path):
    audio.save(tmp_path / "a.wav", tone())
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", 4_000_000_000)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError) as error:
        audio.load(tmp_path / "a.wav")
    one_line(error, "a.wav")
    silence = np.zeros(16000, np.int16)
    with soundfile.SoundFile(tmp_path / "day.flac", "w", 1000, 1) as file:  # small on disk, five hours long
        for _ in range(5 * 3600 // 16 + 1):
            file.write(silence)
    with pytest.raises(ValueError, match="limit is 4"):
        audio.load(tmp_path / "day.flac")


# ---- saving ------------------------------------------------------------------------------------------------


def test_save_then_load_is_16_bit(tmp_path):
    audio.save(tmp_path / "new folder" / "a.wav", tone())
    assert soundfile.info(tmp_path / "new folder" / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(audio.load(tmp_path / "new folder" / "a.wav"), tone(), atol=1 / 32000)


def test_save_clips_instead_of_wrapping(tmp_path):
    audio.save(tmp_path / "a.wav", np.array([2.0, -2.0] * 400))
    assert set(np.sign(audio.load(tmp_path / "a.wav"))[:2]) == {1, -1}
    assert np.abs(audio.load(tmp_path / "a.wav")).min() > 0.99


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    audio.save(tmp_path / "a.wav", tone())

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        audio.save(tmp_path / "a.wav", np.zeros(16000))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert audio.load(tmp_path / "a.wav").any()


def test_save_refuses_what_is_not_sound(tmp_path):
    with pytest.raises(AssertionError, match="shape"):
        audio.save(tmp_path / "a.wav", np.zeros((2, 100)))
    with pytest.raises(AssertionError, match="finite"):
        audio.save(tmp_path / "a.wav", np.array([0.0, np.nan]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, expected",
    [
        (FileNotFoundError("a/b.wav: no such file"), "no such file"),
        (PermissionError(13, "Permission denied", "a/b.wav"), "cannot be opened: Permission denied"),
        (ValueError("a/b.wav is cut short: 1.00 of 2.00 s are there"), "cut short: 1.00 of 2.00 s are there"),
    ],
)
def test_why_a_sound_file_cannot_be_used_is_told_without_its_path(error, expected):
    assert audio.reason(error, Path("a/b.wav")) == expected
