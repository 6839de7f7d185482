"""Many voices: how well each is understood, as it is, in noise and by telephone.

    python data/tiny/prepare.py out/voices --held_out 60 --voices 15
    python evaluate.py --model weights/tiny --corpus out/voices --out out/report-voices

A corpus of voices is one whose speakers have names; its voices.json says which are in no training data:

    {"unseen": ["flite awb", "pico en-GB"],               names of speakers in its manifest.jsonl
     "seen": ["flite slt"],                               training voices, with other sentences
     "numbers": {"flite slt": 5},                          of speakers in the corpus to train on
     "missing": {"festival ked_diphone": "text2wave is not installed"},
     "failed": {"flite awb": 2}}                           recordings that were left out

All voices are asked the same questions. Noise and telephone are those of data/augment.py, drawn by the
recording's name, so they are the same for each model.
"""

from pathlib import Path

import numpy as np

from data import augment
from data.corpus import usable
from evaluation.measures import VOICE_CONDITIONS, VOICE_MEASURES, Item, Row, score, select
from files import read_json

NOISE = 15  # dB of speech to noise


def is_of_voices(corpus: Path) -> bool:
    """Whether the corpus has unseen voices, by its voices.json."""
    return (corpus / "voices.json").is_file() and bool(read_voices(corpus)["unseen"])


def read_voices(corpus: Path) -> dict:
    """What voices.json says, every key filled in. ValueError if it is damaged."""
    path = corpus / "voices.json"
    found = read_json(path)
    kinds = {"unseen": list, "seen": list, "missing": dict, "failed": dict}
    if isinstance(found, dict):  # their names until November 2026
        found = {{"unheard": "unseen", "heard": "seen"}.get(key, key): value for key, value in found.items()}
    if not isinstance(found, dict) or not all(
        isinstance(found.setdefault(key, kind()), kind) for key, kind in kinds.items()
    ):
        raise ValueError(f"{path} is damaged; make the corpus again")
    return found


def read_rows(corpus: Path) -> dict[str, list[dict]]:
    """The rows of a corpus of voices, each with its "path": {"unseen": ..., "seen": ...}."""
    known = read_voices(corpus)
    rows = [row | {"path": corpus / row["wav"]} for row in usable(corpus) if row["text"]]
    return {group: [row for row in rows if row["speaker"] in known[group]] for group in ("unseen", "seen")}


def describe(corpus: Path) -> str:
    """Which voices a corpus has, and which it lacks, for people to read."""
    known = read_voices(corpus)
    parts = [f"{len(known['unseen'])} unseen, {len(known['seen'])} of training"]
    parts += [f"without {voice} ({why})" for voice, why in known["missing"].items()]
    parts += [f"{n} recordings of {voice} failed" for voice, n in known["failed"].items()]
    return "; ".join(parts)


def count_speakers(run_folder: Path) -> int | None:
    """How many speakers a run has in its corpus, if it says so (data/corpus.py)."""
    record = run_folder / "corpus.json"
    if not record.is_file():
        return None
    found = read_json(record)
    speakers = found.get("speakers") if isinstance(found, dict) else None
    return len(speakers) if isinstance(speakers, dict) else None


def disguise(wav: np.ndarray, condition: str, name: str) -> np.ndarray:
    """wav (N,) in noise, white or pink, of the same power in all of a recording, or by telephone."""
    if condition == "telephone":
        return augment.telephone(wav)
    draw = augment.draw_of("noise", name)
    slope = draw.choice([0.0, 1.0])
    return augment.mix(wav, augment.noise(draw, len(wav), slope), NOISE)


def rows_of_voices(items: list[Item]) -> list[Row]:
    """Of the unseen voices: the worst voice, and what noise or telephone cost at most."""
    measures = {measure.key: measure for measure in VOICE_MEASURES}
    rows = []
    for kind in ("asr", "answer"):
        measure = measures[f"{kind}.unseen"]
        own = select(items, measure.key, "")
        if not own:
            continue
        voices = {}
        for item in own:
            voices.setdefault(item.speaker, []).append(item)
        pick = max if measure.wer else min
        worst = pick(voices, key=lambda voice: score(measure, voices[voice])[0])
        value, low, high = score(measure, voices[worst])
        name = f"{measure.name}, the worst: {worst}"
        better = not measure.wer
        rows.append(
            Row(f"{measure.key}.worst", name, value, low, high, len(voices[worst]), higher_is_better=better)
        )
        there = score(measure, own)[0]
        costs = {}
        for condition in VOICE_CONDITIONS:
            found = select(items, f"{measure.key}.{condition}", "")
            if found:
                costs[condition] = (score(measure, found)[0] - there) * (1 if measure.wer else -1)
        if costs:
            worst = max(costs, key=costs.get)
            name = f"{measure.name}: lost {VOICE_CONDITIONS[worst]}"
            rows.append(Row(f"{measure.key}.loss", name, costs[worst], None, None, len(own), "points", costs))
    return rows
