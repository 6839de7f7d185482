"""A corpus: a folder of recordings and THE manifest. Training, vocoder and report all read it here.

The paper trains on LibriLight, Gigaspeech and CommonVoice (§4.1, §5.1). Here, any folder will do that holds
sound files and a `manifest.jsonl` with one JSON object a line:

    {"wav": "recordings/0001.flac", "text": "Tom is in the garden."}
    {"wav": "recordings/0002.ogg", "text": "What is three plus four?", "answer": "Three plus four is seven.",
     "kind": "question", "speaker": "Anna", "split": "heldout"}

    field     what it is                                                            without it (or null)
    wav       path of a sound file in the folder; any rate, mono or stereo          needed
    text      its transcript                                                        used as speech alone
    id        a name of its own                                                     the wav's, without suffix
    speaker   a name or a number                                                    0
    split     train, heldout (sentences never trained on) or rendition (other       "train"
              recordings of training sentences)
    kind      statement, question, answer or reading                                "statement"
    family    a group of sentences; the report and a mix of documents may name it   ""
    answer    of a question, for the report to compare with                         not asked by the report
    seconds   its length, which `usable` measures                                   measured

For chain-of-modality training (§3.2) there may be a `dialogues.jsonl`, whose `split` and `family` may be left
out, too. Questions and answers are spoken by the recordings that have the same text, but for case, spaces and
punctuation:

    {"question": "What is three plus four?", "answer": "Three plus four is seven.", "family": "plus"}

`check` decodes every recording before anything is trained, and writes what the stages read into the folder of
the run: manifest.jsonl with every field filled in and speakers as numbers, dialogues.jsonl, corpus.json with
the speakers' names, and skipped.jsonl, the recordings that cannot be used, with reasons. The corpus folder is
only read: somebody else may have made it.
"""

import difflib
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from data import audio
from files import fingerprint, read_json, show, stream_jsonl, write_json, write_jsonl

TARGET_SPEAKER = 0  # the speaker in whose voice the model answers: all its TTS targets
UNKNOWN_SPEAKER = -1  # never a TTS target
SPLITS = ("train", "rendition", "heldout")
DEFAULTS = {"text": "", "speaker": 0, "kind": "statement", "split": "train", "family": ""}
LONGEST = {"wav": 4096, "text": 100_000, "question": 100_000, "answer": 100_000}  # characters; others: 200
MOST_SKIPPED = 0.1  # of the recordings; where more cannot be used, something else is wrong than a few files
MARKER = re.compile(r"<([0-9]+|/?s|unk|sosp|eosp|eoh|eoa|eos)>|\[(Human|SpeechGPT|tq|ta|ua)\]")  # tokens
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # a terminal would obey them; lines would break


# ---- Tables ------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> list[dict]:
    """The rows of a manifest, or of the manifest.jsonl in a folder, with defaults filled in (see the top).

    ValueError, one line, names a row that is not as it should be. No recording is opened: `usable` does
    that."""
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
    for where, found in _rows(path, ("wav",)):
        row = _strings(found, where, ("wav", "text", "id", "split", "kind", "family", "answer"))
        row["wav"] = _inside(row.get("wav"), where)
        row["speaker"] = _speaker(found.get("speaker"), where)
        if found.get("seconds") is not None:
            row["seconds"] = _seconds(found["seconds"], where)
        if "id" not in row:
            wav = PurePosixPath(row["wav"])
            row["id"] = wav.stem if wav.stem not in ids else str(wav.with_suffix(""))
        if row["id"] in ids:
            raise ValueError(f"{where}: id {show(row['id'])} is used twice; give each recording its own")
        ids.add(row["id"])
        rows.append(DEFAULTS | row)
    if not rows:
        raise ValueError(f"{path} has no rows: a corpus needs at least one recording")
    return rows


def read_dialogues(folder: str | Path) -> list[dict]:
    """The rows of folder/dialogues.jsonl, every field filled in, without those that lack a question or an
    answer; without that file there are none."""
    path = Path(folder) / "dialogues.jsonl"
    if not path.is_file():
        return []
    rows = []
    for where, found in _rows(path, ("question", "answer")):
        row = _strings(found, where, ("question", "answer", "split", "family"))
        if row.get("question") and row.get("answer"):
            rows.append({"split": "train", "family": ""} | row)
    return rows


def write_manifest(folder: str | Path, rows: list[dict]) -> None:
    """Writes folder/manifest.jsonl; atomic."""
    write_jsonl(Path(folder) / "manifest.jsonl", rows)


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """(how a message names the row, the row)."""
    for number, row in enumerate(stream_jsonl(path, needed), 1):
        yield f"{path}, row {number}", row


def _strings(found: dict, where: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Those of the fields `keys` that are there. Text is cleaned, for it will be shown on a terminal; a text
    with a marker of the tokenizer's in it, such as <eoa>, counts as none."""
    row = {}
    for key in keys:
        value = found.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f'{where}: "{key}" is {show(value)}; it must be a string')
        if len(value) > LONGEST.get(key, 200):
            raise ValueError(f'{where}: "{key}" has {len(value)} characters, at most {LONGEST.get(key, 200)}')
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{where}: "{key}" is {show(value)}: half of a character') from None
        if key in ("text", "question", "answer"):
            value = "" if MARKER.search(value) else CONTROL.sub(" ", value).strip()
        elif CONTROL.search(value):
            raise ValueError(f'{where}: "{key}" is {show(value)}: it has control characters')
        row[key] = sys.intern(value) if key in DEFAULTS and key != "text" else value
    if row.get("split", "train") not in SPLITS:
        raise ValueError(f"{where}: split is {show(row['split'])}; choose {', '.join(SPLITS)}")
    return row


def _inside(wav: str | None, where: str) -> str:
    """The path of a sound file, with "/" as on every system; ValueError if it does not stay in the corpus."""
    if not wav:
        raise ValueError(f'{where}: "wav" is empty; it must be the path of a sound file')
    path = wav.replace("\\", "/")
    if PureWindowsPath(path).drive or path.startswith("/"):
        raise ValueError(
            f"{where}: {show(wav)} is an absolute path; give it relative to the manifest's folder"
        )
    if ".." in path.split("/"):
        raise ValueError(f"{where}: {show(wav)} leads out of the corpus; its files must be in its folder")
    return path


def _speaker(speaker: object, where: str) -> int | str:
    if speaker is None or speaker == "":
        return 0
    if isinstance(speaker, str):
        return _strings({"speaker": speaker}, where, ("speaker",))["speaker"]
    if type(speaker) is not int or not 0 <= speaker < 2**31:
        raise ValueError(
            f'{where}: "speaker" is {show(speaker)}; it must be a name or a whole number of 0 or more'
        )
    return speaker


def _seconds(seconds: object, where: str) -> float:
    if type(seconds) not in (int, float) or not 0 < seconds <= audio.MAX_SECONDS:
        raise ValueError(f'{where}: "seconds" is {show(seconds)}; it must be a length greater than 0')
    return float(seconds)


def text_key(text: str) -> str:
    """`text` without case, punctuation and repeated spaces: what a question and its recording have in
    common."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split())


# ---- The recordings ----------------------------------------------------------------------------------------


def check(corpus: str | Path, out: str | Path, voice: int | str = "") -> list[dict]:
    """What a run uses of a corpus: writes its tables into the folder `out`, before anything is trained and on
    one rank only; returns the rows of its manifest. Every recording is decoded."""
    corpus, out = Path(corpus), Path(out)
    if corpus.is_dir() and out.is_dir() and out.samefile(corpus):
        raise ValueError(f"{out} is the corpus, whose manifest a run would replace: choose another --out")
    for table in (out / "manifest.jsonl", out / "dialogues.jsonl"):
        if table.exists() and not (out / "corpus.json").exists():
            raise ValueError(f"{table} is there and no run has made it: choose another --out")
    dialogues = read_dialogues(corpus)
    rows = usable(corpus, out / "skipped.jsonl", decode=True)
    speakers = number_speakers(rows, voice)
    rows = with_numbers(rows, speakers)
    write_json(out / "corpus.json", {"made_from": _made_from(corpus), "speakers": speakers})  # first: a mark
    write_jsonl(out / "dialogues.jsonl", dialogues)
    write_manifest(out, rows)  # last: a folder with a manifest is complete
    print("\n".join(describe(rows, speakers)), flush=True)
    return rows


def resolve(corpus: str | Path, run_folder: str | Path) -> list[dict]:
    """The rows of a corpus for a program that is not a stage: those that the run in `run_folder` uses, if it
    was made from this corpus; else all that can be used, opened but not decoded, with its speakers' numbers.
    """
    corpus, known = Path(corpus), Path(run_folder) / "corpus.json"
    if not known.is_file():
        rows = usable(corpus)
        return with_numbers(rows, number_speakers(rows))
    record = read_json(known)
    if not isinstance(record, dict) or not isinstance(record.get("speakers"), dict):
        raise ValueError(f"{known} is damaged; delete it, and run --stage corpus anew")
    if record.get("made_from") == _made_from(corpus) and (known.parent / "manifest.jsonl").is_file():
        return read_manifest(known.parent)
    return with_numbers(usable(corpus), record["speakers"])


def _made_from(corpus: Path) -> str:
    return fingerprint(corpus / "manifest.jsonl", corpus / "dialogues.jsonl")


def usable(corpus: Path, skip_list: Path | None = None, decode: bool = False) -> list[dict]:
    """Opens every recording of a corpus; returns the rows to be used, each with its `seconds`.

    The others are listed with the reason in the file `skip_list`, if it is given, and counted by reason in
    one printed line. If they are more than MOST_SKIPPED of all, that line is a ValueError. `decode` also
    finds damage inside a file."""
    import run  # with torch, which those who only make a corpus need not wait for

    rows = read_manifest(corpus)
    measure = partial(_measure, corpus, corpus.resolve(), decode)
    reasons: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, run.progress(len(rows), 0, "check", unit="file") as bar:
        for first in range(0, len(rows), 1000):  # of a million rows, the pool would make a million futures
            for reason in pool.map(measure, rows[first : first + 1000]):
                reasons.append(reason)
                bar.update()
    skipped = []
    for row, reason in zip(rows, reasons):
        if reason:
            skipped.append({"id": row["id"], "wav": row["wav"], "reason": reason})
    if skip_list:
        skip_list.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(skip_list, skipped)
    if skipped:
        kinds = Counter(row["reason"].split(":")[0] for row in skipped)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
        message = f"{corpus}: {len(skipped)} of {len(rows)} recordings cannot be used ({counts}); "
        message += f"{skip_list} lists them" if skip_list else f"the first is {show(skipped[0]['wav'])}"
        if len(skipped) > MOST_SKIPPED * len(rows):
            raise ValueError(f"{message}; mend them, or take their rows out of the manifest")
        if run.rank() == 0:
            print(f"{message}; they are left out", flush=True)
    return [row for row, reason in zip(rows, reasons) if not reason]


def _measure(corpus: Path, root: Path, decode: bool, row: dict) -> str:
    """Sets the `seconds` of a row; returns why it cannot be used, or ""."""
    path = corpus / row["wav"]
    try:
        if not path.resolve().is_relative_to(root):
            return "outside: a link leads out of the corpus; its files must be in its folder"
        row["seconds"] = audio.measure(path) if decode else audio.seconds(path)
    except (OSError, ValueError) as error:
        return audio.reason(error, path)
    return ""


# ---- The speakers ------------------------------------------------------------------------------------------


def number_speakers(rows: list[dict], voice: int | str = "") -> dict[str, int]:
    """The number of each speaker; TARGET_SPEAKER is that of `voice`.

    Without a `voice`, numbers stay as they are if the target speaker is among them; else it is who has most
    seconds of training with text. The others follow by name."""
    seconds: Counter[str] = Counter()
    numbers = True
    for row in rows:
        numbers &= type(row["speaker"]) is int
        seconds[str(row["speaker"])] += row["seconds"] * (row["split"] == "train" and row["text"] != "")
    voice = str(voice)
    if numbers and seconds[str(TARGET_SPEAKER)] and voice in ("", str(TARGET_SPEAKER)):
        return {name: int(name) for name in sorted(seconds, key=int)}
    if voice and voice not in seconds:
        near = difflib.get_close_matches(voice, seconds, 1) or [max(sorted(seconds), key=seconds.get)]
        raise ValueError(
            f"corpus.voice is {show(voice)}, who has no recording; did you mean {show(near[0])}?"
        )
    first = voice or max(sorted(seconds), key=seconds.get)
    return {name: number for number, name in enumerate([first, *sorted(seconds.keys() - {first})])}


def with_numbers(rows: list[dict], speakers: dict[str, int]) -> list[dict]:
    """The rows, each with its speaker's number instead of the name; UNKNOWN_SPEAKER if it has none."""
    for row in rows:
        row["speaker"] = speakers.get(str(row["speaker"]), UNKNOWN_SPEAKER)
    return rows


def describe(rows: list[dict], speakers: dict[str, int]) -> list[str]:
    """What a manifest holds, for people to read."""
    minutes = sum(row["seconds"] for row in rows) / 60
    length = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
    splits = Counter(row["split"] for row in rows)
    own = [row for row in rows if row["split"] == "train" and row["speaker"] == TARGET_SPEAKER]
    voice = next(name for name, number in speakers.items() if number == TARGET_SPEAKER)
    lines = [
        f"corpus: {len(rows)} recordings, {length}: "
        + ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split]),
        f"voice: the model answers as speaker {show(voice)}, who has {len(own)} recordings to train on, of "
        f"{len(speakers)} speakers in all",
    ]
    bare = sum(not row["text"] for row in rows)
    if bare:
        lines.append(
            f"without text, or with a marker such as <eoa> in it: {bare} recordings, for HuBERT, units, "
            "stage1 and the vocoder alone"
        )
    return lines
