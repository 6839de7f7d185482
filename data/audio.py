"""Sound files in and out: everything downstream sees one mono float32 array at 16 kHz.

Section 4.1 of the paper works on 16 kHz speech, the only rate that HuBERT was trained on. People have 48 kHz
stereo, 8 kHz telephone, flac, ogg and mp3. `load` turns any of these into the one shape that the model knows,
and every file that is not usable speech into one clear line: what a header says is never taken for what is
there (data/containers.py). `save` writes 16-bit wav or flac, whole or not at all.

References: libsndfile (http://libsndfile.github.io/libsndfile), soxr (https://sourceforge.net/p/soxr)
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.containers import NOT_SOUND, Stream, streams
from files import write_atomic
from starting import signals_held

RATE = 16000  # samples per second
WINDOW = 400  # samples in the receptive field of one HuBERT frame: 25 ms
HOP = 320  # samples from one frame to the next: 20 ms
MAX_SECONDS = 4 * 3600  # decoded sound is held in memory: 4 hours are 0.9 GB
MAX_VALUES = MAX_SECONDS * 2 * 48_000  # samples of all channels that are decoded: 4 hours of 48 kHz stereo
SILENCE = 1e-3  # -60 dB of full scale
CANCELED = 0.01  # a mean with less than this of the loudest channel's power (-20 dB) has lost the sound
EVERY = 13  # how many samples apart their power is compared
# Beginnings of files, and encodings, in which a sample is found by its number.
EXACT_SEEK = (b"RIFF", b"fLaC")
EXACT_CODES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")


def n_frames(n_samples: int) -> int:
    """Number of HuBERT frames in `n_samples` (>= WINDOW) at 16 kHz. Takes tensors too."""
    return (n_samples - WINDOW) // HOP + 1


# ---- Reading -----------------------------------------------------------------------------------------------


def load(path: str | Path, rate: int = RATE) -> np.ndarray:
    """A sound file (wav, flac, ogg, mp3, aiff ...) as (N,) float32 mono in [-1, 1] at `rate` Hz.

    Mono is the mean of the channels, or the loudest of them where they cancel each other out. Raises
    FileNotFoundError, OSError or ValueError, each with one line, when the file is missing, a folder, empty,
    not sound, cut short, damaged, not finite, longer than 4 hours or shorter than 25 ms. Silence is allowed:
    `check_speech`."""
    path = _existing(path)
    parts = []
    room = float(MAX_SECONDS)
    for stream in streams(path):
        if stream.beginning:
            _check_beginning(path, *stream.beginning)
        parts.append(_decode(path, stream, rate, room))
        room -= len(parts[-1]) / rate
    wav = parts[0] if len(parts) == 1 else np.concatenate(parts)
    _check_length(path, len(wav) / rate)
    return wav


def load_part(path: str | Path, start: int, n_samples: int) -> np.ndarray:
    """load(path)[start : start + n_samples]; of a mono wav or flac at 16 kHz no more is decoded than that, so
    that damage elsewhere in the file is not noticed."""
    path = _existing(path)
    with open(path, "rb") as file:
        exact = file.read(4) in EXACT_SEEK
    if exact and start + n_samples >= WINDOW:
        with suppress(ValueError), _open(path, path) as file:
            as_stored = file.samplerate == RATE and file.channels == 1 and file.subtype in EXACT_CODES
            if as_stored and start + n_samples <= file.frames:
                file.seek(start)
                wav = file.read(n_samples, dtype="float32")
                if len(wav) == n_samples and np.isfinite(wav).all():
                    return wav
    return load(path)[start : start + n_samples]


def cut(path: str | Path, spans: list[tuple[float, float]]) -> Iterator[np.ndarray]:
    """The stretches (begin, end) in seconds of one long recording, which is decoded once: each (N,) at
    16 kHz, shorter where the recording ends before."""
    wav = load(path)
    for begin, end in spans:
        yield wav[round(begin * RATE) : round(end * RATE)]


def measure(path: str | Path) -> float:
    """Length of a sound file in seconds. All of it is decoded, so that it raises whatever `load` would."""
    return len(load(path)) / RATE


def seconds(path: str | Path) -> float:
    """Length of a sound file by its headers: `measure` without decoding, so that damage is not noticed."""
    path = _existing(path)
    length = 0.0
    for stream in streams(path):
        if stream.promised == 0:  # a flac that does not know
            return measure(path)
        with _open(path, stream.content) as file:
            length += (stream.promised or file.frames) / file.samplerate
    _check_length(path, length)
    return length


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of one sound file (wav, flac, ogg, mp3)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): record or copy it again")
    return path


def reason(error: Exception, path: Path) -> str:
    """Why a sound file cannot be used: an error of this file, without the path that it begins with."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    text = " ".join(str(error).split()).replace(str(path), "").lstrip(": ").removeprefix("is ")
    return text[:200]


def _check_length(path: Path, length: float) -> None:
    if length < WINDOW / RATE:
        raise ValueError(
            f"{path} is too short: {1000 * length:.1f} ms of sound are there, at least 25 ms are needed"
        )
    if length > MAX_SECONDS:
        raise ValueError(f"{path} is too long: {length / 3600:.1f} hours, the limit is 4; split it")


class _Forward(soundfile.SoundFile):
    """Reads straight on. soundfile seeks after every block, which GSM cannot, and stops where the header
    says; where a file ends before that, its `blocks` even yields memory that was never written."""

    def seekable(self) -> bool:
        return False


@contextmanager
def _open(path: Path, content: Path | bytes) -> Iterator[_Forward]:
    """The file `path` or a stream of it, opened; what libsndfile cannot read is an error of one line."""
    in_memory = isinstance(content, bytes)
    try:
        with (
            signals_held() if in_memory else nullcontext(),
            _Forward(io.BytesIO(content) if in_memory else content) as file,
        ):
            if not 1000 <= file.samplerate <= 400_000:
                found = file.samplerate
                raise ValueError(f"{path} has an impossible sample rate: {found} Hz; export it again")
            yield file
    except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw, which has no header
        raise ValueError(f"{path} {NOT_SOUND}") from None


def _decode(path: Path, stream: Stream, rate: int, room: float, channel: int | None = None) -> np.ndarray:
    """One stream of at most `room` seconds as (N,) float32 mono at `rate` Hz; or one channel of it.

    Each block is mixed and resampled at once, so that what is held in memory depends on the length alone."""
    mono = [np.zeros(0, np.float32)]
    with _open(path, stream.content) as file:
        if file.channels == 1:
            channel = 0
        share = np.full(file.channels, 1 / file.channels, np.float32)
        n = 0
        sums = np.zeros((2, file.channels + 1))  # of x and x^2, for each channel and for the mean
        resampler = soxr.ResampleStream(file.samplerate, rate, 1) if file.samplerate != rate else None
        for block in _blocks(path, file, stream.promised, room):  # (N, channels)
            wav = block @ share if channel is None else np.ascontiguousarray(block[:, channel])
            if not np.isfinite(wav).all():
                raise ValueError(f"{path} contains NaN or infinity, which are no samples: export it again")
            if channel is None:
                x = np.column_stack([block[::EVERY], wav[::EVERY]]).astype(np.float64)
                sums += [x.sum(axis=0), (x**2).sum(axis=0)]
                n += len(x)
            mono.append(wav if resampler is None else resampler.resample_chunk(wav))
        if resampler is not None:
            mono.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    if n:
        mean, square = sums / n
        *sides, mix = square - mean**2  # variances
        if mix < CANCELED * max(sides):
            return _decode(path, stream, rate, room, int(np.argmax(sides)))
    return mono[1] if len(mono) == 2 else np.concatenate(mono)


def _blocks(path: Path, file: _Forward, promised: int | None, room: float) -> Iterator[np.ndarray]:
    """(N, channels) float32 until nothing comes. At least `promised` samples must come, or as many as
    libsndfile announces; at most `room` seconds and MAX_VALUES may."""
    promised = file.frames if promised is None else promised
    most = min(int(room * file.samplerate), MAX_VALUES // file.channels)
    size = max(1, (1 << 15) // file.channels)  # small, so that it stays in the cache
    found = 0
    while max(found, promised) <= most:
        left = promised - found
        block = np.empty((min(left, size) if left > 0 else size, file.channels), np.float32)
        try:
            block = file.read(out=block)
        except soundfile.LibsndfileError:
            if found >= promised > 0:
                return  # what follows a whole flac stream is none of its frames
            after = found / file.samplerate
            raise ValueError(f"{path} is damaged after {after:.2f} s: copy it again") from None
        if not len(block):
            break
        found += len(block)
        yield block
    else:
        limit = most / file.samplerate / 3600
        raise ValueError(f"{path} is too long: the limit is {limit:.1f} hours at its rate; split it")
    if found < promised:
        there, all_of_it = found / file.samplerate, promised / file.samplerate
        raise ValueError(f"{path} is cut short: {there:.2f} of {all_of_it:.2f} s are there; copy it again")


def _check_beginning(path: Path, content: bytes, n_samples: int) -> None:
    with _open(path, content) as file:
        found = sum(len(block) for block in _blocks(path, file, 0, MAX_SECONDS))
    if found != n_samples:
        raise ValueError(f"{path} was cut out of a longer file without being decoded: export it again")


def check_speech(wav: np.ndarray, name: str = "the recording") -> None:
    """Raises ValueError when wav (N,) is silent: no 25 ms of it reach -60 dB."""
    frames = np.asarray(wav[: len(wav) // WINDOW * WINDOW], np.float32).reshape(-1, WINDOW)
    loudest = np.sqrt((frames**2).mean(axis=1)).max(initial=0.0)
    if loudest < SILENCE:
        raise ValueError(
            f"{name} is silent (nothing louder than -60 dB): check the microphone and record again"
        )


# ---- Names -------------------------------------------------------------------------------------------------

# Of sound files, whether or not they can be read here.
ENDINGS = set(
    "wav wave w64 rf64 flac ogg oga opus mp3 mp2 m4a mp4 aac aif aiff aifc alac amr ape au caf gsm mka mkv "
    "mov mpeg raw snd voc vox webm wma wv 3gp".split()
)


def is_file_name(text: str) -> bool:
    """Whether a text names a file by its shape, be it there or not; a path that is there always does.

    Names: "a.wav", "my answer.M4A", "b.xyz", "talks/one", "./what is this". Texts: "What is 3.5?", "3/4"."""
    if os.path.exists(text):
        return True
    text = text.strip()
    name, _, ending = text.rpartition(".")
    if name and not name[-1].isspace() and ending.lower() in ENDINGS:
        return True
    if re.match(r"\.{0,2}[/\\]|~[/\\]|[A-Za-z]:[/\\]", text):
        return True
    if re.search(r"\s", text) or text.endswith((".", "?", "!")) or not re.search(r"[^\W\d_]", text):
        return False  # several words, the end of a sentence, or no letter
    short_ending = name and re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9]{2,4}", ending)
    return bool(short_ending) or "/" in text or "\\" in text


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
    format = "FLAC" if path.suffix.lower() == ".flac" else "WAV"
    with signals_held():
        soundfile.write(content, samples, rate, "PCM_16", format=format)
    write_atomic(path, content.getvalue(), sync=False)
