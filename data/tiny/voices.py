"""Other people's voices for the tiny world: those of the speech engines that are installed; none is needed.

    sudo apt install flite espeak-ng festival festvox-kdlpc16k festvox-us-slt-hts

A voice is a number in the corpus: VOICES[i] is speaker 5 + i (0 to 4 are hibari's), whether or not those
before it are there. The last of them are held out: no training hears them, and `prepare.py --held_out` makes
a corpus of them alone, which evaluate.py reads. festival is an engine that no training uses.

References: Black & Lenzo 2001 (flite); https://github.com/espeak-ng/espeak-ng; Black & Taylor 1997 (festival)
"""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
)
HELD_OUT = (
    Voice("flite", "awb"),
    Voice("espeak-ng", "en-us+edward"),
    Voice("festival", "ked_diphone"),
    Voice("festival", "cmu_us_slt_arctic_hts"),
)
VOICES = TRAINING + HELD_OUT
PROGRAMS = {"flite": "flite", "espeak-ng": "espeak-ng", "festival": "text2wave"}


def speak(voice: Voice, text: str, pace: float = 1.0) -> np.ndarray:
    """(N,) float32 at 16 kHz, its peak at one half. ValueError, one line, if the engine fails or says
    nothing."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "spoken.wav"
        commands = {
            "flite": ["-voice", voice.name, "--setf", f"duration_stretch={1 / pace}", "-t", text, "-o", wav],
            "espeak-ng": ["-v", voice.name, "-s", round(155 * pace), "-w", wav, "--stdin"],
            "festival": ["-o", wav, "-eval", f"(voice_{voice.name})"],  # at its own pace
        }
        command = [PROGRAMS[voice.engine], *map(str, commands[voice.engine])]
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, errors="replace", timeout=SECONDS
            )
            if done.returncode:
                raise ValueError(f"ended with code {done.returncode}")
            found = audio.load(wav)
            if np.abs(found).max() < audio.SILENCE:
                raise ValueError("said nothing")
        except (OSError, ValueError, subprocess.TimeoutExpired) as problem:
            raise ValueError(f"{voice}: {audio.reason(problem, wav)}") from None
    return found * np.float32(0.5 / np.abs(found).max())


@cache
def problem(voice: Voice) -> str:
    """Why a voice cannot be used; "" if it can."""
    if not shutil.which(PROGRAMS[voice.engine]):
        return f"{voice}: {PROGRAMS[voice.engine]} is not installed"
    try:
        speak(voice, "One.")
    except ValueError as fault:
        return str(fault)
    return ""


def installed(wanted: tuple[Voice, ...]) -> list[int]:
    """The numbers in VOICES of those that can be used."""
    return [VOICES.index(voice) for voice in wanted if not problem(voice)]
