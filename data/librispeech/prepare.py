"""LibriSpeech: 1000 hours of read English with transcripts (used in §3.1 and §5.1 of the paper).

    python data/librispeech/prepare.py LibriSpeech out/librispeech
    python data/librispeech/prepare.py train-clean-100.tar.gz dev-clean.tar.gz out/librispeech

    LibriSpeech/SPEAKERS.TXT                              14 | F | train-clean-360 | 25.03 | Kristin LeMoine
    LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt
                                                          103-1240-0000 CHAPTER ONE MISSUS RACHEL LYNDE IS ...
    LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac

The speaker is the number before the first dash. What is below a folder train-... is trained on, dev-... and
test-... are held out; where no folder says so, SPEAKERS.TXT does. The transcripts have no punctuation and
only capitals, of which a LLaMA would need a piece for nearly each letter: they become small letters with a
capital at the beginning (--capitals: as published).

Reference: Panayotov et al. 2015, and README.TXT of the corpus (https://www.openslr.org/12).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe, tables
from data.recordings import Job, Settings, Skipped, Utterance


def jobs(settings: Settings, capitals: bool = False) -> Iterator[Job | Skipped]:
    subsets = read_speakers(settings)
    for folder, files in recipe.walk(settings):
        transcribed = set()
        for name in files:
            if not name.endswith(".trans.txt"):
                continue
            work = 1  # of the whole chapter
            for row in tables.rows(Path(settings.source, folder, name), " ", header=False):
                number, text = row.fields.get("1", ""), row.fields.get("2", "")
                if row.problem:
                    yield Skipped(recipe.join(folder, name), row.problem, row.where)
                    continue
                transcribed.add(f"{number}.flac")
                speaker = number.split("-")[0]
                subset = subset_of(settings, folder) or subsets.get(speaker, "")
                split = "train" if subset.startswith("train") else "heldout" if subset else ""
                text = text if capitals else recipe.sentence(text)
                where = recipe.join(folder, row.where)
                utterance = Utterance(number, text, speaker, split, family=subset, where=where)
                yield Job(recipe.join(folder, f"{number}.flac"), [utterance], work)
                work = 0
        for name in files:
            if name.endswith(".flac") and name not in transcribed:
                yield Skipped(recipe.join(folder, name), "no transcript")


def subset_of(settings: Settings, folder: str) -> str:
    """The innermost folder that is named like a subset, SOURCE itself included."""
    names = [Path(settings.source).resolve().name, *folder.split("/")]
    return next((name for name in reversed(names) if name.startswith(("train-", "dev-", "test-"))), "")


def read_speakers(settings: Settings) -> dict[str, str]:
    """Speaker -> subset, of SPEAKERS.TXT beside the subsets; lines that begin with ; are comments."""
    for folder in (Path(settings.source), Path(settings.source, "LibriSpeech"), Path(settings.source).parent):
        path = folder / "SPEAKERS.TXT"
        if path.is_file():
            lines = [line.split("|") for line in tables.read_text(path).splitlines() if line[:1] != ";"]
            return {line[0].strip(): line[2].strip() for line in lines if len(line) >= 5}
    return {}


def main() -> None:
    parser = recipe.parser("Makes a corpus of LibriSpeech.")
    parser.add_argument("--capitals", action="store_true", help="transcripts as published")
    options = vars(parser.parse_args())
    settings, refused = recipe.settings_of(options, (".flac", ".trans.txt", "speakers.txt"))
    chapters = sum(name.endswith(".trans.txt") for _, files in recipe.walk(settings) for name in files)
    found = jobs(settings, options["capitals"])
    recipe.prepare("librispeech", found, chapters, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)
