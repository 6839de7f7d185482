"""LJSpeech: one voice, 24 hours, 13,100 sentences: the voice of the released vocoder.

    python data/ljspeech/prepare.py LJSpeech-1.1 out/ljspeech
    python data/ljspeech/prepare.py LJSpeech-1.1.tar.bz2 out/ljspeech

    LJSpeech-1.1/metadata.csv      LJ001-0007|the earliest book ... about 1455.|... about fourteen fifty-five.
    LJSpeech-1.1/wavs/LJ001-0007.wav

The third column has numbers and abbreviations in words, as they are spoken: it is the text (--raw: the
second). The corpus has no split: a share of the sentences is held out (--heldout).

Reference: https://keithito.com/LJ-Speech-Dataset
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe, tables
from data.recordings import Job, Settings, Skipped, Utterance


def jobs(settings: Settings, raw: bool = False) -> Iterator[Job | Skipped]:
    table = recipe.find(settings, "metadata.csv", "LJSpeech")
    folder = recipe.parent(table)
    position = 0
    for row in tables.rows(Path(settings.source, table), "|", header=False):
        work, position = row.position - position, row.position
        if row.problem:
            yield Skipped(table, row.problem, row.where, work)
            continue
        name = row.fields["1"].strip()
        text = row.fields.get("2", "") if raw else row.fields.get("3") or row.fields.get("2", "")
        utterance = Utterance(name, text, "LJ", where=row.where)
        yield Job(recipe.join(folder, f"wavs/{name}.wav"), [utterance], work)


def main() -> None:
    parser = recipe.parser("Makes a corpus of LJSpeech.")
    parser.add_argument("--raw", action="store_true", help="texts with numbers and abbreviations")
    options = vars(parser.parse_args())
    settings, refused = recipe.settings_of(options, (".wav", "metadata.csv"))
    size = Path(settings.source, recipe.find(settings, "metadata.csv", "LJSpeech")).stat().st_size
    recipe.prepare("ljspeech", jobs(settings, options["raw"]), size, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)
