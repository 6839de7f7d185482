"""The measures: what each row of the report counts, with its interval, its baselines and its target.

A word error rate is the edits of all items divided by the words of all their references: where there is no
speech or no text, every word is wrong. An answer is right if it is the same text as its reference
(`judge.same`). Intervals are 95 %: by bootstrap over items for rates, Wilson's for shares. A row has the
baselines without which its number says little: the recognizer's errors on the same recordings, the same
questions asked otherwise, answers looked up in the training dialogues, n-grams for bits. A target is a number
in a config's section [evaluate.targets], by the row's key:

    [evaluate.targets]
    "asr.heldout" = 0.10            # a word error rate of at most 10 %
    "answer.heldout" = 0.60         # at least 60 % exact answers
    first = 10                      # at most 10 seconds

References: Bisani & Ney 2004 (bootstrap of word error rates); Wilson 1927 (intervals of shares); Hanley &
Lippman-Hand 1983 (no error in n words: the rule of three).
"""

import contextlib
import difflib
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import parse
from data import audio
from data.units import read_table
from evaluation.judge import errors, normalize_text, same
from tokenizer import units_to_text

# ---- What is measured --------------------------------------------------------------------------------------

SPLITS = {
    "rendition": "new renditions",  # new recordings of training sentences
    "heldout": "held out",  # sentences in no training example
    "train": "training recordings",  # where a corpus has no new renditions
}
Interval = tuple[float | None, float | None, float | None]  # value, lower end, upper end; None: no items


class Measure(NamedTuple):
    """One row of the report or, `per_split`, one row for each split."""

    key: str
    name: str
    wer: bool = True  # word error rate; else the share of exact answers
    per_split: bool = True
    written: bool = False  # its input is text
    baselines: dict[str, str] = {}  # label -> another measure: on the same recordings, if it has all of them

    def rows(self) -> list[tuple[str, str, str]]:
        """(key, name, split) of each of its rows; split "" is both."""
        if not self.per_split:
            return [(self.key, self.name, "")]
        names = SPLITS | ({"rendition": "train sentences"} if self.written else {})
        return [(f"{self.key}.{split}", f"{self.name}, {name}", split) for split, name in names.items()]


MEASURES = (
    Measure("source", "recognizer on the source audio"),
    Measure(
        "resynthesis",
        "resynthesis: target speaker, predicted durations",
        per_split=False,
        baselines={"source audio": "source"},
    ),
    Measure(
        "resynthesis.own",
        "resynthesis: source speaker and durations",
        per_split=False,
        baselines={"source audio": "source"},
    ),
    Measure("asr", "speech to text (ASR)", baselines={"recognizer": "source"}),
    Measure("asr.before", "ASR before stage 3 (no adapter)", baselines={"with adapter": "asr"}),
    Measure("transcript", "spoken question, transcript in the chain", baselines={"recognizer": "source"}),
    Measure("tts", "text to speech (TTS)", written=True, baselines={"source audio": "source"}),
    Measure(
        "t2u",
        "text-to-unit generator and vocoder",
        written=True,
        baselines={"units of the recording": "resynthesis"},
    ),
    Measure("answer", "spoken question, exact answer", wer=False, baselines={"text question": "text"}),
    Measure("text", "text question, exact answer", wer=False, written=True),
    Measure(
        "standard",
        "spoken question, standard prompting",
        wer=False,
        baselines={"chain-of-modality": "answer"},
    ),
    Measure(
        "spoken",
        "spoken reply against its own text",
        per_split=False,
        baselines={"source audio": "source"},
    ),
    Measure(
        "spoken.answer",
        "spoken question, exact spoken answer",
        wer=False,
        baselines={"its text": "spoken.text"},
    ),
)
VOICE_GROUPS = {"unseen": "unseen voices", "seen": "other engines trained on"}
VOICE_CONDITIONS = {"noise": "in noise", "telephone": "by telephone"}
VOICE_MEASURES = (  # of a corpus of voices (evaluation/voices.py)
    Measure("source.unseen", "recognizer, unseen voices", per_split=False),
    Measure("source.seen", "recognizer, other engines trained on", per_split=False),
    Measure("asr.unseen", "ASR, unseen voices", per_split=False, baselines={"recognizer": "source.unseen"}),
    Measure(
        "asr.unseen.noise",
        "ASR, unseen voices, in noise",
        per_split=False,
        baselines={"without": "asr.unseen"},
    ),
    Measure(
        "asr.unseen.telephone",
        "ASR, unseen voices, by telephone",
        per_split=False,
        baselines={"without": "asr.unseen"},
    ),
    Measure(
        "asr.seen",
        "ASR, other engines trained on",
        per_split=False,
        baselines={"recognizer": "source.seen"},
    ),
    Measure("answer.unseen", "spoken question, unseen voices", wer=False, per_split=False),
    Measure(
        "answer.unseen.noise",
        "spoken question, unseen voices, in noise",
        wer=False,
        per_split=False,
        baselines={"without": "answer.unseen"},
    ),
    Measure(
        "answer.unseen.telephone",
        "spoken question, unseen voices, by telephone",
        wer=False,
        per_split=False,
        baselines={"without": "answer.unseen"},
    ),
    Measure("answer.seen", "spoken question, other engines trained on", wer=False, per_split=False),
)
OTHER_ROWS = ("bits", "bits.1", "bits.second", "first", "first.factor")  # not computed from items
OTHER_ROWS += ("asr.unseen.worst", "asr.unseen.loss", "answer.unseen.worst", "answer.unseen.loss")


class Item(NamedTuple):
    """One scored output with its reference."""

    measure: str
    id: str  # of the recording in the manifest
    split: str
    speaker: int | str  # a name in a corpus of voices
    family: str
    question: str
    expected: str
    got: str


@dataclass
class Row:
    key: str
    name: str
    value: float | None  # None: the corpus has no such items
    low: float | None
    high: float | None
    n: int
    unit: str = "%"
    baseline: dict[str, float | None] = field(default_factory=dict)
    higher_is_better: bool = False
    target: float | None = None

    def show(self, value: float | None) -> str:
        if value is None:
            return "-"
        if self.unit in ("%", "points"):
            return f"{100 * value:.1f} {self.unit}"
        return f"{value:.2f} {self.unit}"

    @property
    def reached(self) -> bool | None:
        """None: there is no target, or no value to compare with it."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target

    def show_target(self) -> str:
        """For example "at most 5.0 %: reached"; "" without a target."""
        if self.target is None:
            return ""
        limit = "at least" if self.higher_is_better else "at most"
        result = {True: "reached", False: "not reached", None: "not measured"}[self.reached]
        return f"{limit} {self.show(self.target)}: {result}"


# ---- Intervals ---------------------------------------------------------------------------------------------


def ratio(counts: list[tuple[float, float]]) -> Interval:
    """(numerator, denominator) of each item -> ratio of their sums; interval by bootstrap over items."""
    table = np.array(counts, float).reshape(-1, 2)
    over, under = table.sum(0).tolist()
    if not under:
        return None, None, None
    draws = np.random.default_rng(0).integers(len(table), size=(2000, len(table)))
    sums = table[draws].sum(1)  # (2000, 2)
    low, high = np.percentile(sums[:, 0] / np.maximum(1, sums[:, 1]), [2.5, 97.5]).tolist()
    if not over:
        high = min(1.0, 3 / under)  # the rule of three: no error in n words is not a rate of 0
    return over / under, low, high


def wilson(right: list[bool], z: float = 1.96) -> Interval:
    """The share of True."""
    if not right:
        return None, None, None
    n = len(right)
    p = sum(right) / n
    middle = p + z * z / (2 * n)
    spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return p, max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


# ---- Baselines ---------------------------------------------------------------------------------------------


class LookupBaselines:
    """Answers looked up in the training dialogues: the most frequent, and the nearest question's."""

    def __init__(self, dialogues: list[dict]):
        self.questions = [(words_of(row["question"]), row["answer"]) for row in dialogues]
        self.answers = {"": Counter(row["answer"] for row in dialogues)}  # by family; "": all
        for row in dialogues:
            self.answers.setdefault(row["family"], Counter())[row["answer"]] += 1
        self.found: dict[str, str] = {}  # question -> answer to the nearest

    def majority(self, family: str = "") -> str:
        """The most frequent answer, of a family or of all; "" if there is none."""
        most_common = self.answers.get(family, Counter()).most_common(1)
        return most_common[0][0] if most_common else ""

    def nearest(self, question: str) -> str:
        """The answer to the training question with the highest Jaccard index of words, or ""."""
        if question not in self.found:
            words = words_of(question)

            def similarity(known: tuple[set[str], str]) -> float:
                return len(known[0] & words) / max(1, len(known[0] | words))

            self.found[question] = max(self.questions, key=similarity, default=(set(), ""))[1]
        return self.found[question]

    def score(self, items: list[Item]) -> dict[str, float | None]:
        """The share of exact answers of each baseline."""
        majority = [same(item.expected, self.majority()) for item in items]
        family = [same(item.expected, self.majority(item.family)) for item in items]
        nearest = [same(item.expected, self.nearest(item.question)) for item in items]
        return {
            "majority": wilson(majority)[0],
            "majority of its family": wilson(family)[0],
            "nearest train question": wilson(nearest)[0],
        }


def words_of(text: str) -> set[str]:
    return set(normalize_text(text).split())


# ---- Rows of items -----------------------------------------------------------------------------------------


def score(measure: Measure, items: list[Item]) -> Interval:
    """Items of one measure -> word error rate, or share of exact answers."""
    if measure.wer:
        return ratio([errors(item.expected, item.got) for item in items])
    return wilson([same(item.expected, item.got) for item in items])


def score_all(items: list[Item], lookup: LookupBaselines) -> list[Row]:
    """The rows of all measures, whether or not there are items of them."""
    rows = []
    for measure in (*MEASURES, *VOICE_MEASURES):
        for key, name, split in measure.rows():
            own = select(items, measure.key, split)
            value, low, high = score(measure, own)
            row = Row(key, name, value, low, high, len(own), higher_is_better=not measure.wer)
            ids = {item.id for item in own}
            for label, other in measure.baselines.items():
                others = select(items, other, split)
                equal = [item for item in others if item.id in ids]
                row.baseline[label] = score(measure, equal if len(equal) == len(ids) else others)[0]
            if not measure.wer and lookup.questions:
                row.baseline |= lookup.score(own)
            rows.append(row)
    return rows


def select(items: list[Item], measure: str, split: str) -> list[Item]:
    """Items of a measure; split "" is both."""
    return [item for item in items if item.measure == measure and split in ("", item.split)]


# ---- Bits per unit, seconds to a reply ---------------------------------------------------------------------


def unit_bits(model, speech: list[list[int]]) -> list[tuple[float, int]]:
    """(bits, units) of each: the sum of -log2 p(unit | <s> <sosp> and the units before it), eq. 3.

    model: a `sample.SpeechGPT`, or whatever has its `tok` and `logits`."""
    counts = []
    for units in speech:
        ids = model.tok.encode(units_to_text(units))
        first = ids.index(model.tok.sosp) + 1
        logits = model.logits(ids)[first - 1 : -2]  # (U, V): what follows <sosp>, ..., the last unit but one
        log_p = logits.log_softmax(-1)
        targets = torch.tensor(ids[first:-1], device=log_p.device)  # (U,): the units, without <eosp>
        bits = -log_p.gather(1, targets[:, None]).sum().item() / np.log(2)
        counts.append((bits, len(units)))
    return counts


def train_units(model, manifest: list[dict], table: Path, limit: int) -> list[list[int]]:
    """The training split as units: from `table`, units.jsonl, if the model's HuBERT wrote it, else of `limit`
    recordings. What cannot be read is left out."""
    train = [row for row in manifest if row["split"] == "train"]
    stored = {}
    if table.exists():
        with contextlib.suppress(ValueError):  # of other units, perhaps
            stored = {row["id"]: row["units"] for row in read_table(table, model.tok.n_units)}

    def encode(rows: list[dict]) -> list[tuple[str, list[int]]]:
        found = []
        for row in rows:
            with contextlib.suppress(ValueError, OSError):
                found.append((row["id"], model.extractor(audio.load(row["path"]))[0]))
        return found

    probes = encode(train[:3])
    if probes and all(stored.get(name) == units for name, units in probes):
        return [stored[row["id"]] for row in train if row["id"] in stored]
    return [units for _, units in encode(random.Random(0).sample(train, min(limit, len(train))))]


def ngram_bits(train: list[list[int]], test: list[list[int]], n_units: int) -> dict[str, float]:
    """Bits per unit of `test` under counts c of `train`. p(b) = (c(b) + 1) / (N + K) and, backing off to it,
    p(b | a) = (c(a, b) + 10 p(b)) / (c(a) + 10); a is None before the first unit."""
    one = Counter()  # c(b)
    two = Counter()  # c(a, b)
    left = Counter()  # c(a)
    for units in train:
        one.update(units)
        two.update(zip([None, *units], units))
        left.update([None, *units[:-1]])
    pairs = [pair for units in test for pair in zip([None, *units], units)]
    if not pairs:
        return {}
    unigram = np.array([(one[b] + 1) / (one.total() + n_units) for _, b in pairs])
    bigram = np.array([(two[pair] + 10 * p) / (left[pair[0]] + 10) for pair, p in zip(pairs, unigram)])
    return {"unigram": -np.log2(unigram).mean().item(), "bigram": -np.log2(bigram).mean().item()}


def bits_rows(models: dict, speech: list[tuple[list[int], list[int]]], train: list[list[int]]) -> list[Row]:
    """Bits per unit of `speech`, (units, durations in frames) of each recording, and per second of it, which
    does not depend on how many units there are. models: row's key -> model, as in `unit_bits`."""
    names = {"bits": "bits per unit of held-out speech", "bits.1": "the same after stage 1"}
    units = [units for units, _ in speech]
    seconds = [sum(durations) * audio.HOP / audio.RATE for _, durations in speech]
    rows = []
    for key, model in models.items():
        counts = unit_bits(model, units)
        baseline = ngram_bits(train, units, model.tok.n_units)
        rows.append(Row(key, names[key], *ratio(counts), len(units), "bits", baseline))
        if key == "bits":
            a_second = ratio([(bits, time) for (bits, _), time in zip(counts, seconds)])
            rows.append(Row("bits.second", "bits per second of it", *a_second, len(units), "bits"))
    return rows


def first_reply(folder: Path, wav: Path, device: str) -> tuple[float, float | None]:
    """Seconds of `python sample.py WAV` in a new process, the slower of two; and per second of speech."""
    worst = (0.0, None)
    for _ in range(2):
        with tempfile.TemporaryDirectory() as scratch:
            spoken = Path(scratch) / "reply.wav"
            command = [sys.executable, Path(__file__).parent.parent / "sample.py", wav]
            command += ["--model", folder, "--device", device, "--out", spoken]
            start = time.perf_counter()
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
            seconds = time.perf_counter() - start
            if done.returncode:
                raise ValueError(f"sample.py failed on {wav}: {done.stderr.strip() or done.returncode}")
            factor = seconds * audio.RATE / len(audio.load(spoken)) if spoken.exists() else None
        worst = max(worst, (seconds, factor), key=lambda pair: pair[0])
    return worst


# ---- Targets -----------------------------------------------------------------------------------------------


def read_targets(path: str | Path) -> dict[str, float]:
    """The section [evaluate.targets] of a config file."""
    section = parse(Path(path)).get("evaluate")
    targets = section.get("targets") if isinstance(section, dict) else None
    if not isinstance(targets, dict):
        raise ValueError(f"{path} has no section [evaluate.targets]; see configs/tiny.toml for one")
    return targets


def check_targets(targets: dict):
    """Raises ValueError for a target that belongs to no row, or that is no number."""
    keys = [key for measure in (*MEASURES, *VOICE_MEASURES) for key, _, _ in measure.rows()]
    keys += OTHER_ROWS
    for key, target in targets.items():
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            advice = f'did you mean "{near[0]}" (in quotes)?' if near else f"rows: {', '.join(keys)}"
            raise ValueError(f"[evaluate.targets]: the report has no row '{key}'; {advice}")
        if type(target) not in (int, float) or not math.isfinite(target):
            raise ValueError(f"[evaluate.targets], key '{key}': expected a number, found {target!r}")


def count_reached(rows: list[Row], targets: dict[str, float]) -> str:
    """How many targets were reached, which were not, and which have no number; "" without targets."""
    if not targets:
        return ""
    found = {row.key: row.reached for row in rows}
    parts = [f"{sum(found.get(key) is True for key in targets)} of {len(targets)} reached"]
    for label, state in (("not", False), ("not measured:", None)):
        if keys := [key for key in targets if found.get(key) is state]:
            parts.append(f"{label} {', '.join(keys)}")
    return "; ".join(parts)
