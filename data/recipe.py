"""What the recipes of all corpora share: from recordings and texts to a folder with a manifest.

    python data/NAME/prepare.py SOURCE OUT       SOURCE: the corpus' folder, or its archives

A recipe (data/folder, data/librispeech, ...) knows one corpus' layout: its function yields a `Job` for each
recording, with what is spoken in it, and a `Skipped` for what cannot be used. Everything else is here:

    OUT/manifest.jsonl   a row for each utterance (data/corpus.py), in the order of the recipe
    OUT/left_out.jsonl   {"audio": ..., "reason": ..., "where": "metadata.csv, line 17"}: what is not in it
    OUT/audio/, OUT/cut/ the recordings; the utterances that were cut out of long recordings
    OUT/source/          what was unpacked from an archive

The paths of a manifest stay inside its folder, and SOURCE is only read. So a recording that is not in OUT
already gets a hard link in OUT/audio: it takes no room, outlives a moved or deleted SOURCE, needs no rights,
and Windows has it, too. Where the disk refuses it (another disk, another owner), it is a copy. With OUT =
SOURCE, or SOURCE inside OUT, the manifest is laid beside the recordings and nothing is copied.

Every recording is decoded once (--quick: only its header is read), in several processes. Results go into
OUT/.prepare.jsonl, batch by batch and in order; a killed run continues behind the last whole line, and makes
the same manifest, byte for byte. Nothing of a corpus is held in memory but a number for each id and each
recording, to find what is named twice: 150 bytes an utterance.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from config import Parser, deaf_to_ctrl_c, end_with_parent
from data import archives
from data.corpus import write_manifest
from data.recordings import Job, Settings, Skipped, finish, number
from files import locked, show, write_jsonl

OURS = (
    "manifest.jsonl",
    "dialogues_left_out.jsonl",
    "left_out.jsonl",
    "skipped.jsonl",
    "units.jsonl",
    "dialogues.jsonl",
)
JOURNAL = ".prepare.jsonl"
BATCH = 32  # utterances that are sent to a worker at once, about


# ---- The command line --------------------------------------------------------------------------------------


def parser(description: str, **defaults) -> Parser:
    """The flags of every recipe that makes a manifest."""
    parser = Parser(description)
    settings = {field.name: field.default for field in dataclasses.fields(Settings)} | defaults
    add = parser.add_argument
    add("source", type=Path, nargs="+", help="the corpus' folder, or its archives (tar, tar.gz, zip)")
    add("out", type=Path, help="folder to make, or to complete")
    add("--min-seconds", type=float, default=settings["min_seconds"], help="shorter ones are left out")
    add("--max-seconds", type=float, default=settings["max_seconds"], help="longer ones are left out")
    add(
        "--heldout",
        type=float,
        default=settings["heldout"],
        help="share that is never trained on, where the corpus has no split of its own",
    )
    add(
        "--split-by",
        choices=("text", "speaker"),
        default=settings["split_by"],
        help="what is either in train or in heldout",
    )
    add("--english", action="store_true", help="leave out texts with letters other than a-z (accents pass)")
    add("--quick", action="store_true", help="read headers only: damage and silence are not found")
    add("--copy", action="store_true", help="copy recordings, never link them")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    return parser


def settings_of(options: dict, endings: tuple[str, ...], **fixed) -> tuple[Settings, list[Skipped]]:
    """(settings, what was refused of archives), from parsed flags; an archive is unpacked first, its files
    with one of `endings`. ValueError or OSError, one line each."""
    sources, out = [path.expanduser() for path in options["source"]], options["out"].expanduser()
    for name in ("min_seconds", "max_seconds"):
        if not 0 < options[name] < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {options[name]}: it must be greater than 0")
    if not 0 <= options["heldout"] < 1:
        raise ValueError(f"--heldout is {options['heldout']}: it must be a share of 0 to 1")
    if options["workers"] < 1:
        raise ValueError(f"--workers is {options['workers']}: it must be at least 1")
    refused = []
    for path in sources:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if all(archives.is_archive(path) for path in sources):
        source = out / "source"
        for path in sources:
            refused += [Skipped(**row) for row in archives.unpack(path, source, endings)]
    elif len(sources) > 1:
        raise ValueError("give one folder, or archives (tar, tar.gz, zip), and then the folder to make")
    elif not sources[0].is_dir():
        raise ValueError(f"{sources[0]} is neither a folder nor an archive (tar, tar.gz, tar.bz2, zip)")
    else:
        source = sources[0]
    own = {field.name for field in dataclasses.fields(Settings)} & options.keys() - {"source", "out"}
    chosen = {name: options[name] for name in own} | fixed
    return Settings(source=str(source), out=str(out), **chosen), refused


# ---- Reading a tree ----------------------------------------------------------------------------------------


def walk(
    settings: Settings, leave: tuple[str, ...] = ("__MACOSX",), below: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """(folder below the source, "" for itself; its files), sorted, from folder `below` on; without hidden
    folders, those named in `leave`, OUT if it is inside, and folders that are links."""
    root = Path(settings.source)
    out = os.path.realpath(settings.out)
    for folder, subfolders, files in os.walk(root / below, onerror=_unreadable_folder):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in leave
            and os.path.realpath(os.path.join(folder, name)) != out
        )
        yield Path(folder).relative_to(root).as_posix().removeprefix("."), sorted(files)


def _unreadable_folder(error: OSError) -> None:
    raise error


def find(settings: Settings, name: str, what: str) -> str:
    """The one file of this name in the source or up to three folders below it, as a path below the source;
    ValueError says what is missing, or that there are several."""
    root = Path(settings.source)
    found = sorted(path for depth in range(4) for path in root.glob("*/" * depth + name))
    if not found:
        raise ValueError(f"{root}: there is no {name}; give the folder of {what}")
    if len(found) > 1:
        raise ValueError(f"{root}: {name} is in {found[0].parent} and in {found[1].parent}: give one of them")
    return found[0].relative_to(root).as_posix()


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def parent(path: str) -> str:
    return path.rpartition("/")[0]


def string(table: dict, key: str) -> str:
    """table[key]; ValueError if it is no string."""
    if not isinstance(table[key], str):
        raise ValueError(f"'{key}' is no string")
    return table[key]


def stem(path: str) -> str:
    """a/b.wav -> a/b."""
    return path[: len(path) - len(Path(path).suffix)]


def sentence(capitals: str) -> str:
    """THE TEXT OF A CORPUS IN CAPITALS -> The text of a corpus in capitals: how a LLaMA has read English."""
    words = [word.capitalize() if word in ENGLISH_CAPITALS else word for word in capitals.lower().split()]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


ENGLISH_CAPITALS = {"i", "i'm", "i'll", "i've", "i'd"}


# ---- All recordings ----------------------------------------------------------------------------------------


def prepare(
    name: str, jobs: Iterable[Job | Skipped], total: int, settings: Settings, workers: int, refused=()
) -> None:
    """Makes OUT/manifest.jsonl from the jobs of recipe `name`, whose `work` adds up to `total` or less, and
    prints what was found. ValueError or OSError, one line each."""
    out = Path(settings.out)
    check_ours(out, "manifest.jsonl", "left_out.jsonl", JOURNAL)
    journal = out / JOURNAL
    with locked(out):
        with open(journal, "r+b" if journal.is_file() else "w+b") as file:
            header = json.dumps({"recipe": name} | dataclasses.asdict(settings)) + "\n"
            found = work_off(file, header, unique(chain(refused, jobs)), total, settings, workers)
        write_jsonl(out / "left_out.jsonl", (row for entry in entries(journal) for row in entry["skipped"]))
        if found.hours:
            write_manifest(out, (row for entry in entries(journal) for row in entry["rows"]))
        journal.unlink()
    if not found.hours:
        raise ValueError(found.nothing(settings.source, out / "left_out.jsonl"))
    print(found.report(out))


def work_off(
    journal: BinaryIO, header: str, jobs: Iterator, total: int, settings: Settings, workers: int
) -> "Found":
    """Appends the results of all jobs to the journal, those that it does not have yet."""
    found = Found()
    bar = tqdm(
        total=total,
        desc=json.loads(header)["recipe"],
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar:
        jobs = continue_from(journal, header, jobs, found, bar)
        for batch, results in ordered(finish, settings, batches(jobs), workers):
            for job, (rows, skipped) in zip(batch, results):
                entry = {"job": key(job), "work": job.work, "rows": rows, "skipped": skipped}
                journal.write(json.dumps(entry).encode() + b"\n")
                found.add(rows, skipped)
                bar.update(min(job.work, total - bar.n))  # more than all of it has no percentage
            journal.flush()
            bar.set_postfix_str(found.line(), refresh=False)
        bar.update(max(0, total - bar.n))
    return found


def is_ours(path: Path, out: Path) -> bool:
    """Was it written by a recipe: into OUT, which may be the source, too, or earlier?"""
    beside = any((path.parent / name).is_file() for name in ("left_out.jsonl", "dialogues_left_out.jsonl"))
    return path.name in OURS and (beside or path.parent.resolve() == out.resolve())


def check_ours(out: Path, product: str, *signs: str) -> None:
    """ValueError if OUT has a `product` that no recipe made: it is not overwritten."""
    if (out / product).is_file() and not any((out / sign).is_file() for sign in signs):
        raise ValueError(f"{out / product} was not made by a recipe: give another folder to make")


def unique(jobs: Iterable[Job | Skipped]) -> Iterator[Job | Skipped]:
    """The jobs without what has the id of an earlier one, or is the same recording once more."""
    seen = set()
    for job in jobs:
        if isinstance(job, Skipped):
            yield job
            continue
        kept = []
        for utterance in job.utterances:
            numbers = {number(f"id {utterance.id}")}
            if utterance.begin is None:
                numbers.add(number(f"audio {job.audio}"))
            if numbers & seen:
                yield Skipped(job.audio, f"named twice: {show(utterance.id)}", utterance.where)
            else:
                seen |= numbers
                kept.append(utterance)
        if kept:
            yield job._replace(utterances=kept)
        elif job.work:
            yield Job(job.audio, [], job.work)


def key(job: Job | Skipped) -> str:
    """What a job is known by when a killed run continues."""
    return blake2b(repr(job).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def continue_from(
    file: BinaryIO, header: str, jobs: Iterator, found: "Found", bar: tqdm
) -> Iterator[Job | Skipped]:
    """The jobs that the journal `file` does not have yet; what it has is added to `found`."""
    if file.readline() != header.encode():  # other flags, another source
        file.seek(0)
        file.write(header.encode())
        file.truncate()
        return jobs
    whole = file.tell()
    for line in file:
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)
        job = next(jobs, None)
        if job is None or key(job) != entry["job"]:  # the source has changed: from here on anew
            jobs = chain([job], jobs) if job else jobs
            break
        found.add(entry["rows"], entry["skipped"])
        bar.update(min(entry["work"], bar.total - bar.n))
        whole += len(line)
    file.seek(whole)
    file.truncate()
    return jobs


def entries(journal: Path) -> Iterator[dict]:
    with open(journal, "rb") as file:
        file.readline()
        for line in file:
            yield json.loads(line)


def batches(jobs: Iterator[Job | Skipped]) -> Iterator[list[Job | Skipped]]:
    batch, size = [], 0
    for job in jobs:
        batch.append(job)
        size += len(job.utterances) if isinstance(job, Job) else 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ordered(function: Callable, settings: Settings, items: Iterator, workers: int) -> Iterator[tuple]:
    """(item, function(settings, item)) in the order of the items; few of them are under way at a time."""
    first = list(islice(items, 2))
    items = chain(first, items)
    if workers == 1 or len(first) < 2:
        for item in items:
            yield item, function(settings, item)
        return
    with worker_processes(workers, end_with_parent) as pool:
        waiting = deque()
        for item in items:
            with deaf_to_ctrl_c():
                waiting.append((item, pool.submit(function, settings, item)))  # may start a process
            if len(waiting) > 4 * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()


@contextmanager
def worker_processes(workers: int, initializer: Callable) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes. When this one is interrupted, what they have begun (an hour to cut, perhaps) is
    not waited for."""
    before = multiprocessing.active_children()
    # spawn is the one way that works on Linux, macOS and Windows, and together with the threads of torch
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=initializer)
    try:
        yield pool
    except BrokenProcessPool:
        raise OSError(
            "a worker died (out of memory?); what is done is kept: try again with --workers 1"
        ) from None
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in before:
                child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# ---- The report --------------------------------------------------------------------------------------------


class Found:
    """What has been found so far: hours, utterances, speakers by split; what is left out, by reason."""

    def __init__(self):
        self.hours: Counter = Counter()
        self.utterances: Counter = Counter()
        self.speakers: dict[str, set] = defaultdict(set)
        self.reasons: Counter = Counter()

    def add(self, rows: list[dict], skipped: list[dict]) -> None:
        for row in rows:
            self.hours[row["split"]] += row["seconds"] / 3600
            self.utterances[row["split"]] += 1
            self.speakers[row["split"]].add(row.get("speaker", ""))
        for row in skipped:
            self.reasons[row["reason"].split(":")[0].split(" (")[0]] += 1

    def line(self) -> str:
        hours = sum(self.hours.values())
        return f" {self.utterances.total()} utterances, {hours:.1f} h, {self.reasons.total()} left out"

    def nothing(self, source: str, path: Path) -> str:
        if not self.reasons:
            return f"{source}: no recording was found there; is it the right folder?"
        counts = counts_of(self.reasons)
        counts = counts if len(counts) < 120 else counts[:120] + "..."
        return f"{source}: no recording can be used ({counts}); {path} lists them all"

    def report(self, out: Path) -> str:
        lines = []
        for split in sorted(self.hours, reverse=True):  # train, heldout
            n, hours = self.utterances[split], self.hours[split]
            lines.append(
                f"{split:9} {n:8} utterances, {hours:9.2f} hours, {len(self.speakers[split])} speakers"
            )
        if self.reasons:
            lines.append(
                f"left out  {self.reasons.total():8}: {counts_of(self.reasons)}; {out / 'left_out.jsonl'}"
            )
        return "\n".join(lines)


def counts_of(reasons: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in Counter(reasons).most_common())
