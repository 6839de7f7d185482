"""Sound files in and out: everything downstream sees one mono float32 array at 16 kHz.

Section 4.1 of the paper works on 16 kHz speech (HuBERT hears nothing else). People have 48 kHz stereo, 8 kHz
telephone, flac and ogg. `load` turns any of these into the one shape that the model knows, and turns every file that
is not usable speech into one clear line. `save` writes 16-bit wav and never leaves half a file behind.

Your own recordings. Make a folder that holds sound files and a `manifest.jsonl` with one JSON object a line:

    {"wav": "recordings/0001.flac", "text": "Tom is in the garden."}
    {"wav": "recordings/0002.ogg", "text": "What is three plus four?", "answer": "Three plus four is seven.",
     "kind": "question", "speaker": 3, "split": "heldout"}

`wav` is relative to the folder; any rate, mono or stereo. Only `wav` and `text` are needed: `read_manifest` fills
in the rest (id: the file's stem, speaker 0, kind "statement", split "train", family "own", seconds: measured).

References: libsndfile (http://libsndfile.github.io/libsndfile), soxr (https://sourceforge.net/p/soxr), and for the
layout of wav files http://soundfile.sapp.org/doc/WaveFormat.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16000
MIN_SAMPLES = 400  # 25 ms: HuBERT's receptive field, one frame
MAX_SECONDS = 4 * 3600  # decoded audio is held in memory: 4 hours are 0.9 GB
SILENCE = 1e-3  # -60 dB of full scale


def load(path: str | Path, rate: int = RATE) -> np.ndarray:
    """A sound file as (N,) float32 mono in [-1, 1] at `rate` Hz; wav, flac, ogg (and what else libsndfile reads).

    Raises FileNotFoundError, OSError or ValueError, each with one line, when the file is missing, a folder, empty,
    not sound, cut short, not finite, longer than 4 hours or shorter than 25 ms. Silence is allowed: `check_speech`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of one sound file (wav, flac or ogg)")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): record or copy it again")
    _check_whole(path)
    try:
        wav, source_rate = _decode(path)
    except (
        soundfile.LibsndfileError,
        TypeError,
    ) as error:  # TypeError: headerless .raw, whose rate nobody knows
        raise ValueError(f"{path} is not a sound file that can be read (wav, flac, ogg): {error}") from None
    if not np.isfinite(wav).all():
        raise ValueError(f"{path} contains samples that are not numbers (NaN or infinity): export it again")
    if source_rate != rate:
        wav = soxr.resample(wav, source_rate, rate)
    if len(wav) * RATE < MIN_SAMPLES * rate:
        raise ValueError(f"{path} holds {1000 * len(wav) / rate:.1f} ms of sound: at least 25 ms are needed")
    return np.ascontiguousarray(wav, dtype=np.float32)


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """(N,) float32 at the file's own rate. Read in blocks, so that long stereo files are never held in stereo."""
    with soundfile.SoundFile(path) as file:
        promised = file.frames
        if promised > MAX_SECONDS * file.samplerate:
            hours = promised / file.samplerate / 3600
            raise ValueError(f"{path} is {hours:.1f} hours long, the limit is 4: split it into shorter files")
        blocks = [block.mean(axis=1) for block in file.blocks(1 << 18, dtype="float32", always_2d=True)]
        rate = file.samplerate
    wav = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(wav) < promised:
        raise ValueError(_cut_short(path, promised / rate, len(wav) / rate))
    return wav, rate


def _cut_short(path: Path, promised: float, found: float) -> str:
    return (
        f"{path} is cut short: its header promises {promised:.2f} s, {found:.2f} s are there; copy it again"
    )


def _check_whole(path: Path) -> None:
    """Raises ValueError when a wav file ends before its data chunk does, or an ogg file before its last page.

    libsndfile reads both without a word. A data size of 0 or 0xFFFFFFFF means "unknown", as written by programs
    that stream into a pipe, and is fine.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(12)
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            bytes_per_second = 0
            while len(header := file.read(8)) == 8:
                name, length = header[:4], struct.unpack("<I", header[4:])[0]
                start = file.tell()
                if name == b"fmt " and length >= 16:
                    bytes_per_second = struct.unpack("<I", file.read(16)[8:12])[0]
                if name == b"data":
                    if length not in (0, 0xFFFFFFFF) and start + length > size:
                        per_second = bytes_per_second or 1
                        raise ValueError(_cut_short(path, length / per_second, (size - start) / per_second))
                    return
                file.seek(start + length + length % 2)  # chunks are padded to even length
            raise ValueError(f"{path} is a wav file without sound in it (cut short?): copy it again")
        if magic[:4] == b"OggS":
            file.seek(max(0, size - (1 << 17)))  # a page is at most 65,307 bytes
            tail = file.read()
            last = tail.rfind(b"OggS")
            if last < 0 or len(tail) < last + 6 or not tail[last + 5] & 4:  # bit 4: end of stream
                raise ValueError(
                    f"{path} is cut short: the last page of the ogg stream is missing; copy it again"
                )


def check_speech(wav: np.ndarray, name: str = "the recording") -> None:
    """Raises ValueError when there is nothing to hear in wav (N,): no 25 ms of it reach -60 dB."""
    frames = np.asarray(wav[: len(wav) // MIN_SAMPLES * MIN_SAMPLES], np.float32).reshape(-1, MIN_SAMPLES)
    loudest = float(np.sqrt((frames**2).mean(axis=1)).max()) if len(frames) else 0.0
    if loudest < SILENCE:
        raise ValueError(
            f"{name} is silent (nothing louder than -60 dB): check the microphone and record again"
        )


def save(path: str | Path, wav: np.ndarray, rate: int = RATE) -> None:
    """Writes wav (N,) in [-1, 1] as 16-bit mono wav. Atomic: the old file stays until the new one is complete.

    No fsync, for a corpus is thousands of small files that can be made again: after a power cut some may be empty.
    """
    wav = np.asarray(wav, np.float32)
    assert wav.ndim == 1, f"expected (N,) samples, got shape {wav.shape}"
    assert np.isfinite(wav).all(), "samples must be finite"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        soundfile.write(
            part, (wav.clip(-1, 1) * 32767).round().astype(np.int16), rate, "PCM_16", format="WAV"
        )
        os.replace(part, path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> list[dict]:
    """The rows of folder/manifest.jsonl with every field filled in (module docstring); ValueError names a bad line."""
    path = Path(folder) / "manifest.jsonl"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; make a corpus with `python data/tiny/prepare.py {folder}`"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("wav", "text")):
            raise ValueError(f'{path}, line {number}: a row needs "wav" and "text", both strings')
        wav = Path(folder) / row["wav"]
        if "seconds" not in row:
            row["seconds"] = len(load(wav)) / RATE
        elif not wav.exists():
            raise FileNotFoundError(f"{path}, line {number}: {wav}: no such file")
        rows.append(
            {"id": wav.stem, "speaker": 0, "kind": "statement", "split": "train", "family": "own"} | row
        )
    if not rows:
        raise ValueError(f"{path} has no rows: a corpus needs at least one recording")
    return rows
