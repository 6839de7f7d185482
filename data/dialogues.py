"""What the recipes of written corpora share: from questions and answers to dialogues.jsonl.

python data/NAME/prepare.py SOURCE OUT       SOURCE: files, or a folder or an archive of them

OUT/dialogues.jsonl            {"question": ..., "answer": ..., "family": ..., "split": "train"}, as
                               data/corpus.py reads it, in the order of the source
OUT/dialogues_left_out.jsonl   {"reason": ..., "where": "en_honesty.json, object 17"}: what is not in it
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from config import Parser
from data import archives
from data.corpus import MARKER
from data.recipe import check_ours, counts_of, is_ours
from data.recordings import Skipped, chance, clean, foreign_letter
from files import write_jsonl


class Limits(NamedTuple):
    """What becomes a dialogue."""

    max_words: int  # an answer has fewer; 0: as many as it likes
    heldout: float
    english: bool

    @classmethod
    def of(cls, options: dict) -> "Limits":
        return cls(options["max_words"], options["heldout"], options["english"])


def parser(description: str, max_words: int) -> Parser:
    """The flags of every recipe that makes dialogues."""
    parser = Parser(description)
    add = parser.add_argument
    add("source", type=Path, nargs="+", help="files, or the folder or archive that has them")
    add("out", type=Path, help="folder to write dialogues.jsonl to")
    add("--max-words", type=int, default=max_words, help="answers have fewer words than this; 0: any number")
    add("--heldout", type=float, default=0.05, help="share of the questions that is never trained on")
    add("--english", action="store_true", help="leave out texts with letters other than a-z (accents pass)")
    return parser


def find_files(options: dict, endings: tuple[str, ...]) -> list[Path]:
    """The files that the flags name, those of a folder, or of an archive, which is unpacked first."""
    if not 0 <= options["heldout"] < 1 or options["max_words"] < 0:
        raise ValueError("--heldout must be a share of 0 to 1, and --max-words at least 0")
    found = []
    for path in options["source"]:
        if archives.is_archive(path):
            archives.unpack(path, options["out"] / "source", endings)
            path = options["out"] / "source"
        if path.is_dir():
            found += sorted(
                p for p in path.rglob("*") if p.name.endswith(endings) and not is_ours(p, options["out"])
            )
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise ValueError(f"{options['source'][0]}: there is no file that ends in {' or '.join(endings)}")
    return list(dict.fromkeys(found))


def dialogue(question: str, answer: str, family: str, limits: Limits, where: str) -> dict | Skipped:
    """A row of dialogues.jsonl, or why these two cannot be one."""
    question, answer, family = clean(question), clean(answer), clean(family)[:200]
    words = len(answer.split())
    if not question or not answer:
        return Skipped("", "question or answer empty", where)
    if MARKER.search(question) or MARKER.search(answer):
        return Skipped("", "text with a marker that means something to the model", where)
    if limits.max_words and words >= limits.max_words:
        return Skipped("", f"answer too long: {words} words", where)
    if len(question) > 5000 or len(answer) > 20_000:
        return Skipped("", f"text too long: {len(question) + len(answer)} letters", where)
    if limits.english and (letter := foreign_letter(question + answer)):
        return Skipped("", f"text not English: it has the letter {letter!a}", where)
    split = "heldout" if chance(question.lower()) < limits.heldout else "train"
    return {"question": question, "answer": answer, "family": family, "split": split}


def write(name: str, rows: Iterable[dict | Skipped], out: Path) -> None:
    """Writes OUT/dialogues.jsonl as the rows come, and what is left out; prints what was found."""
    out.mkdir(parents=True, exist_ok=True)
    check_ours(out, "dialogues.jsonl", "dialogues_left_out.jsonl")
    found: Counter = Counter()
    reasons: Counter = Counter()
    bar = tqdm(rows, desc=name, unit=" dialogues", mininterval=0.5 if sys.stderr.isatty() else 30)
    part = out / ".dialogues_left_out.tmp"

    def good(left_out) -> Iterator[dict]:
        for row in bar:
            if isinstance(row, Skipped):
                reasons[row.reason.split(":")[0]] += 1
                left_out.write(json.dumps({"reason": row.reason, "where": row.where}) + "\n")
            else:
                found[row["split"]] += 1
                yield row
        if not found:
            raise ValueError(f"{name}: no dialogue was found ({counts_of(reasons)})")

    with open(part, "w", encoding="utf-8") as left_out:
        write_jsonl(out / "dialogues.jsonl", good(left_out))
    os.replace(part, out / "dialogues_left_out.jsonl")
    for split in sorted(found, reverse=True):
        print(f"{split:9} {found[split]:8} dialogues")
    if reasons:
        print(f"left out  {reasons.total():8}: {counts_of(reasons)}; {out / 'dialogues_left_out.jsonl'}")
