"""Sound files in and out: everything downstream sees one mono float32 array at 16 kHz.

Section 4.1 of the paper works on 16 kHz speech, the only rate that HuBERT was trained on. People have 48 kHz
stereo, 8 kHz telephone, flac and ogg. `load` turns any of these into the one shape that the model knows, and
turns every file that is not usable speech into one clear line. `save` writes 16-bit wav, whole or not at all.

References: libsndfile (http://libsndfile.github.io/libsndfile), soxr (https://sourceforge.net/p/soxr), and
for the layout of wav files http://soundfile.sapp.org/doc/WaveFormat.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from files import write_atomic

RATE = 16000  # samples per second
WINDOW = 400  # samples in the receptive field of one HuBERT frame: 25 ms
HOP = 320  # samples from one frame to the next: 20 ms
MAX_SECONDS = 4 * 3600  # decoded audio is held in memory: 4 hours are 0.9 GB
SILENCE = 1e-3  # -60 dB of full scale
EXACT_SEEK = ("WAV", "WAVEX", "FLAC")  # formats in which a sample is found by its number


def n_frames(n_samples: int) -> int:
    """Number of HuBERT frames in `n_samples` (>= WINDOW) at 16 kHz. Takes tensors too."""
    return (n_samples - WINDOW) // HOP + 1


# ---- Reading -----------------------------------------------------------------------------------------------


def load(path: str | Path, rate: int = RATE) -> np.ndarray:
    """A sound file (wav, flac, ogg, whatever libsndfile reads) as (N,) float32 mono in [-1, 1] at `rate` Hz.

    Raises FileNotFoundError, OSError or ValueError, each with one line, when the file is missing, a folder,
    empty, not sound, cut short, not finite, longer than 4 hours or shorter than 25 ms. Silence is allowed:
    `check_speech`."""
    with _open(path) as file:
        wav = _decode(path, file)
        found_rate = file.samplerate
    if not np.isfinite(wav).all():
        raise ValueError(f"{path} contains samples that are not numbers (NaN or infinity): export it again")
    if found_rate != rate:
        wav = soxr.resample(wav, found_rate, rate)
    if len(wav) * RATE < WINDOW * rate:
        raise ValueError(_too_short(path, len(wav) / rate))
    return np.ascontiguousarray(wav, dtype=np.float32)


def load_part(path: str | Path, start: int, n_samples: int) -> np.ndarray:
    """load(path)[start : start + n_samples]; of a mono wav or flac at 16 kHz no more is decoded than that."""
    with _open(path) as file:
        as_stored = file.samplerate == RATE and file.channels == 1 and file.format in EXACT_SEEK
        if as_stored and file.frames >= WINDOW:
            expected = min(n_samples, max(0, file.frames - start))
            file.seek(min(start, file.frames))
            wav = file.read(expected, dtype="float32")
            if len(wav) == expected and np.isfinite(wav).all():
                return wav
    return load(path)[start : start + n_samples]


def cut(path: str | Path, spans: list[tuple[float, float]]) -> Iterator[np.ndarray]:
    """The stretches (begin, end) in seconds, in the order of `begin`, of one long recording: each (N,) at
    16 kHz, shorter where the recording ends before. It is decoded once, in blocks of ten seconds."""
    with _open(path) as file:
        rate = file.samplerate
        start = 0  # the sample at which `wav` begins
        wav = np.zeros(0, np.float32)
        for begin, end in spans:
            first, last = round(begin * rate), round(end * rate)
            while True:
                done = min(max(0, first - start), len(wav))
                start, wav = start + done, wav[done:]
                if start + len(wav) >= last:
                    break
                block = file.read(10 * rate, dtype="float32", always_2d=True)
                if not len(block):
                    break
                wav = np.concatenate([wav, block.mean(axis=1)])
            part = wav[first - start : last - start]
            yield part if rate == RATE or not len(part) else soxr.resample(part, rate, RATE)


def seconds(path: str | Path) -> float:
    """Length of a sound file by its header, without decoding. Raises as `load` does, but for inner damage."""
    with _open(path) as file:
        length = file.frames / file.samplerate
    if round(length * RATE) < WINDOW:
        raise ValueError(_too_short(path, length))
    return length


@contextmanager
def _open(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """An open sound file whose header makes sense; what cannot be read is an error of one line (`load`)."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of one sound file (wav, flac or ogg)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): record or copy it again")
    _check_end(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 1000 <= rate <= 400_000:
                raise ValueError(f"{path} has an impossible sample rate: {rate} Hz; export it again")
            if file.frames > MAX_SECONDS * rate:
                hours = file.frames / rate / 3600
                raise ValueError(f"{path} is too long: {hours:.1f} hours, the limit is 4; split it")
            yield file
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: .raw, which has no header
        raise ValueError(f"{path} is not a sound file that can be read (wav, flac, ogg): {error}") from None


def _decode(path: str | Path, file: soundfile.SoundFile) -> np.ndarray:
    """(N,) float32. Read in blocks, so that a long stereo file is never held in stereo."""
    size = max(1, (1 << 20) // file.channels)
    mono = [np.zeros(0, np.float32)]
    for block in file.blocks(size, dtype="float32", always_2d=True):  # (N, channels)
        mono.append(block.mean(axis=1))
    wav = np.concatenate(mono)
    if len(wav) < file.frames:
        raise ValueError(_cut_short(path, file.frames / file.samplerate, len(wav) / file.samplerate))
    return wav


def _too_short(path: str | Path, found: float) -> str:
    return f"{path} is too short: {1000 * found:.1f} ms of sound are there, at least 25 ms are needed"


def _cut_short(path: str | Path, promised: float, found: float) -> str:
    return f"{path} is cut short: {found:.2f} of {promised:.2f} s are there; copy it again"


def _check_end(path: Path) -> None:
    """Raises ValueError when a wav file ends before its data chunk does, or an ogg file before its last page:
    libsndfile reads both without a word."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(12)
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            _check_wav_end(path, file, size)
        elif magic[:4] == b"OggS":
            _check_ogg_end(path, file, size)


def _check_wav_end(path: Path, file: BinaryIO, size: int) -> None:
    """Walks over the chunks (name, length, content) to the one named "data". A length of 0 or 0xFFFFFFFF, as
    written by programs that stream into a pipe, means "unknown" and is fine."""
    bytes_per_second = 1
    while len(header := file.read(8)) == 8:
        name = header[:4]
        length = struct.unpack("<I", header[4:])[0]
        start = file.tell()
        if name == b"fmt " and length >= 16 and len(format_ := file.read(16)) == 16:
            bytes_per_second = max(1, struct.unpack("<I", format_[8:12])[0])
        if name == b"data":
            if length not in (0, 0xFFFFFFFF) and start + length > size:
                promised = length / bytes_per_second
                raise ValueError(_cut_short(path, promised, (size - start) / bytes_per_second))
            return
        file.seek(start + length + length % 2)  # chunks are padded to even length
    raise ValueError(f"{path} is cut short: a wav file without its data chunk; copy it again")


def _check_ogg_end(path: Path, file: BinaryIO, size: int) -> None:
    """The last page must be whole and carry the mark of the stream's last page."""
    file.seek(max(0, size - (1 << 17)))  # a page has at most 65,307 bytes
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""  # the size of each
    is_last = segments and page[5] & 4
    if not is_last or len(page) < 27 + len(segments) + sum(segments):
        raise ValueError(f"{path} is cut short: the end of its ogg stream is missing; copy it again")


def check_speech(wav: np.ndarray, name: str = "the recording") -> None:
    """Raises ValueError when wav (N,) is silent: no 25 ms of it reach -60 dB."""
    frames = np.asarray(wav[: len(wav) // WINDOW * WINDOW], np.float32).reshape(-1, WINDOW)
    loudest = np.sqrt((frames**2).mean(axis=1)).max(initial=0.0)
    if loudest < SILENCE:
        raise ValueError(
            f"{name} is silent (nothing louder than -60 dB): check the microphone and record again"
        )


# ---- Changing ----------------------------------------------------------------------------------------------


def change_pace_and_pitch(wav: np.ndarray, pace: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """wav (N,) at 16 kHz -> (about N / pace,): `pace` times as fast, with pitch and formants `pitch` times as
    high, to imitate another speaker. Resampling changes both together, so the pace is corrected first."""
    return soxr.resample(stretch(wav, pace / pitch), RATE * pitch, RATE)


def stretch(wav: np.ndarray, pace: float, window: int = 480, search: int = 120) -> np.ndarray:
    """wav (N,) -> (N / pace,): `pace` times as fast at the same pitch, by WSOLA (Verhelst & Roelands 1993).

    Windows of `window` samples (30 ms), overlapping by half, are added at even distances in the output. Each
    is taken from the place in `wav` that the pace leads to, or up to `search` samples (7.5 ms) before or
    after it, where it continues the window before best (highest correlation)."""
    hop = window // 2
    length = round(len(wav) / pace)
    padded = np.pad(wav, (search + hop, search + 2 * window + hop))  # wav[n] is padded[n + search + hop]
    out = np.zeros(length + 2 * window, np.float32)
    fade = np.hanning(window + 1)[:-1].astype(np.float32)
    source = search  # where in `padded` the last window was taken from
    for target in range(0, length + hop, hop):
        first = min(round(target * pace), len(wav))  # of the places to take a window from
        if target > 0:
            continuation = padded[source + hop : source + hop + window]
            candidates = padded[first : first + 2 * search + window]
            source = first + int(np.correlate(candidates, continuation, "valid").argmax())
        out[target : target + window] += fade * padded[source : source + window]
    return out[hop : hop + length]


# ---- Writing -----------------------------------------------------------------------------------------------


def save(path: str | Path, wav: np.ndarray, rate: int = RATE) -> None:
    """Writes wav (N,) in [-1, 1] as 16-bit mono wav, or flac if `path` ends so. Atomic: an old file stays
    until the new one is complete.

    Without sync: a corpus is thousands of small files that can be made again.
    """
    wav = np.asarray(wav, np.float32)
    assert wav.ndim == 1, f"expected (N,) samples, got shape {wav.shape}"
    assert np.isfinite(wav).all(), "samples must be finite"
    samples = (wav.clip(-1, 1) * 32767).round().astype(np.int16)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    soundfile.write(content, samples, rate, "PCM_16", format="FLAC" if path.suffix == ".flac" else "WAV")
    write_atomic(path, content.getvalue(), sync=False)
