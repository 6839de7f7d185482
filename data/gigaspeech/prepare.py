"""GigaSpeech: 10,000 hours of audiobooks, podcasts and YouTube (used in §3.1 and §5.1 of the paper).

    python data/gigaspeech/prepare.py GigaSpeech out/gigaspeech --subset M

    GigaSpeech/audio/podcast/P0000/POD0000000003.opus         an hour, say
    GigaSpeech/GigaSpeech.json                                gigabytes; read recording by recording
        {"audios": [{"aid": "POD0000000003", "path": "audio/podcast/P0000/POD0000000003.opus",
                     "segments": [{"sid": "POD0000000003_S0000017", "begin_time": 159.0, "end_time": 163.02,
                                   "subsets": ["{M}", "{L}", "{XL}"], "speaker": "N/A",
                                   "text_tn": "WELL <COMMA> HERE WE ARE <PERIOD>"}]}]}

A segment is an utterance: it is cut out to OUT/cut/, as flac at 16 kHz. XL holds L, which holds M, S and XS;
the segments of DEV and TEST are held out, whatever the subset. Tags of punctuation become punctuation; a
segment that is only <SIL>, <MUSIC>, <NOISE> or <OTHER> is left out. Texts become small letters (--capitals:
as published). Where no speaker is named ("N/A"), as almost everywhere, each recording counts as one.

Reference: Chen et al. 2021 (https://arxiv.org/abs/2106.06909), https://github.com/SpeechColab/GigaSpeech
"""

import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe, tables
from data.recordings import Job, Settings, Skipped, Utterance

SUBSETS = ("XS", "S", "M", "L", "XL")
HELDOUT = {"DEV", "TEST"}
PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
GARBAGE = {"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"}


def jobs(settings: Settings, table: str, subset: str, capitals: bool = False) -> Iterator[Job | Skipped]:
    folder = recipe.parent(table)
    position = 0
    for number, (recording, at) in enumerate(tables.json_items(Path(settings.source, table), "audios"), 1):
        work, position = at - position, at
        where = f"GigaSpeech.json, recording {number}"
        if isinstance(recording, ValueError):
            yield Skipped(table, f"{recording}", where, work)
            continue
        try:
            path = recipe.join(folder, recipe.string(recording, "path"))
            aid = recipe.string(recording, "aid")
            segments = list(recording["segments"])
        except (TypeError, KeyError, ValueError):
            yield Skipped(table, "damaged row", where, work)
            continue
        utterances = []
        for segment in segments:
            try:
                subsets = subsets_of(segment)
                if not subsets & ({subset} | HELDOUT):
                    continue
                found = utterance_of(segment, aid, subsets, capitals, where)
            except (TypeError, KeyError, ValueError, AttributeError):
                yield Skipped(path, "damaged row", where)
                continue
            utterances.append(found)
        utterances.sort(key=lambda utterance: utterance.begin)
        yield Job(path, utterances, work)


def subsets_of(segment: dict) -> set[str]:
    """["{M}", "{XL}"] -> M, XL."""
    return {name.strip("{}") for name in segment.get("subsets", ())}


def utterance_of(segment: dict, aid: str, subsets: set[str], capitals: bool, where: str) -> Utterance:
    sid, text = recipe.string(segment, "sid"), recipe.string(segment, "text_tn")
    begin, end = float(segment["begin_time"]), float(segment["end_time"])
    speaker = segment.get("speaker", "N/A")
    speaker = aid if speaker == "N/A" or not isinstance(speaker, str) else speaker
    split = "heldout" if subsets & HELDOUT else "train"
    if text.strip() not in GARBAGE:  # a segment that is only that is left out, as in any corpus
        text = spoken(text, capitals)
    return Utterance(sid, text.strip(), speaker, split, begin, end, where=f"{where}, {sid}")


def spoken(text: str, capitals: bool = False) -> str:
    """WELL <COMMA> HERE WE ARE <PERIOD> -> Well, here we are."""
    words = [word for word in text.split() if word not in GARBAGE]
    text = " ".join(words if capitals else recipe.sentence(" ".join(words)).split())
    for tag, mark in PUNCTUATION.items():
        text = text.replace(f" {tag}", mark).replace(f" {tag.lower()}", mark)
    return text


def main() -> None:
    parser = recipe.parser("Makes a corpus of GigaSpeech.")
    parser.add_argument("--subset", choices=SUBSETS, default="XL", help="how much of it to train on")
    parser.add_argument("--capitals", action="store_true", help="transcripts in capitals, as published")
    options = vars(parser.parse_args())
    settings, refused = recipe.settings_of(options, (".opus", "gigaspeech.json"))
    table = recipe.find(settings, "GigaSpeech.json", "GigaSpeech")
    size = Path(settings.source, table).stat().st_size
    found = jobs(settings, table, options["subset"], options["capitals"])
    recipe.prepare("gigaspeech", found, size, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)
