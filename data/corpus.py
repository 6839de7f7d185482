"""A corpus: a folder of recordings and THE manifest. Training, vocoder and report all read it here.

The paper trains on LibriLight, Gigaspeech and CommonVoice (§4.1, §5.1). Here, any folder will do that holds
sound files and a `manifest.jsonl` with one JSON object a line:

    {"wav": "recordings/0001.flac", "text": "Tom is in the garden."}
    {"wav": "recordings/0002.ogg", "text": "What is three plus four?", "answer": "Three plus four is seven.",
     "kind": "question", "speaker": 3, "split": "heldout"}

    field     what it is                                                            without it
    wav       path of a sound file in the folder; any rate, mono or stereo          needed
    text      its transcript                                                        needed
    id        a name of its own                                                     the wav's, without suffix
    speaker   a number; the model answers in the voice of TARGET_SPEAKER            0
    split     train, heldout (sentences never trained on) or rendition (other       "train"
              recordings of training sentences)
    kind      statement, question, answer or reading                                "statement"
    family    a group of sentences; the report and a mix of documents may name it   ""
    seconds   its length; measured in any case by `resolve`
    answer    of a question, for the report to compare with                         not asked by the report

For chain-of-modality training (§3.2) there may be a `dialogues.jsonl`, whose `split` and `family` may be left
out, too. Questions and answers are spoken by the recordings that have the same text:

    {"question": "What is three plus four?", "answer": "Three plus four is seven.", "family": "plus"}

`check` opens every recording before anything is trained, and writes what the stages read into the folder of
the run: manifest.jsonl with every field filled in, dialogues.jsonl, and skipped.jsonl, the recordings that
cannot be used, with reasons. The corpus folder is only read.
"""

import math
import os
from collections import Counter
from pathlib import Path, PurePath

from data import audio
from files import read_jsonl, write_jsonl

TARGET_SPEAKER = 0  # the speaker in whose voice the model answers: all its TTS targets
SPLITS = ("train", "rendition", "heldout")
DEFAULTS = {"speaker": 0, "kind": "statement", "split": "train", "family": ""}
STRINGS = ("wav", "text", "id", "split", "kind", "family", "answer", "question")
MOST_SKIPPED = 0.1  # of the recordings; where more cannot be used, something else is wrong than a few files


def read_manifest(path: str | Path) -> list[dict]:
    """The rows of a manifest, or of the manifest.jsonl in a folder, with defaults filled in (see the top).

    ValueError, one line, names a row that is not as it should be. No recording is opened: `resolve`."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".jsonl":
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a corpus needs one (docs/own-data.md), and --stage corpus "
            "makes that of a run (if it says `finished before`, delete its folder in state/)"
        )
    rows = []
    ids = set()
    for number, row in enumerate(read_jsonl(path, ("wav", "text")), 1):
        stem = PurePath(row["wav"]).stem if isinstance(row["wav"], str) else ""
        row = {"id": stem} | DEFAULTS | row
        problem = _problem(row)
        if not problem and row["id"] in ids:
            problem = f"id '{row['id']}' is used twice; give each recording its own"
        if problem:
            raise ValueError(f"{path}, row {number}: {problem}")
        ids.add(row["id"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows: a corpus needs at least one recording")
    return rows


def read_dialogues(folder: str | Path) -> list[dict]:
    """The rows of folder/dialogues.jsonl, every field filled in; without that file there are none."""
    path = Path(folder) / "dialogues.jsonl"
    if not path.is_file():
        return []
    rows = []
    for number, row in enumerate(read_jsonl(path, ("question", "answer")), 1):
        row = {"split": "train", "family": ""} | row
        if problem := _problem(row):
            raise ValueError(f"{path}, row {number}: {problem}")
        rows.append(row)
    return rows


def write_manifest(folder: str | Path, rows: list[dict]) -> None:
    """Writes folder/manifest.jsonl; atomic."""
    write_jsonl(Path(folder) / "manifest.jsonl", rows)


def resolve(corpus: str | Path, skip_list: Path | None = None) -> list[dict]:
    """Opens every recording of a corpus; returns the rows to be used, each with its `seconds`.

    The others are listed with the reason in the file `skip_list`, if it is given, and counted by reason in
    one printed line. If they are more than MOST_SKIPPED of all, that line is a ValueError. Files are opened,
    not decoded: damage in the middle of a file is not found."""
    import run  # with torch, which those who only make a corpus need not wait for

    corpus = Path(corpus)
    rows = read_manifest(corpus)
    usable, skipped = [], []
    with run.progress(len(rows), title="check", unit="file") as bar:
        for row in rows:
            try:
                usable.append(row | {"seconds": audio.seconds(corpus / row["wav"])})
            except (OSError, ValueError) as error:
                reason = str(error).removeprefix(str(corpus / row["wav"])).lstrip(": ").removeprefix("is ")
                skipped.append({"id": row["id"], "wav": row["wav"], "reason": reason})
            bar.update()
    if skip_list:
        skip_list.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(skip_list, skipped)
    if skipped:
        kinds = Counter(row["reason"].split(":")[0] for row in skipped)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        first = skipped[0]
        message = (
            f"{corpus}: {len(skipped)} of {len(rows)} recordings cannot be used ({counts}); the first is "
            f"{first['wav']}: {first['reason']}"
        )
        if skip_list:
            message += f"; {skip_list} lists them all"
        if len(skipped) > MOST_SKIPPED * len(rows):
            raise ValueError(f"{message}; mend them, or take their rows out of the manifest")
        if run.rank() == 0:
            print(f"{message}; they are left out", flush=True)
    return usable


def check(corpus: str | Path, out: str | Path) -> list[dict]:
    """Writes manifest.jsonl, dialogues.jsonl and skipped.jsonl of a run into its folder `out`, before
    anything is trained and on one rank only; returns the rows to be used."""
    if os.path.exists(out) and os.path.samefile(corpus, out):
        raise ValueError(f"{out} is the corpus, whose manifest a run would replace: choose another --out")
    dialogues = read_dialogues(corpus)
    usable = resolve(corpus, Path(out) / "skipped.jsonl")
    write_jsonl(Path(out) / "dialogues.jsonl", dialogues)
    write_manifest(out, usable)  # last: a folder with a manifest is complete
    return usable


def _problem(row: dict) -> str:
    """What is wrong with the fields of a row; "" if nothing is."""
    for key in STRINGS:
        if not isinstance(row.get(key, ""), str):
            return f'"{key}" is {row[key]!r}; it must be a string'
    speaker = row.get("speaker", 0)
    if type(speaker) is not int or speaker < 0:
        return f'"speaker" is {speaker!r}; it must be a whole number of 0 or more'
    if row["split"] not in SPLITS:
        return f"split is '{row['split']}'; choose {', '.join(SPLITS)}"
    seconds = row.get("seconds", 1.0)
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        return f'"seconds" is {seconds!r}; it must be a length greater than 0'
    return ""
