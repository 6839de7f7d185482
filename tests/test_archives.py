"""data/archives.py: what is unpacked stays inside, has its size, and is never a link."""

import io
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import archives

WANTED = (".wav", ".txt")
GOOD = {"corpus/a.wav": b"RIFF" * 100, "corpus/b/TEXT.TXT": b"Hello."}
BAD = ["../x.wav", "/etc/x.wav", "a/../../x.wav", "C:\\x.wav", "..\\x.wav", "a\x1b[31m.wav"]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", **more) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def make(path, mode="w"):
    """An archive with GOOD, something that is not wanted, BAD names, and links."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**GOOD, "corpus/c.pdf": b"x", **dict.fromkeys(BAD, b"x")}.items():
                archive.writestr(name, data)
            link = zipfile.ZipInfo("corpus/link.wav")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
        return path
    with tarfile.open(path, mode) as tar:
        add(tar, "corpus", b"", type=tarfile.DIRTYPE)
        for name, data in {**GOOD, "corpus/c.pdf": b"x", **dict.fromkeys(BAD, b"x")}.items():
            add(tar, name, data)
        add(tar, "corpus/link.wav", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "corpus/hard.wav", b"", type=tarfile.LNKTYPE, linkname="corpus/a.wav")
        add(tar, "corpus/pipe.wav", b"", type=tarfile.FIFOTYPE)
    return path


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".unpacked.jsonl")
    }


@pytest.mark.parametrize("name, mode", [
    ("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.tar.xz", "w:xz"),
    ("a.zip", ""), ("gz in spite of its name.tar", "w:gz"),
])  # fmt: skip
def test_only_what_is_wanted_and_inside(tmp_path, name, mode):
    archive = make(tmp_path / name, mode)
    refused = archives.unpack(archive, tmp_path / "out", WANTED)
    assert files(tmp_path / "out") == GOOD
    assert not (tmp_path / "x.wav").exists()
    assert {row["audio"] for row in refused} >= set(BAD) | {"corpus/link.wav"}
    reasons = {row["audio"]: row["reason"] for row in refused}
    assert reasons["../x.wav"] == "refused: a path that climbs out"
    assert reasons["C:\\x.wav"] == "refused: an absolute path"
    assert reasons["corpus/link.wav"] == "refused: a link or special file"
    assert len(refused) == len(BAD) + (1 if mode == "" else 3)


def test_a_second_time_nothing_is_done_and_the_same_is_told(tmp_path):
    archive = make(tmp_path / "a.tar.gz", "w:gz")
    refused = archives.unpack(archive, tmp_path / "out", WANTED)
    (tmp_path / "out/corpus/a.wav").unlink()
    assert archives.unpack(archive, tmp_path / "out", WANTED) == refused
    assert not (tmp_path / "out/corpus/a.wav").exists()
    os.utime(archive, (1, 1))  # another archive
    assert archives.unpack(archive, tmp_path / "out", WANTED) == refused
    assert files(tmp_path / "out") == GOOD


@pytest.mark.parametrize(
    "name, mode",
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.tar.xz", "w:xz"), ("a.zip", "")],
)
def test_an_archive_cut_short_keeps_what_is_whole(tmp_path, name, mode):
    noise = {f"{n}.wav": os.urandom(30_000) for n in range(9)}
    path = tmp_path / name
    if mode:
        with tarfile.open(path, mode) as tar:
            for member, data in noise.items():
                add(tar, member, data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in noise.items():
                archive.writestr(member, data)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError) as error:
        archives.unpack(path, tmp_path / "out", WANTED)
    message = str(error.value)
    assert message.startswith(f"{path}: the archive is cut short or damaged") and "\n" not in message
    found = files(tmp_path / "out")
    assert found.items() <= noise.items() and (len(found) >= 1 or name in ("a.zip", "a.tar.bz2", "a.tar.xz"))
    path.write_bytes(whole)  # copied again: the same command completes it
    assert archives.unpack(path, tmp_path / "out", WANTED) == [] and files(tmp_path / "out") == noise


def test_damage_in_the_middle_is_told(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.wav", b"0123456789" * 1000)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0123456789", b"0123456788", 1))
    with pytest.raises(ValueError, match="cut short or damaged"):
        archives.unpack(path, tmp_path / "out", WANTED)
    assert files(tmp_path / "out") == {}


def test_sizes_are_looked_at_before_anything_is_written(tmp_path, monkeypatch):
    path = make(tmp_path / "a.tar")
    monkeypatch.setattr(archives, "MAX_FILE", 300)
    reasons = {row["audio"]: row["reason"] for row in archives.unpack(path, tmp_path / "out", WANTED)}
    assert reasons["corpus/a.wav"].startswith("refused: too large")
    monkeypatch.setattr(archives, "SPARE", 1 << 62)
    with pytest.raises(OSError, match="disk is full"):
        archives.unpack(path, tmp_path / "full", WANTED)


def test_a_header_that_asks_for_memory_is_refused(tmp_path):
    info = tarfile.TarInfo("a.wav")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(ValueError, match="tar header of 1099511627776 bytes"):
        archives.unpack(tmp_path / "a.tar", tmp_path / "out", WANTED)
    (tmp_path / "b.tar.gz").write_bytes(b"What is this?")
    (tmp_path / "c.zip").write_bytes(b"What is this?")
    for name in ("b.tar.gz", "c.zip"):
        with pytest.raises(ValueError, match="cut short or damaged"):
            archives.unpack(tmp_path / name, tmp_path / "out", WANTED)


def test_a_name_that_is_a_file_and_a_folder(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.wav")
        add(tar, "a.wav/b.wav")
        add(tar, "c.wav/d.wav")
        add(tar, "c.wav")
    refused = archives.unpack(tmp_path / "a.tar", tmp_path / "out", WANTED)
    assert [row["audio"] for row in refused] == ["a.wav/b.wav", "c.wav"]
    assert sorted(files(tmp_path / "out")) == ["a.wav", "c.wav/d.wav"]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_one_line(data):
    """Bytes changed or lost anywhere: what is unpacked stays inside, or ValueError or OSError says so."""
    with tempfile.TemporaryDirectory() as folder:
        name, mode = data.draw(st.sampled_from([("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.zip", "")]))
        archive = make(Path(folder, "in", name), mode)
        content = bytearray(archive.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(content) - 1))
            length = data.draw(st.sampled_from([0, 1, 2, 8, 4096]))
            content[place : place + length] = data.draw(st.binary(max_size=8))
            content = content or bytearray(b"\0")
        archive.write_bytes(content)
        try:
            archives.unpack(archive, Path(folder, "out"), WANTED)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
        inside = {path.name for path in Path(folder).iterdir()}
        assert inside <= {"in", "out"} and not any(path.is_symlink() for path in Path(folder).rglob("*"))
