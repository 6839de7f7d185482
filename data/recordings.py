"""One recording of a corpus: can it be used, and where in the output does it belong?

A recipe (data/recipe.py) says what is spoken in a recording, as a `Job`; `finish` opens it, in a worker
process, and gives the rows of the manifest, or the reason why there are none.
"""

import math
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import archives, audio
from data.corpus import MARKER
from files import stream_atomic

AUDIO = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf", ".sph")
UNREADABLE = tuple(".m4a .mp4 .aac .wma .webm .amr .gsm .g722 .sln .ulaw .alaw .ra".split())


class Utterance(NamedTuple):
    id: str
    text: str
    speaker: str = ""
    split: str = ""  # train or heldout; "": drawn by a hash
    begin: float | None = None  # seconds, in a long recording; None: the whole recording
    end: float | None = None
    family: str = ""
    where: str = ""  # of its transcript


class Job(NamedTuple):
    """A recording and what is spoken in it: one utterance, or many, in the order of `begin`."""

    audio: str  # path below the source
    utterances: list[Utterance]
    work: int = 1  # of the recipe's `total`


class Skipped(NamedTuple):
    audio: str
    reason: str  # "what: details"; counted by what stands before the colon
    where: str = ""
    work: int = 0


@dataclass(frozen=True)
class Settings:
    """What is done with every recording; flags of all recipes."""

    source: str
    out: str
    min_seconds: float = 0.2
    max_seconds: float = 60.0
    heldout: float = 0.05
    split_by: str = "text"
    english: bool = False
    quick: bool = False
    copy: bool = False
    texts: bool = True  # False: the corpus has no transcripts


# ---- From a job to rows ------------------------------------------------------------------------------------


def finish(settings: Settings, batch: list[Job | Skipped]) -> list[tuple[list[dict], list[dict]]]:
    """For each job (rows of the manifest, what is left out of it)."""
    return [_finish_one(settings, job) for job in batch]


def _finish_one(settings: Settings, job: Job | Skipped) -> tuple[list[dict], list[dict]]:
    if isinstance(job, Skipped):
        return [], [_left_out(job.audio, job.reason, job.where)]
    rows, skipped, good = [], [], []
    refused = archives.name_problem(job.audio)
    for utterance in job.utterances:
        utterance = utterance._replace(text=clean(utterance.text), speaker=clean(utterance.speaker))
        if problem := f"refused: {refused}" if refused else utterance_problem(utterance, settings):
            skipped.append(_left_out(job.audio, problem, utterance.where))
        else:
            good.append(utterance)
    if good:
        results = (_whole if good[0].begin is None else _cuts)(settings, job, good)
        for utterance, done in zip(good, results):
            if isinstance(done, str):
                skipped.append(_left_out(job.audio, done, utterance.where))
            else:
                rows.append(_row(settings, utterance, *done))
    return rows, skipped


def _row(settings: Settings, utterance: Utterance, wav: str, seconds: float) -> dict:
    by = utterance.speaker if settings.split_by == "speaker" else utterance.text.lower()
    by = by or utterance.id
    split = utterance.split or ("heldout" if chance(by) < settings.heldout else "train")
    return {
        "id": utterance.id,
        "wav": wav,
        "text": utterance.text,
        **({"speaker": utterance.speaker} if utterance.speaker else {}),
        "split": split,
        "kind": "statement",
        "family": utterance.family,
        "seconds": round(seconds, 4),
    }


def _left_out(path: str, reason: str, where: str) -> dict:
    return {"audio": path, "reason": reason, **({"where": where} if where else {})}


def chance(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return number(text) / 2**64


def number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def clean(text: str) -> str:
    """One line, composed letters (NFC), no control characters: what a terminal shows without harm."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = " ".join(text.split())
    return "".join(c for c in text if not archives.has_harmful(c)) if archives.has_harmful(text) else text


def utterance_problem(utterance: Utterance, settings: Settings) -> str:
    """Why an utterance cannot be used, as far as it can be known without its recording; "" if it can."""
    text = utterance.text
    if settings.texts and not any(letter.isalnum() for letter in text):
        return "empty text"
    if settings.texts and re.fullmatch(r"\[[^]]*]|<[^>]*>", text):
        return f"no speech: {text}"
    if len(text) > 5000:
        return f"text too long: {len(text)} letters"
    if settings.english and (letter := foreign_letter(text)):
        return f"text not English: it has the letter {letter!a}"
    if MARKER.search(text):
        return f"text with a marker that means something to the model: {MARKER.search(text)[0]}"
    if archives.has_harmful(utterance.id):
        return "a name with control characters"
    if len(utterance.id) > 200 or len(utterance.speaker) > 200:
        return "name too long: of the recording or its speaker, more than 200 characters"
    if utterance.begin is None:
        return ""
    if not 0 <= utterance.begin < math.inf or not utterance.end < math.inf:
        return "times make no sense"
    if archives.name_problem(utterance.id):
        return f"refused: {archives.name_problem(utterance.id)}"
    return length_problem(utterance.end - utterance.begin, settings)


def foreign_letter(text: str) -> str:
    """The first letter that is not a-z, with or without an accent; "" if all are."""
    if text.isascii():
        return ""
    letters = (letter for letter in text if letter.isalpha())
    return next((letter for letter in letters if not unicodedata.normalize("NFKD", letter)[0].isascii()), "")


def _whole(settings: Settings, job: Job, utterances: list[Utterance]) -> Iterator[tuple[str, float] | str]:
    """(path below OUT, seconds) of a recording that is one utterance, or why it cannot be used."""
    path = Path(settings.source, job.audio)
    for _ in utterances:
        try:
            seconds = measure(path, settings)
        except (OSError, ValueError) as error:
            yield audio.reason(error, path)
            continue
        yield place(path, job.audio, settings), seconds


def measure(path: Path, settings: Settings) -> float:
    """The length of a recording that can be used, in seconds; ValueError or OSError says why it cannot."""
    if path.suffix.lower() in UNREADABLE:
        raise ValueError(f"format cannot be read ({path.suffix.lower()}): convert it to flac")
    seconds = audio.seconds(path)
    if problem := length_problem(seconds, settings):
        raise ValueError(problem)
    if settings.quick:
        return seconds
    wav = audio.load(path)
    seconds = len(wav) / audio.RATE
    if problem := length_problem(seconds, settings):  # a header may say anything
        raise ValueError(problem)
    audio.check_speech(wav, path)
    return seconds


def length_problem(seconds: float, settings: Settings) -> str:
    if seconds < settings.min_seconds:
        return f"too short: {seconds:.2f} s, --min-seconds is {settings.min_seconds:g}"
    if seconds > settings.max_seconds:
        return f"too long: {seconds:.0f} s, --max-seconds is {settings.max_seconds:g}; split it"
    return ""


def place(path: Path, name: str, settings: Settings) -> str:
    """Where in OUT a recording is, below OUT: in its own place, or a hard link, or a copy."""
    out = Path(settings.out)
    source = os.path.realpath(settings.source)
    inside = os.path.realpath(out)
    if source == inside or source.startswith(inside.rstrip(os.sep) + os.sep):
        return Path(source).relative_to(inside).joinpath(name).as_posix()
    target = out / "audio" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    path = Path(os.path.realpath(path))  # a link to a link would be one that points to SOURCE
    if target.exists() and target.samefile(path):
        if not settings.copy:
            return f"audio/{name}"
    elif not settings.copy:
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
            os.replace(temporary, target)
            return f"audio/{name}"
        except OSError:
            temporary.unlink(missing_ok=True)  # refused: copied below
    with open(path, "rb") as file:
        stream_atomic(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 20), sync=False)
    return f"audio/{name}"


def _cuts(settings: Settings, job: Job, utterances: list[Utterance]) -> Iterator[tuple[str, float] | str]:
    """(path below OUT, seconds) of each utterance, cut out of a long recording, or why it cannot be used."""
    path = Path(settings.source, job.audio)
    parts = audio.cut(path, [(utterance.begin, utterance.end) for utterance in utterances])
    damage = ""
    for utterance in utterances:
        try:
            wav = None if damage else next(parts)
        except (OSError, ValueError) as error:
            damage = f"recording damaged: {audio.reason(error, path)}"
        if damage:
            yield damage
        elif len(wav) < (utterance.end - utterance.begin - 0.1) * audio.RATE:
            yield f"cut short: the recording ends before {utterance.end:.2f} s"
        elif not (np.isfinite(wav).all() and np.abs(wav).max(initial=0) > audio.SILENCE):
            yield "silent"
        else:
            name = f"cut/{Path(job.audio).with_suffix('').as_posix()}/{Path(utterance.id).name}.flac"
            audio.save(Path(settings.out, name), wav)
            yield name, len(wav) / audio.RATE
