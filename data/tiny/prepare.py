"""A tiny spoken world: a few thousand questions, answers and statements from a grammar, spoken by a small TTS voice.

    python data/tiny/prepare.py out/corpus                                 # three hours in about two minutes, two cores
    python data/tiny/prepare.py out/ci --sentences 20 --renditions 2       # a minute of speech, for tests

It stands in for the paper's speech (LibriLight, Gigaspeech, CommonVoice; section 4.1 and 5.1) and for its spoken
instructions (section 3.2, made from text with a TTS, as here). The voice is hibari (Apache-2.0, inside the wheel);
other speakers are made by playing it back at r times its rate: pitch and formants move together, as with a longer
or shorter vocal tract, while the pace is set independently. Speaker 0, r = 1, is the model's own voice: it speaks
every answer.

OUT/wav/ID.wav          16 kHz, 16 bit
OUT/manifest.jsonl      {"id": "plus-5b0c...", "wav": "wav/plus-5b0c....wav", "text": "What is three plus four?",
                         "answer": "Three plus four is seven.", "speaker": 3, "seconds": 1.4, "kind": "question",
                         "split": "train", "family": "plus"}; kind is question, answer or statement
OUT/dialogues.jsonl     {"question", "answer", "family", "split", "spoken"}: every wording, with or without audio

Splits, decided by a hash of the text alone, so that neither seed nor size moves a sentence from one to the other:

train       what may be trained on, as audio or as text.
rendition   new audio (other speaker, pace, noise) of sentences of train. No training example.
heldout     combinations that occur in no training example in ANY wording, neither heard nor read; a tenth of all.
            In families with several slots (WHOLE below) a combination is the answer sentence, e.g. "Three plus
            four is seven.": if held out, no question with that answer and no statement with that text is in train.
            In families of facts (capital of France) that would make the answer unknowable: there a combination is
            the fact in one wording, and each fact is in train in its other wordings, with the same answer sentence.

Every choice is a hash of what it is about, so the same seed gives the same bytes, a file's name tells what is in it,
and a run that was killed, or is repeated with other sizes, makes only the files that are missing.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

if __package__ in (None, ""):  # run as a script: make `import data` work
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import audio

HELD_OUT = 0.1
SPEAKERS = (1.0, 0.88, 1.07, 1.14, 1.21)  # r of each speaker

# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary of the world

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "England": "London", "Germany": "Berlin",
    "Greece": "Athens", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo",
    "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Canada": "Ottawa", "Cuba": "Havana", "Portugal": "Lisbon", "Turkey": "Ankara", "Peru": "Lima",
}  # fmt: skip
OPPOSITES = [pair.split() for pair in (
    "hot cold, big small, fast slow, happy sad, old young, high low, long short, light dark, open closed, "
    "full empty, rich poor, deep shallow, early late, easy hard, clean dirty, wet dry, loud quiet, good bad, "
    "thick thin, left right, wide narrow, sweet bitter, up down, first last"
).split(", ")]  # fmt: skip
COLORS = {
    "the grass": "green", "the sky": "blue", "the snow": "white", "a lemon": "yellow", "the night": "black",
    "a tomato": "red", "an orange": "orange", "chocolate": "brown", "a frog": "green", "milk": "white",
    "the sun": "yellow", "a strawberry": "red", "a pig": "pink", "the ocean": "blue", "a carrot": "orange",
    "a banana": "yellow",
}  # fmt: skip
ANIMALS = {  # animal: (what it does, legs, where it lives)
    "dog": ("barks", 4, "a house"), "cow": (None, 4, "a field"), "lion": ("roars", 4, "the grass"),
    "bird": ("sings", 2, "a tree"), "snake": ("hisses", 0, "the sand"), "fish": (None, 0, "the water"),
    "bee": (None, 6, "a flower"), "wolf": (None, 4, "the forest"), "duck": ("quacks", 2, "a lake"),
    "spider": (None, 8, "a web"), "bear": ("growls", 4, "a cave"), "camel": (None, 4, "the desert"),
    "monkey": (None, 2, "a forest"), "horse": (None, 4, "a barn"), "chicken": (None, 2, "a farm"),
}  # fmt: skip
NAMES = (
    "Tom Mary Peter Lucy David Jack Sarah Paul George Frank Alice Henry Linda Robert Susan Michael".split()
)
PLACES = "garden kitchen park school office forest station market library hotel".split()
THINGS = "ball letter box lamp chair clock phone bottle hat key".split()
FRUITS = "apples lemons carrots coins pencils flowers".split()
COLOR_WORDS = "red blue green yellow white black brown pink orange".split()
TALK = {  # answer: three ways of asking
    "I am a small speech model.": ("Who are you?", "What are you?", "Tell me who you are."),
    "Hello, how can I help you?": ("Hello!", "Good morning!", "Hello there!"),
    "I am fine, thank you.": ("How are you?", "How are you today?", "Tell me how you are."),
    "Goodbye, see you soon.": ("Goodbye!", "See you soon!", "Good night, I am going to sleep."),
    "You are welcome.": ("Thank you!", "Thank you very much!", "Thank you for your help."),
    "I can listen and speak.": ("What can you do?", "Tell me what you can do.", "How can you help me?"),
    "I live in your computer.": ("Where do you live?", "Where are you?", "Tell me where you live."),
    "I like numbers and words.": ("What do you like?", "Tell me what you like.", "What things do you like?"),
    "I speak English.": ("Which language do you speak?", "What do you speak?", "Tell me your language."),
    "I am very young.": ("How old are you?", "Are you old or young?", "Tell me how old you are."),
    "There are seven days in a week.": (
        "How many days are in a week?", "How many days does a week have?", "Tell me how many days are in a week."),
    "There are twelve months in a year.": (
        "How many months are in a year?", "How many months does a year have?",
        "Tell me how many months are in a year."),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The grammar: family -> {answer: [wordings of the question]}

WHOLE = {
    "plus",
    "minus",
    "compare",
    "count",
    "place",
    "sum",
    "echo",
}  # families held out by answer, not by wording


def dialogues(sentences: int = 3000) -> dict[str, dict[str, list[str]]]:
    """Every question that can be asked, with its answer. `sentences` only bounds the echoed ones."""
    world: dict[str, dict[str, list[str]]] = {}

    def ask(family: str, answer: str, *questions: str) -> None:
        wordings = world.setdefault(family, {}).setdefault(capital(answer), [])
        wordings += [q for q in map(capital, questions) if q not in wordings]

    for a, b in itertools.product(range(11), repeat=2):
        x, y, z = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
        ask(
            "plus",
            f"{x} plus {y} is {z}.",
            f"What is {x} plus {y}?",
            f"How much is {x} plus {y}?",
            f"Please add {x} and {y}.",
        )
    for a, b in itertools.product(range(13), range(11)):
        if b <= a:
            x, y, z = NUMBERS[a], NUMBERS[b], NUMBERS[a - b]
            ask("minus", f"{x} minus {y} is {z}.",
                f"What is {x} minus {y}?", f"How much is {x} minus {y}?", f"Please take {y} from {x}.")  # fmt: skip
    for a, b in itertools.pairwise(NUMBERS):
        ask("next", f"{b} comes after {a}.",
            f"What number comes after {a}?", f"Which number is after {a}?", f"Tell me the number after {a}.")  # fmt: skip
        ask("next", f"{a} comes before {b}.",
            f"What number comes before {b}?", f"Which number is before {b}?", f"Tell me the number before {b}.")  # fmt: skip
    for a, b in itertools.combinations(NUMBERS[:13], 2):
        for x, y in ((a, b), (b, a)):
            ask(
                "compare",
                f"{b} is bigger than {a}.",
                f"Which is bigger, {x} or {y}?",
                f"What number is bigger, {x} or {y}?",
            )
            ask(
                "compare",
                f"{a} is smaller than {b}.",
                f"Which is smaller, {x} or {y}?",
                f"What number is smaller, {x} or {y}?",
            )
    for a, span in itertools.product(range(13), range(2, 6)):
        for step in (1, -1):
            if 0 <= a + step * span <= 12:
                steps = [NUMBERS[a + step * i] for i in range(span + 1)]
                x, y = steps[0], steps[-1]
                ask("count", ", ".join(steps) + ".",
                    f"Count from {x} to {y}.", f"Please count from {x} to {y}.", f"Can you count from {x} to {y}?")  # fmt: skip
    for i, today in enumerate(DAYS):
        for shift, relation in ((1, "after"), (-1, "before")):
            ask("days", f"{DAYS[(i + shift) % 7]} comes {relation} {today}.", f"What day comes {relation} {today}?",
                f"Which day is {relation} {today}?", f"Tell me the day {relation} {today}.")  # fmt: skip
            ask("days", f"{DAYS[(i + 2 * shift) % 7]} is two days {relation} {today}.",
                f"What day is two days {relation} {today}?", f"Which day comes two days {relation} {today}?",
                f"Tell me the day two days {relation} {today}.")  # fmt: skip
    for i, month in enumerate(MONTHS):
        for shift, relation in ((1, "after"), (-1, "before")):
            ask("months", f"{MONTHS[(i + shift) % 12]} comes {relation} {month}.",
                f"What month comes {relation} {month}?", f"Which month is {relation} {month}?",
                f"Tell me the month {relation} {month}.")  # fmt: skip
    for country, city in CAPITALS.items():
        ask("capitals", f"The capital of {country} is {city}.", f"What is the capital of {country}?",
            f"Which city is the capital of {country}?", f"Tell me the capital of {country}.")  # fmt: skip
        ask("capitals", f"{city} is the capital of {country}.", f"Which country has the capital {city}?",
            f"{city} is the capital of which country?", f"In which country is {city} the capital?")  # fmt: skip
    for a, b in itertools.chain(OPPOSITES, [pair[::-1] for pair in OPPOSITES]):
        ask("opposites", f"The opposite of {a} is {b}.",
            f"What is the opposite of {a}?", f"Tell me the opposite of {a}.", f"Which word is the opposite of {a}?")  # fmt: skip
    for thing, color in COLORS.items():
        ask("colors", f"{thing} is {color}.",
            f"What color is {thing}?", f"Which color has {thing}?", f"Tell me the color of {thing}.")  # fmt: skip
    for animal, (sound, legs, home) in ANIMALS.items():
        count = NUMBERS[legs] if legs else "no"
        ask("animals", f"A {animal} has {count} legs.", f"How many legs does a {animal} have?",
            f"How many legs has a {animal}?", f"Tell me how many legs a {animal} has.")  # fmt: skip
        ask("animals", f"A {animal} lives in {home}.",
            f"Where does a {animal} live?", f"Tell me where a {animal} lives.", f"In what place does a {animal} live?")  # fmt: skip
        if sound:
            ask("animals", f"A {animal} {sound}.", f"What sound does a {animal} make?",
                f"Which sound comes from a {animal}?", f"Tell me the sound of a {animal}.")  # fmt: skip
    for name in NAMES:
        ask("names", f"Your name is {name}.",
            f"My name is {name}. What is my name?", f"I am {name}. Who am I?", f"Hello, I am {name}. What is my name?")  # fmt: skip
    for name, place in itertools.product(NAMES[:12], PLACES):
        ask("place", f"{name} is in the {place}.", f"{name} is in the {place}. Where is {name}?",
            f"{name} is in the {place}. In what place is {name}?",
            f"{name} is in the {place}. Tell me where {name} is.")  # fmt: skip
    for name, fruit, total in itertools.product(NAMES[:8], FRUITS, range(2, 11)):
        sums = [(a, total - a, "gets", "more") for a in range(2, total - 1)]
        sums += [(total + b, b, "loses", "of them") for b in range(2, 11 - total)]
        sums.sort(key=lambda s: unit("sum", name, fruit, *s[:3]))
        for a, b, verb, more in sums[:2]:
            story = f"{name} has {NUMBERS[a]} {fruit} and {verb} {NUMBERS[b]}"
            ask("sum", f"{name} has {NUMBERS[total]} {fruit}.", f"{story}. How many {fruit} now?",
                f"{story} {more}. How many {fruit} has {name}?")  # fmt: skip
    for answer, questions in TALK.items():
        ask("talk", answer, *questions)
    for sentence in statements(max(8, sentences // 20), "echo"):
        ask("echo", sentence, f"Please say: {sentence}", f"Say after me: {sentence}", f"Repeat: {sentence}")
    return world


def statements(count: int, tag: str = "statement") -> list[str]:
    """The first `count` sentences of an endless list: who does what to which thing, where, in the same words."""
    found: dict[str, None] = {}
    for k in itertools.count():
        if len(found) >= count:
            return list(found)

        def one(options: Iterable, slot: str = "", k: int = k) -> str:
            options = list(options)
            return options[int(unit(tag, k, slot, len(options)) * len(options))]

        animals = [animal for animal in ANIMALS if animal not in ("bee", "spider")]
        adjectives = ["big", "small", "old", "young", "happy", "sad", "fast", "slow", "quiet", "strong"]
        name, other = one(NAMES, "a"), one(NAMES, "b")
        place, thing, color = one(PLACES, "place"), one(THINGS, "thing"), one(COLOR_WORDS, "color")
        animal, adjective = one(animals, "animal"), one(adjectives, "adjective")
        number, plural = one(NUMBERS[2:], "number"), one(FRUITS, "plural")
        verb = one(("puts", "finds", "drops", "leaves", "keeps", "wants"), "verb")
        moment = one([f"on {day}" for day in DAYS] + [f"in {month}" for month in MONTHS], "moment")
        country, city = one(CAPITALS, "country"), one(CAPITALS.values(), "city")
        things = f"{thing}es" if thing == "box" else f"{thing}s"
        templates = (
            f"{name} {verb} the {color} {thing} in the {place}.",
            f"{name} {verb} {number} {color} {things} in the {place}.",
            f"{name} follows the {adjective} {animal} to the {place}.",
            f"The {adjective} {animal} sleeps under the {color} {one(('tree', 'chair', 'box'), 'under')}.",
            f"{name} and {other} go to the {place} {moment}.",
            f"{moment} {name} travels from {city} to {country}.",
            f"{name} gives {number} {plural} to {other}.",
            f"The {thing} in the {place} is {color} and {one(('new', 'old', 'big', 'small', 'clean', 'dirty'), 'is')}.",
            f"{moment} {name} needs {number} {plural}.",
            f"{name} has {number} {things} for the {adjective} {animal}.",
        )
        if name != other:
            found.setdefault(capital(templates[k % len(templates)]))
    raise AssertionError("unreachable")


def capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def unit(*about) -> float:
    """A number in [0, 1) that depends on `about` and on nothing else, today and on every machine."""
    return int.from_bytes(blake2b(repr(about).encode(), digest_size=7).digest(), "big") / 2**56


def held_out(text: str) -> bool:
    return unit("held out", text) < HELD_OUT


def split_of(family: str, answer: str, wordings: list[str]) -> list[str]:
    """train or heldout for each wording of one question (module docstring)."""
    if family in WHOLE:
        return ["heldout" if held_out(answer) else "train"] * len(wordings)
    # facts: at most one wording is held out, for the answer must be learnable from the others
    chosen = (
        int(unit("wording", answer) * len(wordings))
        if unit("fact", answer) < HELD_OUT * len(wordings)
        else -1
    )
    return ["heldout" if i == chosen else "train" for i in range(len(wordings))]


# ---------------------------------------------------------------------------------------------------------------------
# The plan: which sentence is spoken how often, by whom, how


class Utterance(NamedTuple):
    text: str
    family: str
    kind: str  # question, answer or statement
    split: str
    answer: str | None
    speaker: int
    r: float  # playback rate of the voice: 1.1 is a speaker with a shorter vocal tract
    speed: float
    margin: tuple[float, float]  # seconds of silence before and after
    noise: int  # seed of the voice

    @property
    def id(self) -> str:
        return f"{self.family}-{blake2b(repr(self).encode(), digest_size=8).hexdigest()}"


def _round_robin(ranked: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """(rank, question, answer) in an order that asks for every answer once before it asks for any a second time."""
    turns: dict[str, int] = {}
    keyed = []
    for rank, question, answer in sorted(ranked):
        turns[answer] = turns.get(answer, 0) + 1
        keyed.append((turns[answer], rank, question, answer))
    return [item[1:] for item in sorted(keyed)]


def _takes(goal: int, count: int, least: int) -> int:
    """Renditions of each of `count` sentences for about `goal` in all; more than one by each speaker is a waste."""
    return max(least, min(len(SPEAKERS), round(goal / max(1, count))))


def utter(
    text: str, family: str, kind: str, split: str, answer: str | None, take: int, seed: int
) -> Utterance:
    """The take-th rendition of a sentence. Answers are spoken by speaker 0, evenly; the rest by everybody."""

    def draw(low: float, high: float, what: str) -> float:
        return round(low + (high - low) * unit(seed, text, kind, split, take, what), 4)

    if kind == "answer":
        speaker, r, speed, margin = 0, SPEAKERS[0], draw(1.02, 1.08, "speed"), (0.1, 0.1)
    else:
        speaker = (int(unit(seed, text, split, "speaker") * len(SPEAKERS)) + take) % len(SPEAKERS)
        r, speed = round(SPEAKERS[speaker] * draw(0.98, 1.02, "r"), 4), draw(0.95, 1.2, "speed")
        margin = (draw(0.05, 0.15, "before"), draw(0.05, 0.15, "after"))
    return Utterance(text, family, kind, split, answer, speaker, r, speed, margin, int(draw(0, 1e6, "noise")))


def plan(sentences: int = 3000, renditions: int = 2, seed: int = 0) -> tuple[list[Utterance], list[dict]]:
    """(utterances, rows of dialogues.jsonl). Families get about the same number of takes, small ones more of each."""
    assert sentences > 0 and renditions > 0, (
        f"need at least one sentence and rendition: {sentences}, {renditions}"
    )
    utterances, rows = [], []
    world = dialogues(sentences)
    share = max(1, round(0.6 * sentences / len(world)))  # questions of one family
    tests = max(1, share // 7)
    for family, asked in world.items():
        train, heldout = [], []  # (rank, question, answer)
        for answer, wordings in asked.items():
            splits = split_of(family, answer, wordings)
            for question, split in zip(wordings, splits):
                (train if split == "train" else heldout).append((unit("order", question), question, answer))
        train = _round_robin(train)
        spoken = train[:share]
        takes = _takes(share * renditions, len(spoken), renditions)
        for _, question, answer in spoken:
            utterances += [
                utter(question, family, "question", "train", answer, t, seed) for t in range(takes)
            ]
        answers = sorted({answer for _, _, answer in spoken})
        takes = _takes(share, len(answers), 1)
        for answer in answers:
            utterances += [utter(answer, family, "answer", "train", None, t, seed) for t in range(takes)]
        for split, pool in (("rendition", spoken), ("heldout", heldout)):
            chosen = sorted(pool)[:tests]
            for i in range(tests if chosen else 0):
                _, question, answer = chosen[i % len(chosen)]
                utterances.append(utter(question, family, "question", split, answer, i // len(chosen), seed))
        heard = {question for _, question, _ in spoken + sorted(heldout)[:tests]}
        for split, pool in (("train", train), ("heldout", heldout)):
            rows += [
                {
                    "question": question,
                    "answer": answer,
                    "family": family,
                    "split": split,
                    "spoken": question in heard,
                }
                for _, question, answer in pool
            ]
    texts = statements(max(8, sentences // 3))
    taken = {row["answer"] for row in rows}
    train = [text for text in texts if not held_out(text) and text not in taken][: max(2, sentences // 5)]
    heldout = [text for text in texts if held_out(text) and text not in taken]
    tests = max(1, sentences // 30)
    for split, pool, takes in (
        ("train", train, renditions),
        ("rendition", train[:tests], 1),
        ("heldout", heldout[:tests], 1),
    ):
        for text in pool:
            utterances += [utter(text, "statement", "statement", split, None, t, seed) for t in range(takes)]
    return utterances, rows


# ---------------------------------------------------------------------------------------------------------------------
# The voice

_voice = None  # one per process: loading takes half a second


def load_voice() -> None:
    """Loads hibari into this process."""
    global _voice
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if _voice is None:
        from hibari import Hibari

        _voice = Hibari()


def speak(u: Utterance) -> np.ndarray:
    """(N,) float32 at 16 kHz. Played at r times its rate the voice gets shorter by r, so it is asked to go slower."""
    parts = _voice.stream(u.text, speed=u.speed / u.r, seed=u.noise)  # one for each sentence
    parts = [soxr.resample(part, _voice.sample_rate * u.r, audio.RATE) for part in parts]
    pauses = [u.margin[0]] + [0.12] * 2 * (len(parts) - 1) + [u.margin[1]]
    return np.concatenate([trim(part, *pauses[2 * i : 2 * i + 2]) for i, part in enumerate(parts)])


def trim(wav: np.ndarray, before: float, after: float) -> np.ndarray:
    """wav (N,) at 16 kHz with `before` and `after` seconds around what is louder than -40 dB of its peak.

    The voice puts 0.3 s of silence before and 0.45 s after every sentence: a third of the corpus would be silence.
    """
    hop = audio.RATE // 100
    level = np.sqrt((wav[: len(wav) // hop * hop].reshape(-1, hop) ** 2).mean(axis=1))
    loud = np.flatnonzero(level > 0.01 * np.abs(wav).max())
    start = loud[0] * hop - round(before * audio.RATE)
    stop = (loud[-1] + 1) * hop + round(after * audio.RATE)
    padded = np.pad(wav[max(0, start) : stop], (max(0, -start), max(0, stop - len(wav))))
    return padded


def _speak_all(out: str, batch: list[Utterance]) -> int:
    for u in batch:
        audio.save(Path(out) / "wav" / f"{u.id}.wav", speak(u))
    return len(batch)


def prepare(
    out: str | Path,
    sentences: int = 3000,
    renditions: int = 2,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Makes the corpus in folder `out`, or what is missing of it.

    `sentences` is about the number of different sentences to hear, half of them questions, in equal parts from each
    family; `renditions` how often each is spoken, at least (facts, which are few, up to five times). ValueError or
    OSError, one line each, when the voice is not installed, a number makes no sense, or the disk is full.
    """
    out = Path(out)
    for name, value in (("sentences", sentences), ("renditions", renditions), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if find_spec("hibari") is None:
        raise ValueError("the tiny world is spoken by the package hibari-tts: pip install 'speechgpt[demo]'")
    utterances, rows = plan(sentences, renditions, seed)
    (out / "wav").mkdir(parents=True, exist_ok=True)
    there = {
        entry.name for entry in os.scandir(out / "wav") if entry.stat().st_size > 44
    }  # 44: a wav header alone
    missing = [u for u in utterances if f"{u.id}.wav" not in there]
    with tqdm(total=len(utterances), initial=len(utterances) - len(missing), desc="corpus", unit="utt",
              disable=not progress, dynamic_ncols=True) as bar:  # fmt: skip
        if workers == 1 or len(missing) < 50:  # a process takes longer to start than 50 sentences to speak
            load_voice()
            for u in missing:
                bar.update(_speak_all(str(out), [u]))
        else:
            _speak_in_parallel(out, missing, workers, bar)

    def seconds(u: Utterance) -> float:
        return round(soundfile.info(out / "wav" / f"{u.id}.wav").frames / audio.RATE, 4)

    manifest = [
        {"id": u.id, "wav": f"wav/{u.id}.wav", "text": u.text}
        | ({"answer": u.answer} if u.answer else {})
        | {"speaker": u.speaker, "seconds": seconds(u), "kind": u.kind, "split": u.split, "family": u.family}
        for u in utterances
    ]
    _write_lines(out / "dialogues.jsonl", rows)
    _write_lines(out / "manifest.jsonl", manifest)  # last: a folder with a manifest is complete


def _speak_in_parallel(out: Path, missing: list[Utterance], workers: int, bar: tqdm) -> None:
    batches = [missing[i : i + 16] for i in range(0, len(missing), 16)]
    # spawn, the only way that works on Linux, macOS and Windows alike (and with threads of torch in the parent)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=load_voice)
    try:
        for done in as_completed([pool.submit(_speak_all, str(out), batch) for batch in batches]):
            bar.update(done.result())
    except BrokenProcessPool:
        raise OSError(
            "a worker died (out of memory?): run the same command again, with --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_lines(path: Path, rows: list[dict]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to make, or to complete")
    parser.add_argument(
        "--sentences", type=int, default=3000, help="about how many different sentences to hear"
    )
    parser.add_argument("--renditions", type=int, default=2, help="how often each is spoken, at least")
    parser.add_argument(
        "--seed", type=int, default=0, help="of speakers, pace and noise; never of the splits"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = vars(parser.parse_args())
    prepare(**options)
    rows = audio.read_manifest(options["out"])
    for split in ("train", "rendition", "heldout"):
        chosen = [row for row in rows if row["split"] == split]
        hours = sum(row["seconds"] for row in chosen) / 3600
        texts = len({row["text"] for row in chosen})
        print(f"{split:9}  {len(chosen):5} utterances of {texts:5} sentences, {hours:.2f} h")


if __name__ == "__main__":
    from config import command_line

    command_line(main)
