"""A folder of anybody's recordings with transcripts, in one of the ways in which people keep them.

    python data/folder/prepare.py my/recordings out/mine

    a table     metadata.csv, train.tsv, list.jsonl, prompts.txt: a row for each recording
                    file,sentence,speaker          a header; the columns are found by their names
                    0001|Tom is in the garden.     no header: the first column names the recording, the second
                    hello: Hello.                  (of three, the third) has its text; tab | , ; : or a space
    beside      0001.wav and 0001.txt or 0001.lab: a text file for each recording

What is there is found by looking, and said: of the tables in SOURCE and the folders in it, each separator is
tried, with and without header, and that one taken with which the most rows find their recording. --table,
--audio-column, --text-column, --speaker-column overrule it; without a header, columns are called 1, 2, 3.

A recording is named by its path from the table's folder or from SOURCE; or by its last parts, with or without
ending, if there is one such recording below the table's folder (or in all of SOURCE, if none is below it).
Paths of Windows and of another machine are understood by their last parts, too; a path that climbs out of
SOURCE is refused. A speaker is a column of the table, or with --speaker-folder inner the folder that a
recording is in, with outer the first one below SOURCE; otherwise all are one. A table called train, dev or
test, or a column called split, makes the split; otherwise a share of the texts is held out.
"""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: let it find `data`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import command_line
from data import recipe, tables
from data.audio import reason
from data.recordings import AUDIO, UNREADABLE, Job, Settings, Skipped, Utterance
from files import show

TABLES = (".tsv", ".csv", ".jsonl", ".json", ".txt", ".lst", ".list")
BESIDE = (".txt", ".lab")
SEPARATORS = ("\t", "|", ",", ";", ":", " ")
NAMES = {  # what columns are called, the likeliest first
    "audio": ("wav", "audio", "audio_filepath", "audio_file", "audio_path", "path", "file", "file_name",
              "filename", "filepath", "file_path", "clip", "recording", "name", "id"),
    "text": ("text", "sentence", "transcript", "transcription", "normalized_text", "normalized_transcription",
             "prompt", "label"),
    "speaker": ("speaker", "speaker_id", "speaker_name", "client_id", "spk", "spk_id", "voice", "reader"),
    "split": ("split", "set", "subset", "partition"),
    "id": ("id", "utt_id", "utterance_id"),
}  # fmt: skip
SPLITS = {
    "train": "train",
    "training": "train",
    "rendition": "rendition",
    "heldout": "heldout",
} | dict.fromkeys(("dev", "valid", "validation", "val", "test", "testing", "eval"), "heldout")
KNOWN = {".trans.txt": "librispeech", "GigaSpeech.json": "gigaspeech", "validated.tsv": "commonvoice"}
LOOK = 20  # rows of a table that are tried
MANY = 50  # text files in one folder: these are no tables


# ---- Where a recording is ----------------------------------------------------------------------------------


class Finder:
    """Finds the recording that a row of a table means."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.total = 0  # recordings in the source
        self.known = ""  # the recipe that knows this layout better
        endings = set()
        for _, files in recipe.walk(settings):
            self.known = self.known or next(
                (KNOWN[end] for name in files for end in KNOWN if name.endswith(end)), ""
            )
            recordings = [name for name in files if is_audio(name)]
            self.total += len(recordings)
            endings |= {os.path.splitext(name)[1] for name in recordings}
        self.endings = sorted(endings, key=lambda ending: (ending.lower() in UNREADABLE, ending))
        self.indexes: dict[tuple[str, int], tuple[list[str], dict[int, int]]] = {}

    def find(self, name: str, folder: str) -> tuple[str, str]:
        """(path below the source, "") or ("", reason); `folder` is the table's."""
        name = name.strip().replace("\\", "/")
        drive = name[1:2] == ":" and name[:1].isalpha()
        if not name[2 * drive :].strip("/."):
            return "", "no recording is named"
        if name.startswith("/") or drive:  # of another machine: its last parts, as many as are here
            parts = [part for part in name[2 * drive :].split("/") if part]
            if ".." in parts:
                return "", "refused: a path that climbs out"
            exact = ["/".join(parts[n:]) for n in range(len(parts) - 1)]
            name = parts[-1]
        else:
            bases = (folder, "") if "/" in name else (folder,)
            exact = [os.path.normpath(recipe.join(base, name)).replace("\\", "/") for base in bases]
            name = os.path.normpath(name).replace("\\", "/")
            if all(path.split("/")[0] == ".." for path in exact):
                return "", "refused: a path that climbs out"
        for path in exact:
            if path.split("/")[0] != ".." and (found := self.with_ending(path)):
                return found, ""
        return self.below(name, folder) if name.split("/")[0] != ".." else ("", "no such file")

    def below(self, name: str, folder: str) -> tuple[str, str]:
        """`find` in all folders below the table's, for a table that has only the last parts of paths; where
        no recording is below it, in all of the source."""
        parts = name.split("/")
        above = len(parts) - 1
        if (folder, above) not in self.indexes:
            found = self.index(folder, above)
            self.indexes[folder, above] = found if found[1] or not folder else self.index("", above)
        folders, index = self.indexes[folder, above]
        number = index.get(last_parts(name, above))
        if number is None:
            return "", "no such file"
        if number < 0:
            return "", "ambiguous: several recordings have this name"
        place = folders[number].split("/")
        path = self.with_ending("/".join([*place[: len(place) - above], *parts]).lstrip("/"))
        return (path, "") if path else ("", "no such file")

    def index(self, below: str, above: int) -> tuple[list[str], dict[int, int]]:
        """(folders, index): what stands for the last parts of a path, `above` folders and the name -> number
        of the folder, or -1 if several have such a recording. For a million recordings it takes 100 MB."""
        index: dict[int, int] = {}
        folders = []
        for number, (folder, files) in enumerate(recipe.walk(self.settings, below=below)):
            folders.append(folder)
            if not above or folder.count("/") + 1 >= above:
                for name in filter(is_audio, files):
                    key = last_parts(recipe.join(folder, name), above)
                    index[key] = number if index.get(key, number) == number else -1
        return folders, index

    def with_ending(self, path: str) -> str:
        """The path as it is, composed in either way (macOS takes letters apart), or with an ending."""
        for ending in ("",) if is_audio(path) else ("", *self.endings):
            for form in ("",) if path.isascii() else ("", "NFC", "NFD"):
                found = (unicodedata.normalize(form, path) if form else path) + ending
                if is_audio(found) and os.path.isfile(os.path.join(self.settings.source, found)):
                    return found
        return ""


def last_parts(path: str, above: int) -> int:
    """A number that stands for the name of a recording, without ending, and `above` folders over it."""
    path = recipe.stem(path) if is_audio(path) else path
    return hash(unicodedata.normalize("NFC", "/".join(path.split("/")[-above - 1 :])))


def is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO + UNREADABLE)


# ---- Looking for tables ------------------------------------------------------------------------------------


class Table(NamedTuple):
    path: Path
    folder: str  # below the source, where relative paths begin; "" for a table that is elsewhere
    separator: str
    header: bool
    columns: dict[str, str]  # audio, text, speaker, split, id -> name of the column

    def describe(self) -> str:
        kind = {"\t": "tabs", tables.JSON: "JSON", " ": "spaces"}.get(self.separator, f"'{self.separator}'")
        columns = ", ".join(f"{what} = {show(name)}" for what, name in self.columns.items())
        name = recipe.join(self.folder, self.path.name)
        return f"{show(name)}: {kind}, {'' if self.header else 'no '}header, {columns}"


def find_tables(settings: Settings, finder: Finder, options: dict) -> list[Table]:
    """All tables whose rows name recordings of the source. ValueError if the one that was named does not."""
    if not options["table"]:
        return [table for path in candidates(settings) if (table := look(settings, finder, path, options))]
    path = Path(options["table"]).expanduser()
    if not path.is_file():
        path = Path(settings.source, options["table"])
    if not path.is_file():
        raise FileNotFoundError(
            f"--table {options['table']}: no such file, nor is there one in {settings.source}"
        )
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError(f"--table {path} is compressed: unpack it first (gunzip)")
    table = look(settings, finder, path, options)
    if table is None:
        first = next(iter(tables.rows(path, "\n", False, options["encoding"])), None)
        raise ValueError(
            f"--table {path}: no row names a recording in {settings.source}; its first line is "
            f"{show(first.fields.get('1', '') if first else '')}; try --audio-column and --text-column"
        )
    return [table]


def candidates(settings: Settings) -> Iterator[Path]:
    """Files that might be tables, in the source and the folders in it, without text files beside a
    recording."""
    for folder, files in recipe.walk(settings):
        if folder.count("/") > 1:
            continue
        recordings = {recipe.stem(name) for name in files if is_audio(name)}
        texts = [n for n in files if n.lower().endswith(TABLES) and recipe.stem(n) not in recordings]
        if len(texts) <= MANY:
            found = (Path(settings.source, folder, name) for name in texts)
            yield from (path for path in found if not recipe.is_ours(path, Path(settings.out)))


def look(settings: Settings, finder: Finder, path: Path, options: dict) -> Table | None:
    """How a table is to be read: the way in which the most of its first rows find a recording and a text."""
    source = Path(settings.source).resolve()
    inside = path.resolve().is_relative_to(source)
    folder = path.resolve().parent.relative_to(source).as_posix().removeprefix(".") if inside else ""
    is_json = path.name.lower().endswith((".json", ".jsonl"))
    best, most = None, 0
    for separator in (tables.JSON,) if is_json else SEPARATORS:
        for header in (True,) if is_json else (True, False):
            rows = list(islice(tables.rows(path, separator, header, options["encoding"]), LOOK))
            rows = [row.fields for row in rows if not row.problem and len(row.fields) > 1]
            columns = choose_columns(rows, header, options)
            if not {"audio", "text"} <= columns.keys():
                continue
            names = [row.get(columns["audio"], "") for row in rows if row.get(columns["text"], "").strip()]
            hits = sum(bool(finder.find(name, folder)[0]) for name in names)
            if hits > most:
                best, most = Table(path, folder, separator, header, columns), hits
    return best


def choose_columns(rows: list[dict[str, str]], header: bool, options: dict) -> dict[str, str]:
    """audio, text, speaker, split, id -> the column; flags first, then by name, or by place."""
    if not rows:
        return {}
    names = list(dict.fromkeys(name for row in rows for name in row))
    lower = {name.lower().strip().replace(" ", "_"): name for name in reversed(names)}
    chosen = {}
    for what, known in NAMES.items():
        if flag := options.get(f"{what}_column"):
            if flag in names:
                chosen[what] = flag
        elif header:
            likeliest = next((lower[name] for name in known if name in lower), None)
            chosen |= {what: likeliest} if likeliest else {}
    if not header:  # 1 | text, or 1 | text | the text in words
        width = Counter(len(row) for row in rows).most_common(1)[0][0]
        chosen = {"audio": "1", "text": "3" if width == 3 else "2"} | chosen
    if chosen.get("id") == chosen.get("audio"):
        chosen.pop("id", None)
    return chosen


# ---- Recordings with their texts ---------------------------------------------------------------------------


def jobs(settings: Settings, finder: Finder, found: list[Table], options: dict) -> Iterator[Job | Skipped]:
    """From tables, or from text files beside the recordings; then the recordings that have no transcript."""
    transcribed = set()
    for table in found:
        for job in table_jobs(finder, table, options):
            if isinstance(job, Job):
                transcribed.add(hash(job.audio))
            yield job
    for folder, files in recipe.walk(settings):
        names = {name.lower(): name for name in files}
        for name in filter(is_audio, files):
            path = recipe.join(folder, name)
            if hash(path) in transcribed:
                continue
            beside = [recipe.stem(name).lower() + ending for ending in BESIDE]
            texts = [names[other] for other in beside if other in names] if not found else []
            if name.startswith("."):
                yield Skipped(path, "hidden file", work=1)
            elif not texts and not options["unlabelled"]:
                yield Skipped(path, "no transcript", work=1)
            else:
                yield beside_job(settings, path, texts, options)


def table_jobs(finder: Finder, table: Table, options: dict) -> Iterator[Job | Skipped]:
    split = SPLITS.get(table.path.stem.lower(), "")
    name = recipe.join(table.folder, table.path.name)
    for row in tables.rows(table.path, table.separator, table.header, options["encoding"]):
        where = recipe.join(table.folder, row.where)
        fields = {what: row.fields.get(column, "").strip() for what, column in table.columns.items()}
        if row.problem:
            yield Skipped(name, row.problem, where)
            continue
        found, problem = finder.find(fields["audio"], table.folder)
        if problem:
            yield Skipped(fields["audio"][:300], problem, where)
            continue
        speaker = folder_name(found, options["speaker_folder"]) or fields.get("speaker", "")
        own = SPLITS.get(fields.get("split", "").lower(), split)
        id = fields.get("id") or recipe.stem(found)
        yield Job(found, [Utterance(id, fields["text"], speaker, own, where=where)])


def beside_job(settings: Settings, path: str, texts: list[str], options: dict) -> Job | Skipped:
    """A recording with the text file beside it, if there is one."""
    text, where = "", ""
    if texts:
        where = recipe.join(recipe.parent(path), texts[0])
        try:
            text = tables.read_text(Path(settings.source, where), options["encoding"])
        except (OSError, ValueError) as error:
            return Skipped(path, reason(error, Path(settings.source, where)), where, work=1)
    speaker = folder_name(path, options["speaker_folder"])
    return Job(path, [Utterance(recipe.stem(path), text, speaker, where=where)])


def folder_name(path: str, which: str | None) -> str:
    """ann/day 1/1.wav -> ann (outer) or day 1 (inner)."""
    folders = path.split("/")[:-1]
    return folders[0 if which == "outer" else -1] if which and folders else ""


def main() -> None:
    parser = recipe.parser("Makes a corpus of a folder of recordings with transcripts.")
    add = parser.add_argument
    add("--table", default="", help="the table with the transcripts (default: found by looking)")
    add("--audio-column", help="its column with the recording's path or name")
    add("--text-column", help="its column with the transcript")
    add("--speaker-column", help="its column with the speaker")
    add(
        "--speaker-folder",
        choices=("inner", "outer"),
        help="the speaker is the innermost or outermost folder",
    )
    add("--encoding", default="", help="of tables and texts (default: UTF-8 or UTF-16, found by looking)")
    add("--unlabelled", action="store_true", help="keep recordings without transcript, with an empty text")
    options = vars(parser.parse_args())
    try:
        "".encode(options["encoding"] or "utf-8")
    except LookupError:
        raise ValueError(f"--encoding {options['encoding']}: unknown; utf-8, utf-16, cp1252, ...") from None
    endings = (*AUDIO, *UNREADABLE, *TABLES, ".lab")
    settings, refused = recipe.settings_of(options, endings, texts=not options["unlabelled"])
    finder = Finder(settings)
    found = find_tables(settings, finder, options)
    for table in found:
        print(f"transcripts: {table.describe()}")
    if finder.known:
        print(f"this looks like another layout: data/{finder.known}/prepare.py knows more of it")
    if not found:
        print(
            "transcripts: no table names these recordings (if there is one elsewhere: --table FILE); "
            "text files beside them (.txt, .lab) are read"
        )
    prepared = jobs(settings, finder, found, options)
    recipe.prepare("folder", prepared, finder.total, settings, options["workers"], refused)


if __name__ == "__main__":
    command_line(main)
