"""A request and its reply: what may be asked of a model, what it answers, and the files of an answer.

    Request(mode="s2t", task="asr")             recognition; a mistake in it is a ValueError of one line
    modalities("q.wav", Request())              ("s", "s"): what names a file is a recording, the rest is text
    reply_paths(["q.wav"], Path("replies"))     [replies/q.wav], or q-2.wav if another program made a q.wav

sample.py answers a `Request` (SpeechGPT §3.2, Appendices C and E).
"""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import audio
from files import read_json
from generate import GREEDY, PAPER, Sampling

# ---- A request and its reply -------------------------------------------------------------------------------

TASKS = ("chat", "asr", "tts", "continue")
MODES = ("s2s", "s2t", "t2s", "t2t", "*2s", "*2t")  # speech or text in, out; "*": whatever the prompt is
STYLES = ("auto", "paper", "released")

Prompt = str | Path | np.ndarray  # a text or the name of a sound file; samples (N,) at 16 kHz


@dataclass(frozen=True)
class Request:
    """What is asked of the model, for any number of prompts. A mistake is a ValueError of one line."""

    mode: str = "*2s"  # one of MODES; tasks asr and tts set it themselves
    task: str = "chat"  # one of TASKS
    chain: bool = True  # chat by chain of modality (Appendix C); False: standard prompting (Appendix E)
    style: str = "auto"  # of the templates, one of STYLES: see SpeechGPT.style
    text: Sampling = GREEDY  # how text is drawn
    speech: Sampling = PAPER  # how units are drawn
    max_new: int | None = None  # most tokens of an answer; None: what the context holds
    seed: int = 0  # of all random numbers
    speaker: int | None = None  # for a vocoder of several speakers
    free: bool = False  # generate without the grammar
    show: bool = False  # a progress bar
    takes: int | None = None  # how often speech is drawn at most (`SpeechGPT.redraw`); None: SpeechGPT.takes

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("task", TASKS), ("style", STYLES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if self.max_new is not None and self.max_new < 1:
            raise ValueError(f"max_new is {self.max_new}; an answer has at least one token")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; choose 0 or more, below 2^63")
        if self.takes is not None and self.takes < 1:
            raise ValueError(f"takes is {self.takes}; speech is drawn at least once")
        if self.takes is not None and self.takes > 1 and not self.speaks_text:
            raise ValueError("takes > 1 need a text to compare with: not asr, continue, standard prompting")

    @property
    def speaks_text(self) -> bool:
        """Whether the text of the spoken answer is known: the prompt of tts, [ta] of a chain of modality."""
        return self.task == "tts" or (self.task == "chat" and self.chain)


class RenderedPrompt(NamedTuple):
    """A prompt in its template."""

    ids: list[int]
    target: str  # modality of the answer, "s" or "t"
    seconds: float = 0.0  # of speech in the prompt
    text: str = ""  # a text prompt without its template


@dataclass
class Reply:
    """The answer to one prompt. wav (N,) is float32 at 16 kHz, or None without speech; `note` says why."""

    transcript: str  # of a spoken prompt, by the model
    text: str  # the answer
    units: list[int]  # the spoken answer
    wav: np.ndarray | None
    note: str = ""  # what is missing or cut off; empty if all went well
    stats: dict = field(default_factory=dict)


def is_sound(prompt: Prompt) -> bool:
    """Samples, a path, or a string with the shape of a file's name."""
    return not isinstance(prompt, str) or audio.is_file_name(prompt)


def is_missing(prompt: Prompt) -> bool:
    """A sound file that is not there."""
    return not isinstance(prompt, np.ndarray) and is_sound(prompt) and not os.path.exists(prompt)


def no_file(prompt: Prompt) -> FileNotFoundError:
    return FileNotFoundError(f"{prompt}: no such file; if it is a text, add --in text")


def modalities(prompt: Prompt, request: Request) -> tuple[str, str]:
    """Modality of the prompt and of the answer, "s" or "t" each."""
    if request.task == "asr":
        return "s", "t"
    if request.task == "tts":
        return "t", "s"
    source, target = request.mode.split("2")
    if source == "*":
        source = "s" if is_sound(prompt) else "t"
    if request.task == "continue":
        target = source
    return source, target


# ---- The files of a reply ---------------------------------------------------------------------------------

RECORD = {"prompt", *(field.name for field in fields(Reply))}  # keys of a reply's json


def reply_paths(prompts: list[str], out: Path) -> list[Path]:
    """The path of each reply's wav; its json has the same name. A file that is no reply is never replaced:
    the reply becomes NAME-2.wav, or it is a ValueError if `out` names the file."""
    taken = {where(Path(prompt)) for prompt in prompts if os.path.exists(prompt)}
    paths: list[Path] = []
    for prompt in prompts:
        name = Path(prompt).stem if is_sound(prompt) else re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40]
        name = "".join(filter(str.isprintable, name)).encode()[:200].decode(errors="ignore") or "reply"
        path = out if is_wav(out) else out / f"{name}.wav"
        number = 1
        while not is_free(path, taken):
            if is_wav(out):
                raise ValueError(
                    f"{out} or its .json is there and is no reply of this program: choose another --out"
                )
            number += 1
            path = out / f"{name}-{number}.wav"
        taken.add(where(path))
        paths.append(path)
    return paths


def is_wav(out: Path) -> bool:
    return out.suffix.lower() == ".wav"


def where(path: Path) -> str:
    """The same for two names of one file, on a disk that does not tell "A" from "a" as well."""
    return os.path.realpath(path).lower()


def is_free(path: Path, taken: set[str]) -> bool:
    """Whether a reply's wav and json can be written: nothing is there, or an earlier reply."""
    record = path.with_suffix(".json")
    if where(path) in taken:
        return False
    if not os.path.lexists(record):
        return not os.path.lexists(path)
    try:
        row = read_json(record)
    except (ValueError, OSError):
        return False
    is_reply = isinstance(row, dict) and RECORD <= row.keys()
    return is_reply and (row["wav"] == path.name or not os.path.lexists(path))
