"""moss-002-sft-data: a million dialogues in writing, the instructions of SpeechInstruct (§3.2 of the paper).

    python data/moss/prepare.py moss-002-sft-data out/moss
    python data/moss/prepare.py en_helpfulness.json out/moss

    en_helpfulness.json   [{"plain_text": "[Human]: What ...?<eoh> [MOSS]: It ...<eoa> [Human]: ...<eoh> ...",
                            ...}, ...]     a list, or a line for each; en_honesty.json, en_harmlessness.json

Of a dialogue, the first question and its answer are taken: later ones need what was said before (--turns all
takes those, too). An answer to be spoken must be short: those of --max-words words or more are left out; 35
is the paper's limit, 0 takes all. Files that begin with zh_ are Chinese and not read. OUT/dialogues.jsonl is
what data/corpus.py reads beside a manifest.

References: https://huggingface.co/datasets/fnlp/moss-002-sft-data
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import dialogues, recipe, tables
from data.recordings import Skipped

TURN = re.compile(r"\[Human\]:(.*?)<eoh>\s*\[MOSS\]:(.*?)<eoa>", re.DOTALL)


def rows(paths: list[Path], turns: str, limits: dialogues.Limits) -> Iterator[dict | Skipped]:
    for path in paths:
        for row in tables.rows(path, tables.JSON, header=False):
            if row.problem:
                yield Skipped(path.name, row.problem, row.where)
                continue
            found = TURN.findall(row.fields.get("plain_text", ""))
            if not found:
                yield Skipped(path.name, "no question with an answer", row.where)
            for question, answer in found if turns == "all" else found[:1]:
                yield dialogues.dialogue(question, answer, recipe.stem(path.name), limits, row.where)


def main() -> None:
    parser = dialogues.parser("Makes dialogues of moss-002-sft-data.", max_words=35)
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="of each dialogue")
    options = vars(parser.parse_args())
    paths = dialogues.find_files(options, (".json", ".jsonl"))
    paths = [path for path in paths if not path.name.startswith("zh_")]
    limits = dialogues.Limits.of(options)
    dialogues.write("moss", rows(paths, options["turns"], limits), options["out"])


if __name__ == "__main__":
    command_line(main)
