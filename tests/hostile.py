"""Hostile files: a table of cases, and the checks that each must pass. For the tests of files that are read.

A case writes one file and returns its path. Reading it must end in one line of ValueError, with nothing
executed and little memory used; both are watched here.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from checkpoint import read_tensors

ROOT = Path(__file__).parent.parent
WATCHED = {
    "os.system",
    "exec",
    "compile",
    "pickle.find_class",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "ctypes.dlopen",
}
SEEN: list[str] = []
sys.addaudithook(lambda event, args: SEEN.append(event) if event in WATCHED else None)


class Cases(dict):
    """Name -> function(folder) -> path of the hostile file."""

    def one(self, case):
        self[case.__name__] = case
        return case

    def family(self, **values):
        """Cases that differ in one value: the decorated function gets (folder, value)."""

        def add(write):
            for name, value in values.items():
                self[f"{write.__name__}_{name}"] = lambda folder, value=value: write(folder, value)

        return add


def refused_in_one_line(folder: Path, monkeypatch, case) -> None:
    monkeypatch.chdir(folder)
    path = case(folder)
    SEEN.clear()
    with pytest.raises(ValueError) as e:
        read_tensors(path)
    seen = list(SEEN)
    message = str(e.value)
    assert message.startswith(str(path)) and ": " in message, message
    assert message.isprintable() and len(message) < len(str(path)) + 500, message
    assert not (folder / "executed").exists() and not seen


def refused_with_little_memory(folder: Path, cases: Cases) -> None:
    """All cases in one process that may allocate 1 GB: each is refused, and none with a MemoryError."""
    paths = {}
    for name, case in cases.items():
        (folder / name).mkdir()
        paths[name] = str(case(folder / name))
    sparse = {"a_sparse_terabyte", "index_of_absurd_size"}  # their map alone is 1 TB
    output = run_python(
        """
        import json, re, resource, sys
        from checkpoint import read_tensors
        status = open("/proc/self/status").read()
        used = int(re.search(r"VmSize:\\s+(\\d+)", status)[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
        for name, path in json.load(sys.stdin).items():
            try:
                read_tensors(path)
                print("accepted", name)
            except ValueError as e:
                if "MemoryError" in str(e) or not str(e).isprintable() or not str(e).startswith(path):
                    print("badly refused", name, ascii(str(e)))
        """,
        json.dumps({name: path for name, path in paths.items() if name not in sparse}),
    )
    assert output == ""


def run_python(code: str, stdin: str = "") -> str:
    """The output of a Python program that may import checkpoint."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def raw(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert raw(a[name]) == raw(b[name]), name


def read_or_refuse(path: Path, data: bytes) -> dict | None:
    """Reads `data` as a file: tensors no larger than it, whose every byte can be read, or None if refused."""
    path.write_bytes(data)
    try:
        tensors = read_tensors(path)
    except (ValueError, OSError) as e:
        assert str(path.parent) in str(e) and str(e).isprintable(), e
        return None
    for name, t in tensors.items():
        assert type(name) is str and t.nbytes <= max(len(data), 1000)
        raw(t)
    return {name: t.clone() for name, t in tensors.items()}  # the file is about to be overwritten in place
