"""The tiny world of world.py, spoken: some three hours of audio in two minutes on two cores.

    python data/tiny/prepare.py out/corpus
    python data/tiny/prepare.py out/ci --sentences 20      # three minutes of audio, for a quick test
    python data/tiny/prepare.py out/voices --held_out 60   # 60 questions in each unseen voice

This stands in for the speech of the paper (LibriLight, Gigaspeech, CommonVoice; §4.1, §5.1) and for its
spoken instructions (§3.2, made from text with a TTS, as here). The voice is hibari (Apache-2.0, inside its
wheel). Further speakers are the same voice resampled by a factor r: pitch and formants move together, as with
a shorter or longer vocal tract, while the pace is set independently. Speaker 0 (r = 1) is the target speaker,
in whose voice the model answers: it speaks every answer, at an even pace. Everything else is spoken by all
speakers, faster and slower. With `voices`, other engines' voices (voices.py) say the training questions and
statements, too, each of which the target speaker then says once, for the speech normalizer to compare. A
corpus of voices is of other engines alone, and their names are its speakers (evaluation/voices.py reads it).

    OUT/wav/ID.wav        16 kHz, 16 bit, mono
    OUT/manifest.jsonl    {"id": "plus-5b0c81d2f3a4e697", "wav": "wav/plus-5b0c81d2f3a4e697.wav",
                           "text": "What is three plus four?", "answer": "Three plus four is seven.",
                           "speaker": 3, "seconds": 1.4, "kind": "question", "split": "train",
                           "family": "plus"}
                          kind: question (with its answer), answer, statement, or reading: a statement that
                          only the target speaker reads, so that TTS sees sentences that are no answers
    OUT/voices.json       the voices of other engines that speak, and those that do not, with reasons
    OUT/dialogues.jsonl   {"question": ..., "answer": ..., "family": ..., "split": ..., "spoken": true}
                          every wording of every question; only some of them have recordings ("spoken")

Splits: train and heldout as in world.py, and rendition: other recordings (another speaker, pace, noise) of
questions and statements of train. Only rows whose split is train may be trained on.

Every random choice is a hash of the text it is made for. So the same seed gives the same bytes, a file's name
stands for one content, and a run that was killed, or is repeated with another size, makes only the files that
are missing.
"""

import os
import re
import sys
from collections import Counter
from concurrent.futures import as_completed
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Limits, Parser, command_line, deaf_to_ctrl_c, end_with_parent, load
from data import audio
from data.corpus import TARGET_SPEAKER, read_manifest, write_manifest
from data.recipe import worker_processes
from data.tiny import voices as others
from data.tiny import world
from data.tiny.world import chance
from files import show, write_json, write_jsonl

SPEAKERS = (1.0, 0.88, 1.07, 1.14, 1.21)  # r of each; a recognizer understands all of them, but not r < 0.85
# (hibari runs phones together when speed / r is above 1.33: speaker 1 at a pace of 1.17 and more; LOG.md)
PAUSE = 0.12  # seconds of silence on either side of a full stop inside an utterance


@dataclass
class Options:
    """Of `prepare`, and of [corpus] in a config."""

    sentences: Annotated[int, Limits(1, 100_000)] = 3000  # about so many different ones recorded for train
    renditions: Annotated[int, Limits(1, 100)] = 2  # how often each is recorded, at least
    readings: Annotated[int, Limits(0, 100_000)] = 0  # further ones that only the target speaker reads
    voices: Annotated[int, Limits(0, 100)] = 0  # of other engines, as many of voices.TRAINING as are there
    workers: Annotated[int, Limits(1, 61)] = 2  # processes; more Windows cannot


# ---- The plan: which sentence is spoken how often, by whom, how --------------------------------------------


class Utterance(NamedTuple):
    text: str
    family: str
    kind: str  # question, answer, statement or reading
    split: str  # train, rendition or heldout
    answer: str | None
    speaker: int
    r: float  # resampling factor: the speaker's, plus or minus 2 %
    speed: float  # 1 is hibari's own pace
    margin: tuple[float, float]  # seconds of silence before and after
    noise: int  # seed of the voice's noise

    @property
    def id(self) -> str:
        return f"{self.family}-{blake2b(repr(self).encode(), digest_size=8).hexdigest()}"


def render(
    text: str, family: str, kind: str, split: str, take: int, seed: int, answer: str | None = None
) -> Utterance:
    """The `take`-th recording of a sentence: the first five takes are of five different speakers."""

    def draw(low: float, high: float, what: str) -> float:
        return round(low + (high - low) * chance(seed, text, kind, split, take, what), 4)

    if kind in ("answer", "reading"):
        speaker = TARGET_SPEAKER
        r = SPEAKERS[speaker]
        speed = draw(1.02, 1.08, "speed")
        margin = (0.1, 0.1)
    else:
        speaker = (int(chance(seed, text, split) * len(SPEAKERS)) + take) % len(SPEAKERS)
        r = round(SPEAKERS[speaker] * draw(0.98, 1.02, "r"), 4)
        speed = draw(0.95, 1.2, "speed")
        margin = (draw(0.05, 0.15, "before"), draw(0.05, 0.15, "after"))
    noise = int(draw(0, 1e6, "noise"))
    return Utterance(text, family, kind, split, answer, speaker, r, speed, margin, noise)


def by_others(utterances: list[Utterance], numbers: list[int], times: int, seed: int) -> list[Utterance]:
    """Each training question and statement by so many of the speakers `numbers`, as far as there are any, and
    by the target speaker where it is not yet."""
    said = {u.text for u in utterances if u.split == "train" and u.speaker == TARGET_SPEAKER}
    once = {u.text: u for u in utterances if u.split == "train" and u.kind in ("question", "statement")}
    found = []
    for text, u in once.items():
        first = int(chance(seed, text, "voice") * len(numbers))
        turn = numbers[first:] + numbers[:first]
        found += [by(u, speaker, seed) for speaker in turn[:times]]
        if text not in said:
            found.append(by(u, TARGET_SPEAKER, seed))
    return found


def by(u: Utterance, speaker: int, seed: int) -> Utterance:
    """The same sentence by another speaker: the target speaker, or one of voices.py."""
    low, high = (1.02, 1.08) if speaker == TARGET_SPEAKER else (0.9, 1.2)
    speed = round(low + (high - low) * chance(seed, u.text, "speed by", speaker), 4)
    noise = int(1e6 * chance(seed, u.text, "noise by", speaker))
    return u._replace(speaker=speaker, r=1.0, speed=speed, margin=(0.1, 0.1), noise=noise)


def plan_held_out(seed: int, questions: int, unseen: list[int], seen: list[int]) -> list[Utterance]:
    """So many test questions, half of either split, by each of the speakers `unseen`, at their own pace; a
    quarter of them by each of the training speakers `seen`, who say other things there."""
    asked = [u for u in plan(seed=seed)[0] if u.split != "train" and u.kind == "question"]
    found = []
    for split in ("rendition", "heldout"):
        once = {u.text: u for u in asked if u.split == split}
        chosen = sorted(once, key=lambda text: chance("held out", text))[: -(-questions // 2)]
        few = chosen[: -(-questions // 8)]
        turns = [(text, number) for text in chosen for number in unseen]
        turns += [(text, number) for text in few for number in seen]
        found += [by(once[text], number, seed)._replace(speed=1.0) for text, number in turns]
    return found


def plan(
    sentences: int = 3000, renditions: int = 2, seed: int = 0, readings: int = 0
) -> tuple[list[Utterance], list[dict]]:
    """(utterances, rows of dialogues.jsonl). All families get about the same number of recordings: where
    there are few sentences, more of each."""
    utterances, rows = [], []
    families = world.dialogues(echoes=max(8, sentences // 20))
    share = max(1, round(0.6 * sentences / len(families)))  # spoken training questions of one family
    tests = max(1, share // 7)  # questions of one family in rendition, and in heldout
    for family, asked in families.items():
        split = world.split(family, asked)
        answers = {q: answer for answer, questions in asked.items() for q in questions}
        questions = _turns(asked)
        train = [q for q in questions if split[q] == "train"]
        heldout = [q for q in questions if split[q] == "heldout"]
        spoken = train[:share]
        probed = heldout[:tests]

        takes = range(_takes(share * renditions, spoken, renditions))
        jobs = [(q, "train", take) for q in spoken for take in takes]
        jobs += [(q, "rendition", 0) for q in spoken[:: max(1, len(spoken) // tests)][:tests]]
        takes = range(min(3, _takes(tests, probed, 1)))
        jobs += [(q, "heldout", take) for q in probed for take in takes]
        for q, name, take in jobs:
            utterances.append(render(q, family, "question", name, take, seed, answers[q]))

        replies = sorted({answers[q] for q in spoken})
        takes = range(_takes(share, replies, 1))
        utterances += [render(a, family, "answer", "train", take, seed) for a in replies for take in takes]

        recorded = {*spoken, *probed}
        for q in (*train, *heldout):
            row = {"question": q, "answer": answers[q], "family": family, "split": split[q]}
            rows.append(row | {"spoken": q in recorded})

    known = {row["answer"] for row in rows}
    texts = [text for text in world.statements(max(20, sentences // 2)) if text not in known]
    train = [text for text in texts if not world.held_out(text)][: max(1, sentences // 5)]
    heldout = [text for text in texts if world.held_out(text)][: max(1, sentences // 30)]
    jobs = [(text, "train", take) for text in train for take in range(renditions)]
    jobs += [(text, "rendition", 0) for text in train[: len(heldout)]]
    jobs += [(text, "heldout", 0) for text in heldout]
    utterances += [render(text, "statement", "statement", name, take, seed) for text, name, take in jobs]

    if not readings:
        return utterances, rows
    known |= {*train, *heldout}
    more = (*world.unasked(), *world.statements(sentences // 2 + 2 * readings))  # half of it would do
    more = [text for text in dict.fromkeys(more) if text not in known and not world.held_out(text)][:readings]
    utterances += [render(text, "reading", "reading", "train", 0, seed) for text in more]
    rows += [
        {"question": f"{world.ECHOES[int(chance('echo', text) * len(world.ECHOES))]} {text}", "answer": text,
         "family": "reading", "split": "train", "spoken": False}
        for text in more
    ]  # fmt: skip
    rows += [
        {"question": question, "answer": answer, "family": family, "split": "train", "spoken": False}
        for family, sums in world.beyond().items()
        for answer, questions in sums.items()
        for question in questions
    ]
    return utterances, rows


def _turns(asked: dict[str, list[str]]) -> list[str]:
    """All questions in random order, but one question of each answer comes before the second of any."""
    turn = {}
    for questions in asked.values():
        for i, question in enumerate(sorted(questions, key=chance)):
            turn[question] = i, chance("turn", question)
    return sorted(turn, key=turn.get)


def _takes(goal: int, texts: list[str], least: int) -> int:
    """Takes of each text for about `goal` in all; more than one per speaker adds little."""
    return max(least, min(len(SPEAKERS), round(goal / max(1, len(texts)))))


# ---- The voice ---------------------------------------------------------------------------------------------

_voice = None  # one in each process: loading takes half a second


def start_worker() -> None:
    """A worker process ends with its parent, and loads the voice."""
    end_with_parent()
    load_voice()


def need_voice() -> None:
    """ValueError, one line, if the voice is not installed."""
    if find_spec("hibari") is None:
        raise ValueError(
            "the tiny world needs a voice, the package hibari-tts; "
            'in the folder of this project: pip install -e ".[demo]"'
        )


def load_voice() -> None:
    """Loads hibari into this process."""
    global _voice
    if _voice is None:
        from hibari import Hibari

        _voice = Hibari(threads=1)


def speak(u: Utterance) -> np.ndarray:
    """(N,) float32 at 16 kHz. Resampling by r makes speech shorter by r, so it is made slower by r first."""
    if u.speaker >= len(SPEAKERS):
        wav = others.speak(others.VOICES[u.speaker - len(SPEAKERS)], u.text, u.speed)
        return trim(wav, *u.margin)
    parts = _voice.stream(u.text, speed=u.speed / u.r, seed=u.noise)  # sentence by sentence
    parts = [soxr.resample(part, _voice.sample_rate * u.r, audio.RATE) for part in parts]
    silences = [u.margin[0], *[PAUSE] * (2 * len(parts) - 2), u.margin[1]]
    return np.concatenate([trim(part, *silences[2 * i : 2 * i + 2]) for i, part in enumerate(parts)])


def trim(wav: np.ndarray, before: float, after: float) -> np.ndarray:
    """wav (N,) at 16 kHz, from `before` s before to `after` s after what is louder than -40 dB of its peak.

    The voice adds 0.3 s of silence before and 0.45 s after every sentence, a third of the corpus."""
    hop = audio.RATE // 100
    level = np.sqrt((wav[: len(wav) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1))
    loud = np.flatnonzero(level > 0.01 * np.abs(wav).max())
    start = loud[0] * hop - round(before * audio.RATE)
    stop = (loud[-1] + 1) * hop + round(after * audio.RATE)
    return np.pad(wav[max(0, start) : stop], (max(0, -start), max(0, stop - len(wav))))


def _speak(wavs: Path, batch: list[Utterance]) -> list[tuple[str, int]]:
    """What could not be spoken, and why; and whose number it was."""
    problems = []
    for u in batch:
        try:
            wav = speak(u)
        except ValueError as problem:  # of another engine
            problems.append((f"{problem}, saying {show(u.text)}", u.speaker))
        else:
            audio.save(wavs / f"{u.id}.wav", wav)
    return problems


# ---- The corpus --------------------------------------------------------------------------------------------


def prepare(
    out: str | Path,
    sentences: int = 3000,
    renditions: int = 2,
    seed: int = 0,
    readings: int = 0,
    workers: int = 2,
    progress: bool = True,
    voices: int = 0,
    held_out: int = 0,
) -> None:
    """Makes the corpus in folder `out`, or what is missing of it.

    `sentences` is about the number of different sentences recorded for train, most of them questions and
    answers, in equal parts from each family; `renditions` how often questions and statements are recorded, at
    least; `readings` the number of further sentences that only the target speaker reads, once; if there are
    any, the dialogues have sums beyond the tables, too (`world.beyond`); `voices` how many of other engines
    speak, too, of those that are installed. With `held_out` the corpus is so many test questions by each
    unseen voice, and some by each of the `voices`, and nothing else. ValueError or OSError,
    one line each, when the voice is not installed, a number makes no sense, or a file cannot be written."""
    numbers = {"sentences": sentences, "renditions": renditions, "readings": readings}
    numbers |= {"workers": workers, "voices": voices}
    if not 0 <= held_out <= 1000:
        raise ValueError(f"held_out is {held_out}; it must be from 0 to 1000")
    load(Options, numbers, "the tiny world")
    need_voice()
    if (Path(out) / "manifest.jsonl").exists():
        for row in read_manifest(out):
            if row["wav"] != f"wav/{row['id']}.wav" or not re.fullmatch(r"[\w-]+-[0-9a-f]{16}", row["id"]):
                raise ValueError(
                    f"{out} is another corpus, whose manifest this one would replace: choose another"
                )
    wanted = (*others.TRAINING[:voices], *(others.HELD_OUT if held_out else ()))
    there, missing_voices = usable(wanted)
    unseen = [number for number in there if name_of(number) in map(str, others.HELD_OUT)]
    seen = [number for number in there if number not in unseen]
    if held_out:
        utterances, rows = plan_held_out(seed, held_out, unseen, seen), []
        if not unseen:
            raise ValueError("no voice that is held out is installed (see data/tiny/voices.py)")
    else:
        utterances, rows = plan(sentences, renditions, seed, readings)
        utterances += by_others(utterances, seen, renditions, seed) if voices else []
    out, wavs = Path(out), Path(out) / "wav"
    wavs.mkdir(parents=True, exist_ok=True)
    header = 44  # bytes: a file without samples
    finished = {entry.name for entry in os.scandir(wavs) if entry.stat().st_size > header}
    missing = [u for u in utterances if f"{u.id}.wav" not in finished]
    bar = tqdm(
        total=len(utterances),
        initial=len(utterances) - len(missing),
        desc="corpus",
        unit=" utterances",
        disable=not progress,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar:
        problems = _speak_all(wavs, missing, workers, bar)
    failed = Counter(name_of(speaker) for _, speaker in problems)
    if problems:
        counts = ", ".join(f"{n} of {voice}" for voice, n in failed.items())
        print(
            f"left out: {len(problems)} of {len(utterances)} recordings ({counts}); "
            f"the first is {problems[0][0]}"
        )
        finished = {entry.name for entry in os.scandir(wavs) if entry.stat().st_size > header}
        utterances = [u for u in utterances if f"{u.id}.wav" in finished]
    manifest = [
        {
            "id": u.id,
            "wav": f"wav/{u.id}.wav",
            "text": u.text,
            **({"answer": u.answer} if u.answer else {}),
            "speaker": name_of(u.speaker) if held_out else u.speaker,
            "seconds": audio.seconds(wavs / f"{u.id}.wav"),
            "kind": u.kind,
            "split": u.split,
            "family": u.family,
        }
        for u in utterances
    ]
    spoken = {u.speaker for u in utterances}
    known = {
        "unseen": [name_of(number) for number in unseen if number in spoken],
        "seen": [name_of(number) for number in seen if number in spoken],
        "numbers": {name_of(number): number for number in there},
        "missing": missing_voices,
        "failed": dict(failed),
    }
    write_json(out / "voices.json", known)
    write_jsonl(out / "dialogues.jsonl", rows)
    for half in wavs.glob(".*.tmp"):  # what a killed run was writing
        half.unlink(missing_ok=True)
    write_manifest(out, manifest)  # last: a folder with a manifest is complete


def make_voices(out: Path, questions: int, seed: int, voices: int, workers: int) -> None:
    """A corpus of voices in the folder `out`, if any unseen one is installed; else says so."""
    if others.installed(others.HELD_OUT):
        prepare(out, seed=seed, held_out=questions, voices=voices, workers=workers)
    else:
        print("no voice that is held out is installed (see data/tiny/voices.py)", flush=True)


def _speak_all(wavs: Path, missing: list[Utterance], workers: int, bar: tqdm) -> list[tuple[str, int]]:
    """As `_speak`."""
    problems = []
    if workers == 1 or len(missing) < 50:  # a process takes longer to start than 50 utterances to speak
        if missing:
            load_voice()
        for u in missing:
            problems += _speak(wavs, [u])
            bar.update()
        return problems
    with worker_processes(workers, start_worker) as pool:
        batches = [missing[i : i + 16] for i in range(0, len(missing), 16)]
        with deaf_to_ctrl_c():
            jobs = {pool.submit(_speak, wavs, batch): len(batch) for batch in batches}  # starts the processes
        for done in as_completed(jobs):
            problems += done.result()
            bar.update(jobs[done])
    return sorted(problems)


def usable(wanted: tuple[others.Voice, ...]) -> tuple[list[int], dict[str, str]]:
    """(the numbers of the speakers among `wanted` who can be used, why the others cannot); says so, too."""
    there = others.installed(wanted)
    missing = {str(voice): others.problem(voice) for voice in wanted if others.problem(voice)}
    if missing:
        print(f"voices: {len(there)} of {len(wanted)}; {'; '.join(missing.values())}", flush=True)
    missing = {voice: why.removeprefix(f"{voice}: ") for voice, why in missing.items()}
    return [len(SPEAKERS) + number for number in there], missing


def name_of(speaker: int) -> str:
    """Of a speaker's number."""
    own = len(SPEAKERS)
    return f"hibari {speaker}" if speaker < own else str(others.VOICES[speaker - own])


def main() -> None:
    parser = Parser("Makes the corpus of the tiny spoken world.")
    add = parser.add_argument
    add("out", type=Path, help="folder to make, or to complete")
    add("--sentences", type=int, default=3000, help="about how many different sentences to record")
    add("--renditions", type=int, default=2, help="how often each is recorded, at least")
    add("--readings", type=int, default=0, help="further sentences that only the target speaker reads, once")
    add("--voices", type=int, default=0, help="of other engines, at most, that speak too (voices.py)")
    add("--held_out", type=int, default=0, help="make only so many questions in each unseen voice")
    add("--seed", type=int, default=0, help="of speakers, pace and noise; the splits have none")
    add("--workers", type=int, default=2, help="processes")
    options = vars(parser.parse_args())
    prepare(**options)
    rows = read_manifest(options["out"])
    for split in ("train", "rendition", "heldout"):
        chosen = [row for row in rows if row["split"] == split]
        texts = {row["text"] for row in chosen}
        hours = sum(row["seconds"] for row in chosen) / 3600
        print(f"{split:9} {len(chosen):6} utterances of {len(texts):5} sentences, {hours:.2f} hours")


if __name__ == "__main__":
    command_line(main)
