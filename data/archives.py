"""Archives that others made, unpacked as a stream: tar (also .gz, .bz2, .xz) and zip.

Only regular files whose ending is wanted are unpacked, under names that stay inside the folder. Links,
devices, absolute names and names that climb out ("../../x") are refused, and listed. A file is written whole
or not at all, and only if the disk has room for the size that the archive promises. A killed run continues:
files that are there in their full size are not written again.

References: tar, https://www.gnu.org/software/tar/manual/html_node/Standard.html; zip, APPNOTE.TXT of PKWARE.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from files import one_line, read_jsonl, show, stream_atomic, write_jsonl

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MAX_FILE = 16 << 30  # bytes of one unpacked file
MAX_HEADER = 1 << 20  # bytes of a long name or of others in a tar header, which tarfile holds in memory
MAX_REFUSED = 100_000
CUT_SHORT = "the archive is cut short or damaged: copy it again; what is unpacked is kept"
DAMAGE = (EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
SPARE = 1 << 28  # bytes of the disk that are left free
WINDOWS = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(ENDINGS)


class Member(NamedTuple):
    name: str
    size: int
    problem: str  # why it is refused; "" if it is a regular file
    open: Callable[[], BinaryIO]


def unpack(archive: Path, out: Path, wanted: tuple[str, ...]) -> list[dict]:
    """Unpacks the files that end in one of `wanted` (lower case) to folder `out`; returns what was refused,
    as {"audio": name, "reason": ...}. Nothing is done twice. ValueError or OSError, one line each."""
    done = out / f".{archive.name}.unpacked.jsonl"
    found = archive.stat()
    mark = {"size": found.st_size, "modified": found.st_mtime_ns, "wanted": list(wanted)}
    if done.is_file():
        first, *refused = read_jsonl(done)
        if first == mark:
            return refused
    out.mkdir(parents=True, exist_ok=True)
    refused = []
    bar = tqdm(
        total=found.st_size,
        desc=f"unpacking {archive.name}",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar, one_line(archive), _members(archive, bar) as members:
        for member in members:
            name = member.name.replace("\\", "/")
            if not name.lower().endswith(wanted):
                continue
            if problem := member.problem or name_problem(name) or _write(member, out, name):
                refused.append({"audio": member.name, "reason": f"refused: {problem}"})
                if len(refused) > MAX_REFUSED:
                    raise ValueError("hardly an archive of recordings: too many members are refused")
    write_jsonl(done, [mark, *refused])
    return refused


def name_problem(name: str) -> str:
    """What is wrong with the name of a file that is to be written inside a folder; "" if nothing is."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.startswith("/") or re.match("[A-Za-z]:", name):
        return "an absolute path"
    if ".." in parts:
        return "a path that climbs out"
    if has_harmful(name):
        return "a name with control characters"
    if any(len(part.encode()) > 240 for part in parts):
        return "a name too long"
    if os.name == "nt":
        for part in parts:
            if re.search(r'[<>:"|?*]|[. ]$', part) or part.split(".")[0].lower() in WINDOWS:
                return "a name that Windows does not allow"
    return ""


def has_harmful(text: str) -> bool:
    """Has it control characters, separators of lines, or bytes and halves of characters that are no text?"""
    return not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def _write(member: Member, out: Path, name: str) -> str:
    """Writes one file; returns why it cannot be."""
    if member.size > MAX_FILE:
        return f"too large ({member.size >> 30} GB)"
    path = out.joinpath(*[part for part in name.split("/") if part not in ("", ".")])
    if path.is_file() and path.stat().st_size == member.size:
        return ""
    free = shutil.disk_usage(out).free
    if member.size + SPARE > free:
        raise OSError(f"{out}: the disk is full; make room, then the same command continues")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return "a folder that is a file, too"
    if path.is_dir():
        return "a file that is a folder, too"
    with member.open() as source:
        stream_atomic(path, lambda file: _copy(source, file), sync=False)
    if path.stat().st_size != member.size:
        path.unlink()
        raise ValueError(f"{CUT_SHORT} (at {show(name)})")
    return ""


def _copy(source: BinaryIO, file: BinaryIO) -> None:
    while True:
        try:
            block = source.read(1 << 20)
        except DAMAGE as error:
            raise ValueError(f"{CUT_SHORT} ({error})") from None
        if not block:
            return
        file.write(block)


@contextmanager
def _members(archive: Path, bar: tqdm) -> Iterator[Iterator[Member]]:
    with open(archive, "rb") as file:
        if archive.name.lower().endswith(".zip"):
            yield _zip_members(file, bar)
        else:
            yield _tar_members(file, bar)


class _TarInfo(tarfile.TarInfo):
    """Refuses headers that would ask for much memory, before tarfile reads them."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.type not in tarfile.REGULAR_TYPES and info.size > MAX_HEADER:
            raise ValueError(f"a tar header of {info.size} bytes: damaged")
        return info


def _tar_members(file: BinaryIO, bar: tqdm) -> Iterator[Member]:
    magic = file.read(6)
    file.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        stream = gzip.GzipFile(fileobj=file)
    elif magic.startswith(b"BZh"):
        stream = bz2.BZ2File(file)
    elif magic == b"\xfd7zXZ\x00":
        stream = lzma.LZMAFile(file)
    else:
        stream = file
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarInfo) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # which would hold every header of the archive
                bar.update(file.tell() - bar.n)
                problem = "" if info.isreg() and not info.issparse() else "a link or special file"
                if not info.isdir():
                    yield Member(info.name, info.size, problem, lambda info=info: tar.extractfile(info))
    except DAMAGE as error:
        raise ValueError(f"{CUT_SHORT} ({error})") from None


def _zip_members(file: BinaryIO, bar: tqdm) -> Iterator[Member]:
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGE as error:
        raise ValueError(f"{CUT_SHORT} ({error})") from None
    with archive:
        for info in archive.infolist():
            problem = ""
            if stat.S_ISLNK(info.external_attr >> 16):
                problem = "a link or special file"
            elif info.flag_bits & 1:
                problem = "encrypted"
            if not info.is_dir():
                yield Member(info.filename, info.file_size, problem, lambda info=info: archive.open(info))
            bar.update(info.compress_size)
