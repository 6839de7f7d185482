"""Augmentation: a recording as another person would have spoken it, in another room, over another line.

    imitate(wav, draw, section, babble)
      a speaker        pace, pitch and formants, each by its own factor; silence around
      a place          level, tone, room response, noise of 5 to 30 dB: white, pink or other people talking
      a line           telephone band, low bit rate, clipping

Each is a pure function of the samples and of what `draw` draws, and is small enough to be read. A place and a
line keep every sample where it is, so that labels stay true; of pace and silence `Imitated` tells where the
samples went (`data/crops.py` moves the labels).

References: Ko et al. 2015, 2017 (speed; reverberation and noise); Snyder et al. 2015, "MUSAN" (babble);
            Oppenheim & Schafer 1968 (homomorphic: the envelope is the slow part of the log spectrum)
            ITU-T G.712 (telephone band), G.711 (mu-law); Moorer 1979 (a room as noise that decays)
"""

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import soundfile
import soxr

from config import Limits, Share
from data.audio import HOP, RATE, change_pace_and_pitch
from starting import signals_held

Decibels = Annotated[float, Limits(-20, 60)]
Spread = Annotated[float, Limits(0, 0.7)]  # s: a factor is drawn log-uniformly from [e^-s, e^s]
Seconds = Annotated[float, Limits(0, 5)]
Decay = Annotated[float, Limits(0.01, 5)]
Draw = np.random.Generator
Babble = Callable[[Draw], np.ndarray]  # another recording, (N,)


@dataclass
class Imitation:
    """How far a recording is changed, and how often in each way."""

    share: Share = 0.0  # of recordings that are changed at all
    # of whole recordings alone ([units.imitation]); crops have `perturb` for it
    pace: Spread = 0.2
    pitch: Spread = 0.3
    silence: Seconds = 0.5  # at most so much before and after
    # of both
    formants: Spread = 0.15
    level: Annotated[float, Limits(0, 60)] = 12.0  # at most so many dB softer or louder
    room: Share = 0.3  # how often there is one
    decay: tuple[Decay, Decay] = (0.1, 0.6)  # seconds to -60 dB
    noise: Share = 0.5
    ratio: tuple[Decibels, Decibels] = (5.0, 30.0)  # of speech to noise
    telephone: Share = 0.1
    codec: Share = 0.1
    clipping: Share = 0.05
    tone: Share = 0.0  # another microphone or voice: some octaves louder, others softer
    octave: Annotated[float, Limits(0, 40)] = 10.0  # each by at most so many dB

    def __post_init__(self):
        for name, (least, most) in (("decay", self.decay), ("ratio", self.ratio)):
            if least > most:
                raise ValueError(f"{name} is from {least} to {most}; the smaller number comes first")


class Imitated(NamedTuple):
    """Sample n of `wav` was sample pace * (n - before) of the recording."""

    wav: np.ndarray  # (N,)
    pace: float
    before: int


def imitate(wav: np.ndarray, draw: Draw, how: Imitation, babble: Babble | None = None) -> Imitated:
    """wav (N,) at 16 kHz as another person would have said it somewhere else."""
    pace, pitch = (math.exp(draw.uniform(-most, most)) for most in (how.pace, how.pitch))
    wav = change_pace_and_pitch(wav, pace, pitch)
    before, after = (round(draw.uniform(0, how.silence) * RATE / HOP) * HOP for _ in range(2))
    wav = np.pad(wav, (before, after))
    return Imitated(disguise(wav, draw, how, babble, moved=pitch), pace, before)


def disguise(
    wav: np.ndarray, draw: Draw, how: Imitation, babble: Babble | None = None, moved: float = 1.0
) -> np.ndarray:
    """wav (N,) with other formants (they were `moved` by this factor already), in another place and over
    another line: no sample moves, so that labels stay true."""
    wav = warp_formants(wav, math.exp(draw.uniform(-how.formants, how.formants)) / moved)
    return place(wav, draw, how, babble)


def place(wav: np.ndarray, draw: Draw, how: Imitation, babble: Babble | None = None) -> np.ndarray:
    """wav (N,) in another place and over another line: no sample moves."""
    if draw.random() < how.room:
        wav = reverberate(wav, room(draw, draw.uniform(*how.decay), draw.uniform(0, 15)))
    if draw.random() < how.noise:
        color = draw.choice(["white", "pink", "babble"])
        if color == "babble" and babble is not None:
            other = sum(np.resize(babble(draw), len(wav)) for _ in range(draw.integers(3, 7)))
        else:
            other = noise(draw, len(wav), 1.0 if color == "pink" else 0.0)
        wav = mix(wav, other, draw.uniform(*how.ratio))
    if draw.random() < how.clipping:
        wav = clip(wav, draw.uniform(0.2, 0.7))
    if draw.random() < how.telephone:
        wav = telephone(wav)
    if draw.random() < how.codec:
        wav = encode(wav, draw.choice([*CODECS]))
    wav = louder(wav, draw.uniform(-how.level, how.level))
    if draw.random() < how.tone:
        wav = equalize(wav, draw.uniform(-how.octave, how.octave, len(OCTAVES)))
    return wav


# ---- A speaker ---------------------------------------------------------------------------------------------
# Pace and pitch: audio.change_pace_and_pitch, where formants go with the pitch.

FRAME = 512  # samples: 32 ms
LIFTER = 40  # cepstral coefficients that make the envelope: below those of a pitch of 400 Hz


def warp_formants(wav: np.ndarray, factor: float) -> np.ndarray:
    """wav (N,) with the resonances of the vocal tract `factor` times as high, pitch and pace as they are.

    The envelope of each frame's spectrum, its first cepstral coefficients, is stretched along the frequency
    axis, and the spectrum multiplied by the new envelope over the old one."""
    hop = FRAME // 2
    window = np.sin(np.pi * (np.arange(FRAME, dtype=np.float32) + 0.5) / FRAME)  # twice: squares add to 1
    padded = np.pad(wav, (FRAME, 2 * FRAME))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::hop] * window  # (T, FRAME)
    spectra = np.fft.rfft(frames)  # (T, FRAME / 2 + 1)
    cepstra = np.fft.irfft(np.log(np.abs(spectra) + 1e-4))
    cepstra[:, LIFTER:-LIFTER] = 0
    envelope = np.fft.rfft(cepstra).real  # of the logarithm
    source = np.arange(FRAME // 2 + 1, dtype=np.float32) / factor
    low = source.astype(int).clip(0, FRAME // 2 - 1)
    part = (source - low).clip(0, 1)
    warped = envelope[:, low] * (1 - part) + envelope[:, low + 1] * part
    changed = np.fft.irfft(spectra * np.exp(warped - envelope)) * window
    out = np.zeros(len(padded), np.float32)
    for half in range(2):  # every second frame: these do not overlap
        some = changed[half::2].reshape(-1)
        out[half * hop :][: len(some)] += some
    return out[FRAME : FRAME + len(wav)]


# ---- A place -----------------------------------------------------------------------------------------------


def louder(wav: np.ndarray, decibels: float) -> np.ndarray:
    return wav * np.float32(10 ** (decibels / 20))


OCTAVES = 62.5 * 2.0 ** np.arange(8)  # Hz: 62.5 to 8,000


def equalize(wav: np.ndarray, decibels: np.ndarray) -> np.ndarray:
    """wav (N,) with each of OCTAVES so many decibels (8,) louder, and in between what lies between; as loud
    as before."""
    if not len(wav):
        return wav
    spectrum = np.fft.rfft(wav)
    octave = np.log2(np.fft.rfftfreq(len(wav), 1 / RATE).clip(OCTAVES[0]))
    gain = 10 ** (np.interp(octave, np.log2(OCTAVES), decibels) / 20)
    changed = np.fft.irfft(spectrum * gain, len(wav)).astype(np.float32)
    power = float(np.mean(changed**2))
    return changed * np.float32(math.sqrt(float(np.mean(wav**2)) / power)) if power else wav


def room(draw: Draw, decay: float, direct: float) -> np.ndarray:
    """The response (R,) of a room: the direct sound at 0, then noise that falls by 60 dB in `decay` seconds
    and has `direct` dB less energy."""
    t = np.arange(1, max(2, round(decay * RATE))) / RATE
    tail = draw.standard_normal(len(t)) * 10 ** (-3 * t / decay)
    tail *= 10 ** (-direct / 20) / np.linalg.norm(tail)
    return np.concatenate([[1.0], tail]).astype(np.float32)


def reverberate(wav: np.ndarray, response: np.ndarray) -> np.ndarray:
    """wav (N,) convolved with response (R,): (N,), the end of the tail cut off."""
    size = 1 << (len(wav) + len(response) - 2).bit_length()
    both = np.fft.rfft(wav, size) * np.fft.rfft(response, size)
    return np.fft.irfft(both, size)[: len(wav)].astype(np.float32)


def noise(draw: Draw, n_samples: int, slope: float = 0.0) -> np.ndarray:
    """(N,) noise of power 1 whose power falls as 1 / f^slope: 0 white, 1 pink."""
    spectrum = np.fft.rfft(draw.standard_normal(n_samples))
    f = np.arange(len(spectrum)).clip(1)
    x = np.fft.irfft(spectrum / f ** (slope / 2), n_samples)
    return (x / (x.std() or 1.0)).astype(np.float32)


def mix(wav: np.ndarray, other: np.ndarray, ratio: float) -> np.ndarray:
    """wav (N,) with other (N,) `ratio` dB below it."""
    power, theirs = float(np.mean(wav**2)), float(np.mean(other**2))
    if not theirs:
        return wav
    return wav + other * np.float32(math.sqrt(power / theirs) * 10 ** (-ratio / 20))


# ---- A line ------------------------------------------------------------------------------------------------


def clip(wav: np.ndarray, share: float) -> np.ndarray:
    """wav (N,) cut off at `share` of its peak."""
    most = share * float(np.abs(wav).max(initial=0.0))
    return wav.clip(-most, most)


def telephone(wav: np.ndarray) -> np.ndarray:
    """wav (N,) through 300 to 3,400 Hz and 8 bits of mu-law."""
    spectrum = np.fft.rfft(wav)
    hertz = np.fft.rfftfreq(len(wav), 1 / RATE)
    spectrum[(hertz < 300) | (hertz > 3400)] = 0
    return mu_law(np.fft.irfft(spectrum, len(wav)).astype(np.float32))


def mu_law(wav: np.ndarray, mu: int = 255) -> np.ndarray:
    """wav (N,) rounded to 8 bits that are finer for softer samples (G.711), its peak at full scale."""
    peak = float(np.abs(wav).max(initial=0.0)) or 1.0
    small = np.sign(wav) * np.log1p(mu * np.abs(wav) / peak) / math.log1p(mu)  # in [-1, 1]
    small = np.round(small * 127) / 127
    return (np.sign(small) * np.expm1(np.abs(small) * math.log1p(mu)) / mu * peak).astype(np.float32)


CODECS = {  # rate, format and subtype as libsndfile names them
    "mp3": (16000, "MP3", "MPEG_LAYER_III"),  # some 25 kbit/s
    "opus": (16000, "OGG", "OPUS"),  # 12
    "gsm": (8000, "WAV", "GSM610"),  # 13
}


def encode(wav: np.ndarray, codec: str) -> np.ndarray:
    """wav (N,) written by one of CODECS at its lowest rate and read again, in memory. Where libsndfile was
    built without it: mu-law."""
    rate, format, subtype = CODECS[codec]
    worst = {} if codec == "gsm" else {"compression_level": 0.99}
    file = io.BytesIO()
    try:
        there = soxr.resample(wav, RATE, rate).clip(-1, 1)
        with signals_held():
            soundfile.write(file, there, rate, subtype, format=format, **worst)
            file.seek(0)
            back, rate = soundfile.read(file, dtype="float32")
    except (soundfile.LibsndfileError, ValueError, TypeError):  # TypeError: of an old soundfile
        return mu_law(wav)
    back = soxr.resample(back, rate, RATE)[: len(wav)]
    return np.pad(back, (0, len(wav) - len(back)))


# ---- Which draws -------------------------------------------------------------------------------------------


def draw_of(*what) -> Draw:
    """The generator of what is named so, whichever process asks: draw_of(seed, "hubert", crop)."""
    return np.random.default_rng(zlib.crc32(" ".join(map(str, what)).encode()))
