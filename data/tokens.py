"""Documents as token ids on disk: memory maps with the loss mask as bits, for data that fit into no memory.

SpeechInstruct (paper §3) is one JSON object a line, {"prefix": ..., "plain_text": ...}, 13 GB as released.
Here each line is cut into ids once, and what training reads of them later is only what a step needs:

    python -m data.tokens cross_modal_instruction.jsonl out/tokens --tokenizer out/model/llama

    out/tokens/00000.ids     ids of the documents of one part of the file, in a row (uint16 or uint32)
    out/tokens/00000.mask    one bit for each id: is it a target of the loss (eq. 4)?
    out/tokens/00000.ends    where each document ends (uint64)
    out/tokens/00000.json    how many they are, which bytes of which file they come from, what was left out
    out/tokens/tokens.json   the same of all parts; written last: a folder with it is complete

    >>> TokenMap("out/tokens")[0]
    ([1, 643, 28, ...], [False, False, ..., True])

A part is a fixed stretch of bytes of the file, so parts can be made in any order, by many processes, and a
killed run makes only those that are missing. A document longer than `max_len`, or with a mistake in it, is
counted by reason and left out; nothing is cut.

References: SpeechGPT, arXiv:2305.11000; the released files, https://huggingface.co/datasets/fnlp/SpeechInstruct
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import Parser, command_line, deaf_to_ctrl_c, end_with_parent
from data.batches import Document
from data.documents import IDS, Example
from data.recipe import counts_of, worker_processes
from files import MAX_JSON, one_line, read_json, show, write_atomic, write_json
from tokenizer import Tokenizer, text_to_units

PART = 32 << 20  # bytes of the source in a part
ANSWER = "[SpeechGPT]: "  # what follows it is the answer


# ---- The released lines as documents -----------------------------------------------------------------------


def to_document(row: object, tok: Tokenizer) -> Document:
    """A line of SpeechInstruct as (ids, which of them are targets): all after "[SpeechGPT]: " is answer.

    row: {"prefix": the meta instruction or "", "plain_text": the dialogue}. ValueError if it is not that."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    prefix, text = row.get("prefix"), row.get("plain_text")
    if not isinstance(prefix, str) or not isinstance(text, str):
        raise ValueError("needs the texts 'prefix' and 'plain_text'")
    prompt, marker, answer = text.partition(ANSWER)
    if not marker:
        raise ValueError("no '[SpeechGPT]: ' in 'plain_text'")
    if not answer.strip():
        raise ValueError("nothing after '[SpeechGPT]: '")
    if max(text_to_units(text), default=0) >= tok.n_units:  # as text it would be learned as nonsense
        raise ValueError(f"a unit outside 0..{tok.n_units - 1}")
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

    ValueError or OSError, one line, if the folder is not complete, damaged, or made with another vocabulary.
    """

    def __init__(self, folder: str | Path, vocab_size: int | None = None):
        self.folder = Path(folder)
        path = self.folder / "tokens.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; `python -m data.tokens` makes or completes the folder"
            )
        table = read_json(path)
        self.vocab_size = _number(table, "vocab_size", path, 1)
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(
                f"{self.folder} was made with a tokenizer of {self.vocab_size} tokens, this one has "
                f"{vocab_size}; make it anew with --tokenizer"
            )
        self.parts = [self._open(number) for number in range(_number(table, "parts", path, 1))]
        self.starts = np.cumsum([0] + [len(part.ends) for part in self.parts])  # first document of each part
        if self.starts[-1] != _number(table, "documents", path):
            raise ValueError(f"{path} counts other documents than its parts hold; make the folder anew")

    def _open(self, number: int) -> Part:
        path = self.folder / f"{number:05}.json"
        table = read_json(path)
        documents = _number(table, "documents", path)
        tokens = _number(table, "tokens", path)
        part = Part(
            _map(path.with_suffix(".ids"), dtype_of(self.vocab_size), tokens),
            _map(path.with_suffix(".mask"), np.uint8, -(-tokens // 8)),
            _map(path.with_suffix(".ends"), np.uint64, documents),
        )
        ends = part.ends
        if documents and (ends[-1] != tokens or ends[0] == 0 or (ends[1:] <= ends[:-1]).any()):
            raise ValueError(
                f"{path.with_suffix('.ends')} is damaged: its documents do not follow each other"
            )
        return part

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, i: int) -> tuple[Part, int, int]:
        """(part, first token, last token + 1) of document i."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        part = self.parts[number]
        within = i - int(self.starts[number])
        start = int(part.ends[within - 1]) if within else 0
        return part, start, int(part.ends[within])

    def lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each."""
        found = [np.diff(part.ends.astype(np.int64), prepend=0) for part in self.parts]
        return np.concatenate(found)

    def __getitem__(self, i: int) -> Document:
        part, start, end = self._place(i)
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
    repeated up to their share, as data/documents.py does with kinds. Only where each begins is in memory."""

    def __init__(self, maps: dict[TokenMap, float], max_len: int, held_out: bool = False):
        """maps: with their shares. max_len: longer documents are left out. held_out: the end of each map, as
        it is, instead of all but this end."""
        self.chosen = []  # (map, numbers of its documents)
        self.too_long = 0
        for table in maps:
            lengths = table.lengths()
            end = len(table) - min(HELD_OUT, len(table) // 100)
            numbers = np.arange(end, len(table)) if held_out else np.arange(end)
            fits = lengths[numbers] <= max_len
            self.too_long += int((~fits).sum())
            self.chosen.append((table, numbers[fits]))
            if not held_out and not fits.any():
                raise ValueError(f"{table.folder} has no document of at most {max_len} tokens; raise max_len")
        sizes = [len(numbers) for _, numbers in self.chosen]
        if not held_out:
            epoch = max(size / share for size, share in zip(sizes, maps.values()))
            sizes = [round(share * epoch) for share in maps.values()]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        table, numbers = self.chosen[which]
        return Example(IDS, table[int(numbers[(i - int(self.starts[which])) % len(numbers)])])


def dtype_of(vocab_size: int) -> type:
    """The smallest type that holds every id: two bytes for LLaMA's 33,006."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _map(path: Path, dtype: type, n: int) -> np.ndarray:
    expected = n * np.dtype(dtype).itemsize
    found = path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path} has {found} bytes, not {expected}: it is damaged; delete it and make the folder anew"
        )
    return np.memmap(path, dtype, "r", shape=(n,)) if n else np.zeros(0, dtype)  # nothing cannot be mapped


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

    source: Path
    start: int  # the part has the lines that begin in bytes start to end of the source
    end: int
    number: int
    folder: Path
    tokenizer: Path
    max_len: int


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


def make_part(job: Job) -> int:
    """Writes one part; returns how many bytes of the source it covers."""
    if job.tokenizer not in _tokenizers:
        _tokenizers[job.tokenizer] = Tokenizer.from_pretrained(job.tokenizer)
    tok = _tokenizers[job.tokenizer]
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    ends = []
    skipped: Counter[str] = Counter()
    tokens = 0
    for line in lines_between(job.source, job.start, job.end):
        if not line.strip():
            continue
        try:
            with one_line("line"):
                document, mask = to_document(json.loads(line), tok)
        except ValueError as error:
            skipped[str(error).removeprefix("line: ")[:100].split(" (")[0]] += 1
            continue
        if len(document) > job.max_len:
            skipped[f"longer than {job.max_len} tokens"] += 1
            continue
        tokens += len(document)
        ids.append(np.array(document, dtype_of(len(tok))))
        masks.append(np.array(mask, bool))
        ends.append(tokens)
    path = job.folder / f"{job.number:05}"
    write_atomic(path.with_suffix(".ids"), np.concatenate(ids).tobytes() if ids else b"")
    bits = np.packbits(np.concatenate(masks), bitorder="little") if masks else np.zeros(0, np.uint8)
    write_atomic(path.with_suffix(".mask"), bits.tobytes())
    write_atomic(path.with_suffix(".ends"), np.array(ends, np.uint64).tobytes())
    record = {"documents": len(ends), "tokens": tokens, "skipped": dict(skipped)}
    write_json(path.with_suffix(".json"), record | origin(job, len(tok)))
    return job.end - job.start


def origin(job: Job, vocab_size: int) -> dict:
    """What a part was made from: if it is still the same, the part need not be made again."""
    model = job.tokenizer / "tokenizer.model"
    return {
        "source": job.source.name,
        "bytes": [job.start, job.end],
        "changed": job.source.stat().st_mtime_ns,
        "vocab_size": vocab_size,
        "tokenizer": [model.stat().st_size, model.stat().st_mtime_ns],
        "max_len": job.max_len,
    }


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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    jobs = []
    for number, start in enumerate(range(0, size, part)):
        jobs.append(Job(source, start, min(start + part, size), number, folder, tokenizer, max_len))
    missing = [job for job in jobs if not is_made(job, vocab_size)]
    bar = tqdm(
        total=size,
        initial=size - sum(job.end - job.start for job in missing),
        desc="tokens",
        unit="B",
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
    if not documents:
        raise ValueError(f"{source} has no document that can be used ({counts_of(skipped)})")
    totals = Totals(documents, tokens, dict(skipped))
    write_json(folder / "tokens.json", {"vocab_size": vocab_size, "parts": len(jobs), **totals._asdict()})
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


def is_made(job: Job, vocab_size: int) -> bool:
    path = job.folder / f"{job.number:05}.json"
    if not path.is_file():
        return False
    try:
        table = read_json(path)
    except ValueError:
        return False
    expected = origin(job, vocab_size)
    return isinstance(table, dict) and expected.items() <= table.items()


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
