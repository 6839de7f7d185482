"""Units that do not care who speaks: two quick measures of HuBERT and its clusters, without a language model.

    python -m evaluation.units_report out/tiny                      a run: its corpus, its HuBERT
    python -m evaluation.units_report out/tiny --hubert FOLDER      the same recordings, another HuBERT

Unit edit distance (UED), by speaker: the Levenshtein distance between the units of a sentence by this speaker
and by the target speaker, over the longer of the two, averaged over sentences; and, as chance, that to
another sentence of the target speaker. PNMI: mutual information of phones and units, frame by frame, over the
entropy of phones; where the corpus has phones.jsonl, one object a recording, with the second at which each
phone ends:

    {"id": "plus-216aa01831a7a042", "phones": ["pau", "hh", "aw"], "ends": [0.11, 0.17, 0.32]}

References: Hsu et al. 2021, arXiv:2106.07447 §IV.E (PNMI); Gat et al. 2023, arXiv:2209.15483 (UED)
"""

from starting import starting

if __name__ == "__main__":
    starting()

import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from config import Parser, command_line
from data import audio
from data.corpus import TARGET_SPEAKER, read_manifest, text_key
from data.units import map_speech
from files import read_json, read_jsonl
from hubert import UnitExtractor
from kmeans import dedup


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions that make a into b."""
    b = np.asarray(b)
    columns = np.arange(len(b) + 1)
    row = columns  # distances of a[:0] to each beginning of b
    for i, unit in enumerate(a, 1):
        changed = np.minimum(row[:-1] + (b != unit), row[1:] + 1)  # substituted or kept, deleted
        row = np.concatenate([[i], changed])
        row = np.minimum.accumulate(row - columns) + columns  # inserted: one more a column
    return int(row[-1])


def ued(a: list[int], b: list[int]) -> float:
    return edit_distance(a, b) / max(1, len(a), len(b))


def pnmi(pairs: Counter) -> float:
    """(phone, unit) -> frames: I(phone; unit) / H(phone), 0 where there is one phone alone."""
    phones, units = Counter(), Counter()
    for (phone, unit), n in pairs.items():
        phones[phone] += n
        units[unit] += n
    total = pairs.total()
    shared = sum(n / total * np.log(n * total / (phones[p] * units[u])) for (p, u), n in pairs.items())
    entropy = -sum(n / total * np.log(n / total) for n in phones.values())
    return float(shared / entropy) if entropy else 0.0


def by_speaker(rows: list[dict], items: int) -> tuple[list[dict], dict[int, list[tuple[str, str]]]]:
    """(rows that are needed, speaker -> (id, id of the same text by the target speaker), up to `items`)."""
    own = {}
    for row in rows:
        if row["speaker"] == TARGET_SPEAKER and text_key(row["text"]):
            own.setdefault(text_key(row["text"]), row["id"])
    pairs = defaultdict(list)
    for row in random.Random(0).sample(rows, len(rows)):
        found = own.get(text_key(row["text"]))
        if found and found != row["id"] and len(pairs[row["speaker"]]) < items:
            pairs[row["speaker"]].append((row["id"], found))
    needed = {id for found in pairs.values() for pair in found for id in pair}
    return [row for row in rows if row["id"] in needed], dict(sorted(pairs.items()))


def report(
    corpus: Path, rows: list[dict], extractor: UnitExtractor, names: dict[int, str], items: int
) -> str:
    """A table of Markdown: a row for each speaker."""
    needed, pairs = by_speaker(rows, items)
    if not pairs:
        raise ValueError(f"{corpus}: no sentence is spoken by the target speaker and by another, too")
    frames = map_speech(corpus, needed, extractor.frame_units, torch.device("cpu"), "units")
    frames = {row["id"]: units.tolist() for row, units in zip(needed, frames)}
    units = {id: dedup(found)[0] for id, found in frames.items()}
    phones = read_phones(corpus, frames)
    lines = ["| speaker | sentences | UED | of other sentences | PNMI | units a second |"]
    lines.append("|---|---|---|---|---|---|")
    for speaker, found in pairs.items():
        same = np.mean([ued(units[a], units[b]) for a, b in found])
        shifted = [b for _, b in found[1:] + found[:1]]
        other = np.mean([ued(units[a], units[b]) for (a, _), b in zip(found, shifted)])
        counts = Counter(pair for id, _ in found for pair in zip(phones.get(id, []), frames[id]))
        carried = f"{pnmi(counts):.3f}" if counts else "-"
        seconds = sum(len(frames[id]) for id, _ in found) * audio.HOP / audio.RATE
        rate = sum(len(units[id]) for id, _ in found) / seconds
        name = names.get(speaker, speaker)
        lines.append(f"| {name} | {len(found)} | {same:.3f} | {other:.3f} | {carried} | {rate:.1f} |")
    return "\n".join(lines)


def read_phones(corpus: Path, frames: dict[str, list[int]]) -> dict[str, list[str]]:
    """The phone in the middle of each frame of the recordings that corpus/phones.jsonl knows."""
    path = corpus / "phones.jsonl"
    if not path.exists():
        return {}
    found = {}
    for number, row in enumerate(read_jsonl(path, ("id", "phones", "ends")), 1):
        phones, ends = row["phones"], row["ends"]
        if not isinstance(phones, list) or not isinstance(ends, list) or len(phones) != len(ends):
            raise ValueError(f"{path}, row {number}: each of phones needs one of ends, the second it ends at")
        if not phones or not all(type(end) in (int, float) for end in ends):
            raise ValueError(f"{path}, row {number}: ends must be numbers, and there must be a phone")
        if row["id"] in frames:
            middles = (np.arange(len(frames[row["id"]])) * audio.HOP + audio.WINDOW / 2) / audio.RATE
            places = np.searchsorted(ends, middles).clip(0, len(phones) - 1)
            found[row["id"]] = [str(phones[place]) for place in places]
    return found


def main() -> None:
    parser = Parser("How alike units are whoever speaks (UED), and what they tell of phones (PNMI).")
    parser.add_argument("run", type=Path, help="folder of a run, with manifest.jsonl")
    parser.add_argument("--corpus", type=Path, help="folder of its recordings, if not RUN/corpus")
    parser.add_argument("--hubert", type=Path, help="folder of a HuBERT, if not RUN/model/hubert")
    parser.add_argument("--items", type=int, default=100, help="sentences of a speaker")
    known = parser.parse_args()
    if known.items < 1:
        raise ValueError(f"--items is {known.items}; it must be at least 1")
    rows = read_manifest(known.run)
    extractor = UnitExtractor.from_pretrained(known.hubert or known.run / "model/hubert")
    record = known.run / "corpus.json"
    names = read_json(record).get("speakers", {}) if record.exists() else {}
    names = {number: name for name, number in names.items()}
    print(report(known.corpus or known.run / "corpus", rows, extractor, names, known.items))


if __name__ == "__main__":
    command_line(main)
