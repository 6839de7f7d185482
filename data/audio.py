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

import io
import json
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

from files import write_atomic

RATE = 16000  # samples a second
WINDOW = 400  # samples that a frame of HuBERT sees: 25 ms
HOP = 320  # samples from frame to frame: 20 ms
MAX_SECONDS = 4 * 3600  # decoded audio is held in memory: 4 hours are 0.9 GB
SILENCE = 1e-3  # -60 dB of full scale


def n_frames(n_samples: int) -> int:
    """How many frames of HuBERT there are in `n_samples` (>= WINDOW) at 16 kHz. Takes tensors too."""
    return (n_samples - WINDOW) // HOP + 1


def load(path: str | Path, rate: int = RATE) -> np.ndarray:
    """A sound file as (N,) float32 mono in [-1, 1] at `rate` Hz; wav, flac, ogg (and what else libsndfile reads).

    Raises FileNotFoundError, OSError or ValueError, each with one line, when the file is missing, a folder, empty,
    not sound, cut short, not finite, longer than 4 hours or shorter than 25 ms. Silence is allowed: `check_speech`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of one sound file (wav, flac or ogg)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): record or copy it again")
    _check_end(path)
    try:
        wav, found_rate = _decode(path)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: .raw, whose rate nobody knows
        raise ValueError(f"{path} is not a sound file that can be read (wav, flac, ogg): {error}") from None
    if not np.isfinite(wav).all():
        raise ValueError(f"{path} contains samples that are not numbers (NaN or infinity): export it again")
    if found_rate != rate:
        wav = soxr.resample(wav, found_rate, rate)
    if len(wav) * RATE < WINDOW * rate:
        raise ValueError(f"{path} holds {1000 * len(wav) / rate:.1f} ms of sound: at least 25 ms are needed")
    return np.ascontiguousarray(wav, dtype=np.float32)


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """((N,) float32, its rate). Read in blocks, so that a long stereo file is never held in stereo."""
    with soundfile.SoundFile(path) as file:
        rate, promised = file.samplerate, file.frames
        if not 1000 <= rate <= 400_000:
            raise ValueError(
                f"{path} claims a sample rate of {rate} Hz: no recording has that; export it again"
            )
        if promised > MAX_SECONDS * rate:
            raise ValueError(f"{path} is {promised / rate / 3600:.1f} hours long, the limit is 4: split it")
        blocks = file.blocks(
            max(1, (1 << 20) // file.channels), dtype="float32", always_2d=True
        )  # (N, channels)
        wav = np.concatenate([block.mean(axis=1) for block in blocks] or [np.zeros(0, np.float32)])
    if len(wav) < promised:
        raise ValueError(_cut_short(path, promised / rate, len(wav) / rate))
    return wav, rate


def _cut_short(path: Path, promised: float, found: float) -> str:
    return f"{path} is cut short: {found:.2f} of {promised:.2f} s are there; copy it again"


def _check_end(path: Path) -> None:
    """Raises ValueError when a wav file ends before its data chunk does, or an ogg file before its last page.

    libsndfile reads both without a word. A data size of 0 or 0xFFFFFFFF, as written by programs that stream into a
    pipe, means "unknown" and is fine.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(12)
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            bytes_per_second = 1
            while len(header := file.read(8)) == 8:
                name, length, start = header[:4], struct.unpack("<I", header[4:])[0], file.tell()
                if name == b"fmt " and length >= 16 and len(format_ := file.read(16)) == 16:
                    bytes_per_second = max(1, struct.unpack("<I", format_[8:12])[0])
                if name == b"data":
                    if length not in (0, 0xFFFFFFFF) and start + length > size:
                        raise ValueError(
                            _cut_short(path, length / bytes_per_second, (size - start) / bytes_per_second)
                        )
                    return
                file.seek(start + length + length % 2)  # chunks are padded to even length
            raise ValueError(f"{path} is cut short: a wav file without its data chunk; copy it again")
        if magic[:4] == b"OggS":
            file.seek(max(0, size - (1 << 17)))  # a page has at most 65,307 bytes
            tail = file.read()
            page = tail[max(0, tail.rfind(b"OggS")) :]
            sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""  # of the page's segments
            last = sizes and page[5] & 4  # this bit marks the last page of a stream
            if not last or len(page) < 27 + len(sizes) + sum(sizes):
                raise ValueError(f"{path} is cut short: the end of its ogg stream is missing; copy it again")


def check_speech(wav: np.ndarray, name: str = "the recording") -> None:
    """Raises ValueError when there is nothing to hear in wav (N,): no 25 ms of it reach -60 dB."""
    frames = np.asarray(wav[: len(wav) // WINDOW * WINDOW], np.float32).reshape(-1, WINDOW)
    if np.sqrt((frames**2).mean(axis=1)).max(initial=0.0) < SILENCE:
        raise ValueError(
            f"{name} is silent (nothing louder than -60 dB): check the microphone and record again"
        )


def play(wav: np.ndarray, rate: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """wav (N,) at 16 kHz as if somebody else had said it, (about N / rate,): `rate` times as fast, with pitch and
    formants `pitch` times as high."""
    return soxr.resample(stretch(wav, rate / pitch), RATE * pitch, RATE)


def stretch(wav: np.ndarray, pace: float, window: int = 480, search: int = 120) -> np.ndarray:
    """wav (N,) said `pace` times as fast in the same voice: (N / pace,), by WSOLA (Verhelst & Roelands 1993).

    Pieces of `window` samples (30 ms), each half over the next, are laid at an even distance and taken from where the
    pace leads, or up to `search` samples (7.5 ms) beside it, where they go on most like the piece before.
    """
    hop, length = window // 2, round(len(wav) / pace)
    padded = np.pad(
        wav, (search + hop, search + 2 * window + hop)
    )  # sample n of wav is sample n + search + hop here
    said, fade = np.zeros(length + 2 * window, np.float32), np.hanning(window + 1)[:-1].astype(np.float32)
    taken = search
    for at in range(0, length + hop, hop):
        first = min(round(at * pace), len(wav))  # of the places to take a piece from
        if at:
            goes_on = padded[taken + hop : taken + hop + window]
            near = padded[first : first + 2 * search + window]
            taken = first + int(np.correlate(near, goes_on, "valid").argmax())
        said[at : at + window] += fade * padded[taken : taken + window]
    return said[hop : hop + length]


def save(path: str | Path, wav: np.ndarray, rate: int = RATE) -> None:
    """Writes wav (N,) in [-1, 1] as 16-bit mono wav. Atomic: an old file stays until the new one is complete.

    Without sync: a corpus is thousands of small files that can be made again.
    """
    wav = np.asarray(wav, np.float32)
    assert wav.ndim == 1, f"expected (N,) samples, got shape {wav.shape}"
    assert np.isfinite(wav).all(), "samples must be finite"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    soundfile.write(content, (wav.clip(-1, 1) * 32767).round().astype(np.int16), rate, "PCM_16", format="WAV")
    write_atomic(path, content.getvalue(), sync=False)


def read_manifest(folder: str | Path) -> list[dict]:
    """The rows of folder/manifest.jsonl with every field filled in (see the top); ValueError names a bad line."""
    path = Path(folder) / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; `python data/tiny/prepare.py {folder}` makes a corpus"
        )
    rows, names = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); mend or remove it") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("wav", "text")):
            raise ValueError(f'{where}: a row needs "wav" and "text", both strings')
        wav = Path(folder) / row["wav"]
        row = {
            "id": Path(row["wav"]).stem,
            "speaker": 0,
            "kind": "statement",
            "split": "train",
            "family": "own",
        } | row
        if not wav.is_file():
            raise FileNotFoundError(f"{where}: {wav}: no such file")
        if row["split"] not in ("train", "rendition", "heldout"):
            raise ValueError(f"{where}: split is '{row['split']}'; choose train, rendition or heldout")
        if row["id"] in names:
            raise ValueError(f"{where}: id '{row['id']}' is used twice; give each recording its own")
        names.add(row["id"])
        if "seconds" not in row:
            row["seconds"] = len(load(wav)) / RATE
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows: a corpus needs at least one recording")
    return rows
