"""Alpaca and AlpacaEval: written instructions with answers; AlpacaEval's are in the paper's test set (§5.3).

    python data/alpaca/prepare.py alpaca_data.json out/alpaca
    python data/alpaca/prepare.py alpaca_eval.json out/alpacaeval --max-words 0

    alpaca_data.json   [{"instruction": "Give three tips ...", "input": "", "output": "1. Eat ..."}, ...]
    alpaca_eval.json   [{"instruction": "What are ...?", "output": "...", "dataset": "koala", ...}, ...]

A question is the instruction and, where there is one, its input. Answers of --max-words words or more are
left out (0: none): they are to be spoken. What comes from a file with "eval" in its name is held out; of the
rest, a share of the questions (--heldout). OUT/dialogues.jsonl is what data/corpus.py reads beside a
manifest.

References: https://github.com/tatsu-lab/stanford_alpaca, https://github.com/tatsu-lab/alpaca_eval
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import dialogues, tables
from data.recordings import Skipped


def rows(paths: list[Path], limits: dialogues.Limits) -> Iterator[dict | Skipped]:
    for path in paths:
        split = "heldout" if "eval" in path.name.lower() else ""
        for row in tables.rows(path, tables.JSON, header=False):
            if row.problem or not {"instruction", "output"} <= row.fields.keys():
                yield Skipped(path.name, row.problem or "no instruction with an output", row.where)
                continue
            question = f"{row.fields['instruction']} {row.fields.get('input', '')}"
            family = row.fields.get("dataset", "")
            found = dialogues.dialogue(question, row.fields["output"], family, limits, row.where)
            yield found | {"split": split} if split and isinstance(found, dict) else found


def main() -> None:
    parser = dialogues.parser("Makes dialogues of Alpaca or AlpacaEval.", max_words=35)
    options = vars(parser.parse_args())
    limits = dialogues.Limits.of(options)
    paths = dialogues.find_files(options, (".json", ".jsonl"))
    dialogues.write("alpaca", rows(paths, limits), options["out"])


if __name__ == "__main__":
    command_line(main)
