"""files.py: a file is written whole or not at all; JSON and JSON lines are read as written."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from files import (
    fingerprint,
    harmless,
    locked,
    read_json,
    read_jsonl,
    show,
    stream_atomic,
    write_atomic,
    write_json,
    write_jsonl,
)

ROOT = Path(__file__).parent.parent

# ---- Writing -----------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


WRITERS = {
    "write_atomic": lambda path: write_atomic(path, b"new" * 100),
    "stream_atomic": lambda path: stream_atomic(path, lambda file: file.write(b"new" * 100)),
    "write_json": lambda path: write_json(path, {"new": 1}),
    "write_jsonl": lambda path: write_jsonl(path, [{"new": 1}]),
}


def fails_and_leaves_the_old_file(
    folder: Path, monkeypatch, writer, fails: str, error: BaseException
) -> None:
    """`writer(path)` while os.fsync or os.replace raises `error`, and once more when it does not."""

    def fail(*args):
        raise error

    path = folder / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        with pytest.raises(type(error)) as e:
            writer(path)
    if isinstance(error, OSError):
        assert str(path) in str(e.value) and "No space left" in str(e.value) and "\n" not in str(e.value)
    assert path.read_text() == "old" and leftovers(folder) == ["file"]
    writer(path)
    assert path.read_bytes() != b"old" and leftovers(folder) == ["file"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, writer, fails, error):
    fails_and_leaves_the_old_file(tmp_path, monkeypatch, WRITERS[writer], fails, error)


def test_without_sync_nothing_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", None)  # to call it would be a TypeError
    write_atomic(tmp_path / "file", b"new", sync=False)
    assert (tmp_path / "file").read_bytes() == b"new" and leftovers(tmp_path) == ["file"]


def fork(function) -> int:
    """Starts function() in a child process that shares nothing with this one; returns its id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(
            1
        )  # the other threads of torch did not come along: waiting for them would be for ever
        try:
            function()
        finally:
            os._exit(0)
    return child


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.mark.parametrize("path", ["missing/file", "folder"])
def test_a_path_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as e:
        write_atomic(tmp_path / path, b"x")
    assert str(tmp_path / path) in str(e.value) and leftovers(tmp_path) == ["folder"]


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@needs_fork
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """A process rewrites a file without pause and is killed at moments that nobody chose."""
    path = tmp_path / "file"
    write_atomic(path, b"0" * 1_000_000)

    def rewrite():
        for i in itertools.count():
            write_atomic(path, bytes([i % 256]) * 1_000_000)

    for round in range(20):
        child = fork(rewrite)
        time.sleep(0.01 + 0.0037 * round)
        kill(child)
        data = path.read_bytes()
        assert len(data) == 1_000_000 and len(set(data)) == 1


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="another process"):

        def first(file):
            file.write(b"first")
            write_atomic(path, b"second")

        stream_atomic(path, first)
    assert path.read_bytes() == b"second" and leftovers(tmp_path) == ["file"]


# ---- JSON --------------------------------------------------------------------------------------------------


def test_json_round_trip(tmp_path):
    obj = {"a": [1, 2.5, None, "ü"], "b": {"c": False}}
    write_json(tmp_path / "a.json", obj)
    assert read_json(tmp_path / "a.json") == obj
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "empty"),
        (b"{", "damaged"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[" * 100_000, "damaged"),
        (b"\xff", "damaged"),
        (b"[1, 2, 3, 4, 5]", "15 bytes of JSON (at most 14)"),
    ],
)
def test_bad_json_is_one_line(tmp_path, content, named):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as e:
        read_json(path, max_bytes=14 if b"5" in content else 1 << 20)
    message = str(e.value)
    assert (
        message.startswith(f"{path}: ") and named in message and message.isprintable() and len(message) < 500
    )


def test_a_pipe_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in folders")
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


def test_json_lines_come_back_as_written(tmp_path):
    rows = [{"id": "a", "text": "ü\u2028\n"}, {"id": "b", "units": [1, 2], "none": None}]
    write_jsonl(tmp_path / "a.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "a.jsonl", ("id",)) == rows
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == 2
    write_jsonl(tmp_path / "a.jsonl", [])
    assert read_jsonl(tmp_path / "a.jsonl") == []


def test_only_the_end_of_a_line_ends_a_row(tmp_path):
    """U+2028 and U+0085 may be in a string as they are; lines may be empty, or end as on Windows."""
    (tmp_path / "a.jsonl").write_bytes('{"a": "x\u2028y\u0085z"}\r\n\n{"a": 1}'.encode())
    assert read_jsonl(tmp_path / "a.jsonl") == [{"a": "x\u2028y\u0085z"}, {"a": 1}]


@pytest.mark.parametrize(
    "line, named",
    [
        (b'{"id": 1}', "needs the keys id, text"),
        (b"[1]", "needs the keys"),
        (b"id: 1", "Expecting value"),
        (b'{"id": "a", "te', "Unterminated"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, named):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1, "text": ""}\n' + line + b"\n")
    with pytest.raises(ValueError) as e:
        read_jsonl(path, ("id", "text"))
    message = str(e.value)
    assert message.startswith(f"{path}, line 2: ") and named in message and message.isprintable()
    assert len(message) < len(str(path)) + 400


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not UTF-8; save the file as UTF-8"):
        read_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match="run the stage that writes it first"):
        read_jsonl(tmp_path / "b.jsonl")


# ---- What is found in files, and who may read it -----------------------------------------------------------


@pytest.mark.parametrize(
    "found, shown",
    [
        ("a\x1b[2J\né", r"'a\x1b[2J\n\xe9'"),
        ("x" * 101, "'" + "x" * 100 + "'..."),
        ((1, 2.5), "[1, 2.5]"),
        ([1] * 17, "<list>"),
        (["a"], "<list>"),
        (7, "7"),
        (True, "True"),
        (None, "None"),
        (float("nan"), "nan"),
        (2**70, "a number of 71 bits"),
        ({}, "<dict>"),
    ],
)
def test_what_is_found_is_shown_in_one_short_line(found, shown):
    assert show(found) == shown


def test_a_message_is_one_line_that_no_terminal_obeys():
    long = harmless("what is wrong " + "x" * 1000 + "; what to do")
    assert len(long) == 300 and long.startswith("what is wrong ") and long.endswith("; what to do")
    bad = "a\nb\x1b[2Jc\u2028d\u202ee\x07\udc80"
    assert harmless(bad) == r"a b\x1b[2Jc d\u202ee\x07\udc80"
    assert harmless("Grüße, 漢字") == "Grüße, 漢字"


# ---- Fingerprints, and one run to a folder -----------------------------------------------------------------


def test_a_fingerprint_is_of_contents_and_their_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    before = fingerprint(a, b)
    assert before == fingerprint(str(a), b) and len(before) == 32
    assert (
        before != fingerprint(b, a) and before != fingerprint(a) and before != fingerprint(a, tmp_path / "c")
    )
    b.write_text("")
    assert fingerprint(a, b) != fingerprint(a, tmp_path / "c")  # a missing file is not an empty one
    b.write_text("2")
    assert fingerprint(a, b) == before
    with pytest.raises(IsADirectoryError):
        fingerprint(tmp_path)


HOLD = """
import sys, files
with files.locked(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.read(1)
"""


def hold(folder: Path) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True, **pipes)


@pytest.mark.parametrize("ends", ["by itself", "killed"])
def test_one_run_to_a_folder_until_it_ends_however_it_ends(tmp_path, ends):
    first = hold(tmp_path / "out")
    assert first.stdout.readline() == "inside\n"
    with pytest.raises(OSError, match=f"another run is at work here .process {first.pid} on ") as e:
        with locked(tmp_path / "out"):
            raise AssertionError("two at once")
    assert "\n" not in str(e.value) and str(tmp_path / "out") in str(e.value)
    with locked(tmp_path / "another"):
        pass
    if ends == "killed":
        first.kill()
    first.communicate("x")
    with locked(tmp_path / "out"), pytest.raises(ZeroDivisionError):
        with locked(tmp_path / "another"):
            raise ZeroDivisionError
    second = hold(tmp_path / "another")
    assert second.stdout.readline() == "inside\n"
    second.communicate("x")


@pytest.mark.parametrize("module", ["files", "data.audio", "data.tiny.prepare", "data.released.prepare"])
def test_torch_is_not_needed_for_files_and_sound(module):
    """The processes that make a corpus start faster without it."""
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
