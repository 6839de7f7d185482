"""Documents as token ids on disk: memory maps with the loss mask as bits, for data that fit into no memory.

SpeechInstruct (paper §3) is one JSON object a line, {"prefix": ..., "plain_text": ...}, 13 GB as released.
Here each line is cut into ids once, and what training reads of them later is only what a step needs:

    python -m data.tokens cross_modal_instruction.jsonl out/tokens --tokenizer out/model/llama

    out/tokens/00000.ids     ids of the documents of one part, in a row (uint16 or uint32)
    out/tokens/00000.mask    one bit for each id: is it a target of the loss (eq. 4)?
    out/tokens/00000.ends    where each document ends (uint64)
    out/tokens/00000.json    how many they are, what they were made from, what was left out
    out/tokens/tokens.json   the same of all parts; written last: a folder with it is complete

    >>> TokenMap("out/tokens")[0]
    ([1, 643, 28, ...], [False, False, ..., True])

A part is a fixed stretch of the source (bytes of a file, or draws of a stage: training/reading.py), so parts
can be made in any order, by many processes, and a killed run makes only those that are missing. A document
longer than `max_len`, or with a mistake in it, is counted by reason and left out; nothing is cut.

Opening a map reads one record for each part and nothing of the documents (docs/own-data.md has numbers); a
file is mapped when a document of its part is asked for.

References: SpeechGPT, arXiv:2305.11000; the released files, https://huggingface.co/datasets/fnlp/SpeechInstruct
"""

import json
import mmap
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import Parser, command_line, deaf_to_ctrl_c, end_with_parent
from data.batches import Document, order
from data.documents import drop_and_replace
from data.recipe import counts_of, worker_processes
from files import MAX_JSON, fingerprint, one_line, read_json, show, write_atomic, write_json
from tokenizer import Tokenizer, text_to_units

PART = 32 << 20  # bytes of the source in a part
ANSWER = "[SpeechGPT]: "  # what follows it is the answer
SPEECH = re.compile(r"<sosp>(<\d+>)+<eosp>")


# ---- The released lines as documents -----------------------------------------------------------------------


def to_document(row: object, tok: Tokenizer) -> Document:
    """A line of SpeechInstruct as (ids, which of them are targets): all after "[SpeechGPT]: " is answer; of
    speech alone, "<sosp>...<eosp>", all is target (eq. 3).

    row: {"prefix": the meta instruction or "", "plain_text": the dialogue}. ValueError if it is not that."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    prefix, text = row.get("prefix"), row.get("plain_text")
    if not isinstance(prefix, str) or not isinstance(text, str):
        raise ValueError("needs the texts 'prefix' and 'plain_text'")
    if max(text_to_units(text), default=0) >= tok.n_units:  # as text it would be learned as nonsense
        raise ValueError(f"a unit outside 0..{tok.n_units - 1}")
    if SPEECH.fullmatch(text):
        ids = tok.encode(text)
        return ids, [True] * len(ids)
    prompt, marker, answer = text.partition(ANSWER)
    if not marker:
        raise ValueError("no '[SpeechGPT]: ' in 'plain_text'")
    if not answer.strip():
        raise ValueError("nothing after '[SpeechGPT]: '")
    if not prompt.startswith(prefix):
        prompt = prefix + prompt
    return tok.document(prompt + marker, answer)


# ---- Reading -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part, opened. The arrays are maps of files: nothing is read before it is needed."""

    ids: np.ndarray  # (tokens,) uint16 or uint32
    mask: np.ndarray  # (ceil(tokens / 8),) uint8, the first token in the lowest bit
    ends: np.ndarray  # (documents,) uint64


class Totals(NamedTuple):
    documents: int
    tokens: int
    skipped: dict[str, int]  # reason: how many


class TokenMap:
    """A folder of documents as ids: len(m), m[i] -> (ids, mask), m.lengths(). Read-only, and small in memory.

    ValueError or OSError, one line, if the folder is not complete, damaged, or made with another tokenizer.
    """

    OPEN = 64  # parts at a time: a part is three files, and a process may have a thousand open

    def __init__(self, folder: str | Path, vocab_size: int | None = None):
        self.folder = Path(folder)
        path = self.folder / "tokens.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; `python -m data.tokens` makes or completes the folder"
            )
        self.table = read_json(path)
        self.vocab_size = _number(self.table, "vocab_size", path, 1)
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.folder} was made with a tokenizer of {self.vocab_size} tokens, this one has "
                f"{vocab_size}; make it anew with --tokenizer"
            )
        parts = range(_number(self.table, "parts", path))
        self.sizes = [self._size(number) for number in parts]  # (documents, tokens, longest) of each part
        self.starts = np.cumsum([0, *(documents for documents, _, _ in self.sizes)])  # first document of each
        self.part = lru_cache(self.OPEN)(self._open)
        if self.starts[-1] != _number(self.table, "documents", path):
            raise ValueError(f"{path} counts other documents than its parts hold; make the folder anew")

    def _size(self, number: int) -> tuple[int, int, int]:
        path = self.folder / f"{number:05}.json"
        table = read_json(path)
        documents, tokens = _number(table, "documents", path), _number(table, "tokens", path)
        longest = _number(table, "longest", path)
        _check_size(path.with_suffix(".ids"), dtype_of(self.vocab_size), tokens)
        _check_size(path.with_suffix(".mask"), np.uint8, -(-tokens // 8))
        _check_size(path.with_suffix(".ends"), np.uint64, documents)
        return documents, tokens, longest

    def _open(self, number: int) -> Part:
        path = self.folder / f"{number:05}"
        documents, tokens, _ = self.sizes[number]
        part = Part(
            _map(path.with_suffix(".ids"), dtype_of(self.vocab_size), tokens),
            _map(path.with_suffix(".mask"), np.uint8, -(-tokens // 8)),
            _map(path.with_suffix(".ends"), np.uint64, documents),
        )
        if documents and part.ends[-1] != tokens:
            raise self._damaged(number)
        return part

    def _damaged(self, number: int) -> ValueError:
        path = self.folder / f"{number:05}.ends"
        return ValueError(f"{path} is damaged: its documents do not follow each other; make the folder anew")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def lengths(self, number: int) -> np.ndarray:
        """(documents,) int64: tokens of each document of a part."""
        return np.diff(self.part(number).ends.astype(np.int64), prepend=0)

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        part = self.part(number)
        within = i - int(self.starts[number])
        start, end = int(part.ends[within - 1]) if within else 0, int(part.ends[within])
        if not start < end <= len(part.ids):
            raise self._damaged(number)
        ids = part.ids[start:end].tolist()
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"{self.folder}: document {i} has id {max(ids)} of {self.vocab_size}; make it anew"
            )
        bits = np.unpackbits(part.mask[start // 8 : -(-end // 8)], bitorder="little")
        mask = bits[start % 8 :][: end - start].astype(bool).tolist()
        return ids, mask


HELD_OUT = 2000  # documents at the end of a map that are not trained on; a hundredth of a small map


class Mixture(Sequence):
    """Documents of several maps as one long list. Every map is in it at least once, whole; small ones are
    repeated up to their share, as data/documents.py does with kinds. In memory are weights and numbers alone
    (of maps with documents that are too long, four bytes for each of those that are not)."""

    def __init__(self, maps: dict[TokenMap, float], max_len: int, held_out: bool = False):
        """maps: with their shares. max_len: longer documents are left out. held_out: the end of each map, as
        it is, instead of all but this end."""
        self.chosen = []  # (map, numbers of its documents)
        self.too_long = 0
        for table in maps:
            end = len(table) - min(HELD_OUT, len(table) // 100)
            numbers = range(end, len(table)) if held_out else range(end)
            fitting = fitting_numbers(table, numbers, max_len)
            self.too_long += len(numbers) - len(fitting)
            self.chosen.append((table, fitting))
            if not held_out and not len(fitting):
                raise ValueError(f"{table.folder} has no document of at most {max_len} tokens; raise max_len")
        sizes = [len(numbers) for _, numbers in self.chosen]
        if not held_out:
            epoch = max(size / share for size, share in zip(sizes, maps.values()))
            sizes = [round(share * epoch) for share in maps.values()]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        table, numbers = self.chosen[which]
        return table[int(numbers[(i - int(self.starts[which])) % len(numbers)])]


def fitting_numbers(table: TokenMap, numbers: range, max_len: int) -> Sequence[int]:
    """Those of `numbers` whose documents have at most max_len tokens."""
    if all(longest <= max_len for _, _, longest in table.sizes):
        return numbers
    found = []
    for number, first in enumerate(table.starts[:-1]):
        fits = first + np.flatnonzero(table.lengths(number) <= max_len)
        found.append(fits.astype(np.uint32 if len(table) <= 1 << 32 else np.uint64))
    fits = np.concatenate(found)
    return fits[np.searchsorted(fits, numbers.start) : np.searchsorted(fits, numbers.stop)]


def shuffled(mixture: Sequence[Document], seed: int, noise: float = 0.0, units: range = range(0)) -> Callable:
    """index -> the index-th document of the training, in endless shuffled epochs (batches.order).

    noise, of input speech, as of data/documents.py:render; units: the ids that are units."""

    def read(index: int) -> Document:
        item, epoch = order(index, len(mixture), seed)
        if not noise:
            return mixture[item]
        return with_noise(mixture[item], noise, units, random.Random(f"{seed} {epoch} {item}"))

    return read


def with_noise(document: Document, noise: float, units: range, draw: random.Random) -> Document:
    """A document with `noise` in its input speech, the units that are not targets."""
    ids, mask = [], []
    run: list[int] = []  # of input units
    for token, target in [*zip(*document), (-1, False)]:
        if token in units and not target:
            run.append(token - units.start)
            continue
        if run:
            run = drop_and_replace(run, noise, len(units), draw)
            ids += [unit + units.start for unit in run]
            mask += [False] * len(run)
            run = []
        ids.append(token)
        mask.append(target)
    return ids[:-1], mask[:-1]


def dtype_of(vocab_size: int) -> type:
    """The smallest type that holds every id: two bytes for LLaMA's 33,006."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _check_size(path: Path, dtype: type, n: int) -> None:
    expected = n * np.dtype(dtype).itemsize
    found = path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} has {found} bytes, not {expected}: it is damaged; delete it and make the folder anew"
        )


def _map(path: Path, dtype: type, n: int) -> np.ndarray:
    if not n:
        return np.zeros(0, dtype)  # nothing cannot be mapped
    found = np.memmap(path, dtype, "r", shape=(n,))
    if hasattr(mmap, "MADV_RANDOM"):  # documents are read one here, one there: nothing around them
        found._mmap.madvise(mmap.MADV_RANDOM)
    return found


def _number(table: object, key: str, path: Path, least: int = 0) -> int:
    value = table.get(key) if isinstance(table, dict) else None
    if type(value) is not int or not least <= value < 1 << 48:
        raise ValueError(
            f"{path}: '{key}' is {show(value)}, not a number of at least {least}; make the folder anew"
        )
    return value


# ---- Writing -----------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One part, and all that a process needs to make it."""

    folder: Path
    number: int
    start: int  # the part has what begins in start to end of the source
    end: int
    vocab_size: int
    origin: dict  # what the map is made from: if it is still the same, the part need not be made again
    # (start, end) -> documents; text instead of one is the reason why it is left out
    read: Callable[[int, int], Iterable[Document | str]]

    @property
    def record(self) -> dict:
        return self.origin | {"vocab_size": self.vocab_size, "from": self.start, "to": self.end}


def make_part(job: Job) -> int:
    """Writes one part; returns how much of the source it covers."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    skipped: Counter[str] = Counter()
    for found in job.read(job.start, job.end):
        if isinstance(found, str):
            skipped[found] += 1
            continue
        ids.append(np.array(found[0], dtype_of(job.vocab_size)))
        masks.append(np.array(found[1], bool))
    lengths = [len(row) for row in ids]
    path = job.folder / f"{job.number:05}"
    write_atomic(path.with_suffix(".ids"), np.concatenate(ids).tobytes() if ids else b"")
    bits = np.packbits(np.concatenate(masks), bitorder="little") if masks else np.zeros(0, np.uint8)
    write_atomic(path.with_suffix(".mask"), bits.tobytes())
    write_atomic(path.with_suffix(".ends"), np.cumsum(lengths, dtype=np.uint64).tobytes())
    record = {"documents": len(ids), "tokens": sum(lengths), "longest": max(lengths, default=0)}
    write_json(path.with_suffix(".json"), record | {"skipped": dict(skipped)} | job.record)
    return job.end - job.start


def is_made(job: Job) -> bool:
    path = job.folder / f"{job.number:05}.json"
    try:
        table = read_json(path) if path.is_file() else None
    except ValueError:
        return False
    return isinstance(table, dict) and job.record.items() <= table.items()


def make(
    folder: Path,
    size: int,
    part: int,
    vocab_size: int,
    origin: dict,
    read: Callable[[int, int], Iterable[Document | str]],
    workers: int = 1,
    title: str = "tokens",
    unit: str = "B",
) -> Totals:
    """Writes the map `folder` of a source of this `size`, in parts; goes on where it was stopped. If nothing
    of the source can be used, the map is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    jobs = []
    for number, start in enumerate(range(0, size, part)):
        jobs.append(Job(folder, number, start, min(start + part, size), vocab_size, origin, read))
    missing = [job for job in jobs if not is_made(job)]
    bar = tqdm(
        total=size,
        initial=size - sum(job.end - job.start for job in missing),
        desc=title,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar:
        for done in work(missing, workers):
            bar.update(done)

    documents = tokens = 0
    skipped: Counter[str] = Counter()
    for job in jobs:
        table = read_json(folder / f"{job.number:05}.json")
        documents += table["documents"]
        tokens += table["tokens"]
        skipped.update(table["skipped"])
    totals = Totals(documents, tokens, dict(skipped))
    if documents or not size:
        record = {"vocab_size": vocab_size, "parts": len(jobs), **totals._asdict()}
        write_json(folder / "tokens.json", record | origin)
    return totals


def work(jobs: list[Job], workers: int) -> Iterator[int]:
    """make_part of every job, as they finish."""
    if workers == 1 or len(jobs) < 2:
        yield from map(make_part, jobs)
        return
    with worker_processes(workers, end_with_parent) as pool:
        with deaf_to_ctrl_c():
            parts = [pool.submit(make_part, job) for job in jobs]  # starts the processes
        for done in as_completed(parts):
            yield done.result()


# ---- SpeechInstruct ----------------------------------------------------------------------------------------


_tokenizers: dict[Path, Tokenizer] = {}  # opened once in each process


def lines_between(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in bytes [start, end)."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline(MAX_JSON)  # the rest of the line before; of a newline just before `start`, nothing
        while file.tell() < end:
            line = file.readline(MAX_JSON)
            if not line:
                return
            yield line


def documents_between(
    source: Path, tokenizer: Path, max_len: int, start: int, end: int
) -> Iterator[Document | str]:
    """The lines that begin in bytes [start, end), each as a document or the reason why it is none."""
    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = Tokenizer.from_pretrained(tokenizer)
    for line in lines_between(source, start, end):
        if not line.strip():
            continue
        try:
            with one_line("line"):
                document = to_document(json.loads(line), _tokenizers[tokenizer])
        except ValueError as error:
            yield str(error).removeprefix("line: ")[:100].split(" (")[0]
            continue
        yield document if len(document[0]) <= max_len else f"longer than {max_len} tokens"


def fingerprint_of(tokenizer: str | Path) -> str:
    """Of a tokenizer's folder."""
    return fingerprint(*(Path(tokenizer) / name for name in ("tokenizer.model", "added_tokens.json")))


def tokenize(
    source: str | Path,
    folder: str | Path,
    tokenizer: str | Path,
    max_len: int = 1024,
    workers: int = 1,
    part: int = PART,
) -> Totals:
    """Every line of the SpeechInstruct file `source` as ids, in `folder`; goes on where it was stopped."""
    source, folder, tokenizer = Path(source), Path(folder), Path(tokenizer)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give a SpeechInstruct file (JSON lines)")
    vocab_size = len(Tokenizer.from_pretrained(tokenizer))
    size = source.stat().st_size
    if not size:
        raise ValueError(f"{source} is empty")
    origin = {
        "source": source.name,
        "changed": source.stat().st_mtime_ns,
        "tokenizer": fingerprint_of(tokenizer),
        "units": units_of(source),
        "max_len": max_len,
    }
    read = partial(documents_between, source, tokenizer, max_len)
    totals = make(folder, size, part, vocab_size, origin, read, workers)
    if not totals.documents:
        raise ValueError(f"{source} has no document that can be used ({counts_of(totals.skipped)})")
    return totals


def units_of(source: Path) -> str:
    """The fingerprint of the clusters whose units a file has, if data/speechinstruct/prepare.py wrote it."""
    record = source.with_name("made_of.json")
    table = read_json(record) if record.is_file() else {}
    found = table.get("units", "") if isinstance(table, dict) else ""
    return found if isinstance(found, str) else ""


def check_map(table: TokenMap, tokenizer: Path, clusters: str) -> None:
    """ValueError if a map was made with another tokenizer than that in the folder `tokenizer`, or of units
    of other clusters than those with this fingerprint (data/units.py; "": not known)."""
    if table.table.get("tokenizer") != fingerprint_of(tokenizer):
        raise ValueError(
            f"{table.folder} was made with another tokenizer than {tokenizer}; make it anew: "
            f"python -m data.tokens SOURCE {table.folder} --tokenizer {tokenizer}"
        )
    units = table.table.get("units")
    if units and clusters and units != clusters:
        raise ValueError(
            f"{table.folder} was made of units of another HuBERT or k-means than this run's; make it anew: "
            "data/speechinstruct/prepare.py, then python -m data.tokens"
        )


def main() -> None:
    parser = Parser("Cuts a SpeechInstruct file into token ids, once.", prog="python -m data.tokens")
    parser.add_argument("source", help='JSON lines with "prefix" and "plain_text"')
    parser.add_argument("out", help="folder to make, or to complete")
    parser.add_argument(
        "--tokenizer", required=True, help="folder with tokenizer.model and added_tokens.json"
    )
    parser.add_argument("--max-len", type=int, default=1024, help="longer documents are left out")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args()
    if options.max_len < 2 or options.workers < 1:
        raise ValueError("--max-len must be at least 2, and --workers at least 1")
    totals = tokenize(options.source, options.out, options.tokenizer, options.max_len, options.workers)
    print(f"{options.out}: {totals.documents:,} documents, {totals.tokens:,} tokens")
    if totals.skipped:
        print(f"left out: {counts_of(totals.skipped)}")


if __name__ == "__main__":
    command_line(main)
