"""Common Voice: sentences read by volunteers, checked by votes (used in §3.1 and §5.1 of the paper).

    python data/commonvoice/prepare.py cv-corpus-17.0-2024-03-15/en out/commonvoice
    python data/commonvoice/prepare.py cv-corpus-17.0-2024-03-15-en.tar.gz out/commonvoice --validated

    en/train.tsv  dev.tsv  test.tsv  validated.tsv      other.tsv and invalidated.tsv are not read
          client_id <tab> path <tab> sentence <tab> up_votes <tab> down_votes <tab> age ...
    en/clips/common_voice_en_39586336.mp3

The columns are found by the header; releases differ in the others. The splits are the corpus' own: dev and
test are held out. train.tsv has few recordings of each sentence; --validated trains on all of validated.tsv,
several times as much, but for what has a sentence or a speaker of dev or test. A clip needs more votes for
it than against it (--votes: how many more). The speaker is the beginning of client_id.

Reference: Ardila et al. 2020 (https://arxiv.org/abs/1912.06670), https://commonvoice.mozilla.org/datasets
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe, tables
from data.recordings import Job, Settings, Skipped, Utterance

NEEDED = ("client_id", "path", "sentence")


def jobs(settings: Settings, folder: str, names: list[str], votes: int) -> Iterator[Job | Skipped]:
    """dev and test come first, so that what they have is known when the rest is read."""
    heldout = set()  # sentences and speakers
    for name in names:
        path = Path(settings.source, folder, name)
        missing = [column for column in NEEDED if column not in tables.column_names(path, "\t")]
        if missing:
            raise ValueError(f"{path} has no column '{missing[0]}': it is no table of Common Voice")
        position = 0
        for row in tables.rows(path, "\t", header=True):
            work, position = row.position - position, row.position
            if row.problem:
                yield Skipped(recipe.join(folder, name), row.problem, row.where, work)
                continue
            clip, speaker, text = row.fields["path"], row.fields["client_id"], row.fields["sentence"]
            audio = recipe.join(folder, f"clips/{clip}" if "." in clip else f"clips/{clip}.mp3")
            marks = {f"sentence {text.lower()}", f"speaker {speaker}"}
            if name in ("dev.tsv", "test.tsv"):
                heldout |= marks
            elif name == "validated.tsv" and marks & heldout:
                yield Skipped(audio, "sentence or speaker of dev or test", row.where, work)
                continue
            if lead(row.fields) < votes:
                yield Skipped(audio, f"too few votes: {lead(row.fields)}", row.where, work)
                continue
            split = "heldout" if name in ("dev.tsv", "test.tsv") else "train"
            utterance = Utterance(recipe.stem(clip), text, speaker[:16], split, where=row.where)
            yield Job(audio, [utterance], work)


def lead(fields: dict[str, str]) -> int:
    """Votes for a clip minus votes against it."""
    up, down = fields.get("up_votes", ""), fields.get("down_votes", "")
    return (int(up) if up.isdecimal() else 0) - (int(down) if down.isdecimal() else 0)


def main() -> None:
    parser = recipe.parser("Makes a corpus of one language of Common Voice.")
    parser.add_argument("--validated", action="store_true", help="train on validated.tsv, not on train.tsv")
    parser.add_argument("--votes", type=int, default=1, help="more votes for a clip than against it")
    options = vars(parser.parse_args())
    names = ["dev.tsv", "test.tsv", "validated.tsv" if options["validated"] else "train.tsv"]
    endings = (".mp3", *names)
    settings, refused = recipe.settings_of(options, endings)
    folder = recipe.parent(recipe.find(settings, names[-1], "one language of Common Voice"))
    names = [name for name in names if Path(settings.source, folder, name).is_file()]
    size = sum(Path(settings.source, folder, name).stat().st_size for name in names)
    found = jobs(settings, folder, names, options["votes"])
    recipe.prepare("commonvoice", found, size, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)
