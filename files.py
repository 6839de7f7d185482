"""Files written whole or not at all, JSON, and JSON lines: what every other file of this project may use.

    >>> write_jsonl("manifest.jsonl", [{"wav": "a.wav", "text": "Hello."}])
    >>> read_jsonl("manifest.jsonl", needed=("wav", "text"))
    [{'wav': 'a.wav', 'text': 'Hello.'}]

A file is written under a temporary name and renamed when it is complete: a full disk or a killed process
leaves the old one. A file that is read may come from anywhere: whatever is wrong with it is a ValueError of
one line that begins with its path. torch is not imported here: worker processes that do without start faster.

References: JSON, RFC 8259; JSON lines, https://jsonlines.org; rename in POSIX, and os.replace of Python.
"""

import hashlib
import json
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

MAX_JSON = 16 << 20  # bytes, far above any honest file: the index of the largest LLaMA has 0.1 MB


# ---- Writing -----------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, data: bytes, sync: bool = True) -> None:
    """Writes a file that is, at every moment and after every crash, either the old one or the new one.

    A failure (full disk, no permission) is an OSError that names the file; nothing of the attempt remains.
    sync=False does not wait for the disk, for thousands of files that can be made again: much faster, but a
    power cut may leave an empty one."""
    stream_atomic(path, lambda file: file.write(data), sync)


def stream_atomic(
    path: str | Path,
    write: Callable[[BinaryIO], object],
    sync: bool = True,
    previous: str | Path | None = None,
) -> None:
    """write_atomic for a file too large to put together in memory: `write(file)` writes its content.

    previous: the name under which the old file is kept; at every moment one of the two is there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        file = open(temporary, "xb")
        try:
            with file:
                write(file)
                file.flush()
                if sync:
                    os.fsync(file.fileno())  # the content is on disk before its name
                if not temporary.exists() or not os.path.samestat(temporary.stat(), os.fstat(file.fileno())):
                    raise OSError("another process is writing the same file")
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)  # when closed: Windows renames no open file
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise OSError(f"{path}: {error}") from None


def fingerprint(*paths: str | Path) -> str:
    """Hexadecimal digits that stand for the contents of these files; one that is missing counts as such."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except (FileNotFoundError, NotADirectoryError):
            digest.update(b"missing")
    return digest.hexdigest()


# ---- One run to a folder -----------------------------------------------------------------------------------


@contextmanager
def locked(folder: str | Path):
    """Context manager: a lock on `folder`. Another process that asks for it gets an OSError, one line, that
    names the process that has it.

    The system takes the lock from a process that ends, however it ends, so none is ever left behind. On a
    disk without locks there is none."""
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = show(file.read(100)).strip("'") or "another process"
            raise OSError(
                f"{folder}: another run is at work here ({who}); wait for it, or choose another folder"
            ) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file: int) -> None:
    if os.name == "nt":
        import msvcrt

        os.lseek(file, 1 << 30, os.SEEK_SET)  # a byte beyond the end: what is locked nobody else can read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- JSON --------------------------------------------------------------------------------------------------


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"))


def read_json(path: str | Path, max_bytes: int = MAX_JSON) -> object:
    """Parses a JSON file of at most max_bytes. Damaged, too large or too deep: ValueError, one line."""
    with one_line(path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block or never end
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ValueError("the file is empty")
            if size > max_bytes:
                raise ValueError(f"{size} bytes of JSON (at most {max_bytes})")
            return parse_json(file.read(max_bytes))


def parse_json(data: bytes) -> object:
    return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):  # two readers might take different ones
        raise ValueError("JSON with the same key twice")
    return table


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Row by row: neither the rows nor the file need fit in memory."""
    stream_atomic(path, lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in rows))


def read_jsonl(path: str | Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """The rows of a JSON-lines file, each with the `needed` keys; a ValueError names the bad line."""
    return list(stream_jsonl(path, needed))


def stream_jsonl(path: str | Path, needed: tuple[str, ...] = ()) -> Iterator[dict]:
    """read_jsonl for a file that does not fit in memory: row by row."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; run the stage that writes it first")
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_JSON + 1), b""), 1):
            if not line.strip():
                continue
            with one_line(f"{path}, line {number}"):
                if len(line) > MAX_JSON:
                    raise ValueError(f"a line of more than {MAX_JSON} bytes")
                row = parse_row(line)
                if not isinstance(row, dict) or not all(key in row for key in needed):
                    raise ValueError(f"needs the keys {', '.join(needed)}")
            yield row


def parse_row(line: bytes) -> object:
    """A line of a JSON-lines file. The mark that Windows puts before UTF-8 is no part of it."""
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    return DECODER.decode(text)


def _no_number(name: str):
    raise ValueError(f"{name} is no number in JSON")


# json.loads would make one for each line.
DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_number)


# ---- Errors of one line ------------------------------------------------------------------------------------

MAX_LINE = 300  # characters of a message


def show(found: object) -> str:
    """Something found in a file, made harmless: one line of ASCII, not long, and quick to make."""
    if isinstance(found, str):
        return ascii(found[:100]) + "..." * (len(found) > 100)
    if isinstance(found, list | tuple) and len(found) <= 16 and all(type(n) in (int, float) for n in found):
        return f"[{', '.join(map(show, found))}]"[:100]
    if found is None or type(found) in (bool, float):
        return str(found)
    if type(found) is int:
        return str(found) if abs(found) < 2**64 else f"a number of {found.bit_length()} bits"
    return f"<{type(found).__name__}>"


def harmless(message: str) -> str:
    """A message as one line of at most MAX_LINE characters, cut in its middle, that no terminal obeys."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    end = MAX_LINE // 2  # it has the advice
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - end - 5]} ... {line[-end:]}"


@contextmanager
def one_line(path: str | Path):
    """Whatever goes wrong with the content of `path` becomes a ValueError of one line that names it.

    Strangers wrote it: a parser can fail in more ways than can be listed, and all of them mean a bad file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        what = harmless(str(error))
        if type(error) is not ValueError:
            what = f"damaged or not what it claims ({type(error).__name__}: {what})"
        raise ValueError(f"{path}: {what}") from None
