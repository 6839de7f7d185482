"""Kills, stops, full disks and flipped bits, at random, over runs of configs/ci.toml: is the result the same?

    python tests/torture.py --minutes 10 --seed 0     Linux; exit code 1 if anything was wrong

First one run that nothing disturbs. Then one after another, each in a fresh folder, started again until it is
finished and disturbed most of these times, at a random instant (in the first seconds more often):

    kill, term, int    SIGKILL, SIGTERM, SIGINT, to all of its processes or to one of them
    stop               all of its processes stand still for a while (SIGSTOP, SIGCONT)
    disk               its files may not grow any more: RLIMIT_FSIZE of all of its processes, which needs no
                       privileges and fails a write half-way as a full disk does (EFBIG instead of ENOSPC)
    flip               between two of these times, one bit of a state or of a weight file is another one

What was finished must equal the undisturbed run in every tensor, metric and number of the report
(tests/compare_with.py). After each end nothing may be left: no process, no temporary file, no traceback, no
line of more than 300 characters; an error is the last line. SIGTERM between two steps of training saves and
ends it with code 0. A flipped bit must be noticed, or do no harm.

The same seed draws the same plans; the instants depend on the machine. --first N begins with run N of a seed.
Folders of runs with a fault are kept.
"""

import argparse
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from compare_with import differences, results  # noqa: E402

import checkpoint  # noqa: E402
import config  # noqa: E402

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
KINDS = ("kill", "term", "int", "kill one", "term one", "int one", "stop", "disk")
CODES = {"kill": {-9}, "term": {-15, 143}, "int": {130}, "stop": set(), "disk": {1}, "": set()}  # besides 0
STOPPED = config.STOPPED.partition("{")[0]  # with code 0: SIGTERM between two steps
ONE = {1, 130, 143, -9, -15, -2}  # where one of several processes was hit
SHOWN = ("  prompt ", "  answer ", "  expected ")  # samples: as long as the model makes them
PATIENCE = 20  # seconds until a run that was ended is gone


@dataclass
class Start:
    """One start of train.py, from its beginning to its end."""

    process: subprocess.Popen
    mark: str  # in the environment of all of its processes
    output: list[bytes] = field(default_factory=list)  # stdout, stderr
    disturbed: str = ""

    def processes(self) -> list[int]:
        """All that it has started and that still runs, zombies left out."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has just ended, or is another user's
                continue
        return found

    def send(self, number: int, one: random.Random | None = None):
        pids = self.processes()
        for pid in [one.choice(pids)] if one and pids else pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def start(out: Path, flags: list[str], scratch: Path) -> Start:
    mark = f"TORTURE={time.time_ns()}"
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONFAULTHANDLER": "1", "TORTURE": mark[8:]}
    environment["OMP_NUM_THREADS"] = "2"  # with one, no stage runs in a second process
    command = [sys.executable, "train.py", "configs/ci.toml", "--out", str(out), *flags]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    begun = Start(process, mark)
    threading.Thread(target=lambda: begun.output.extend(process.communicate()), daemon=True).start()
    return begun


def disturb(run: Start, kind: str, rng: random.Random, after: float):
    """Waits until the instant has come, unless the run ends before it, and disturbs it."""
    try:
        run.process.wait(after)
        return
    except subprocess.TimeoutExpired:
        run.disturbed = kind
    if kind == "stop":
        run.send(signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 3))
        run.send(signal.SIGCONT)
    elif kind == "disk":
        most = rng.choice([0, 100, 10_000, 100_000])  # bytes of a file
        for pid in run.processes():
            try:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            except (ProcessLookupError, PermissionError):
                continue
    else:
        name, _, one = kind.partition(" ")
        if name == "int" and not one:
            os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
        else:
            run.send(SIGNALS[name], rng if one else None)


@dataclass
class Flip:
    """One bit of one file, changed."""

    path: Path
    before: bytes
    after: bytes
    noticed: bool = False

    def undo(self):
        self.path.write_bytes(self.before)

    def is_there(self) -> bool:
        return self.path.exists() and self.path.read_bytes() == self.after

    def is_read(self) -> bool:
        """Whether its reader takes it for what it is not, now; it is mended after that."""
        try:
            found = tensors_in(self.path)
        except (ValueError, OSError, zipfile.BadZipFile, KeyError):
            return False
        finally:
            self.undo()
        return not same(found, tensors_in(self.path))


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return {name: torch.from_numpy(stored[name]) for name in stored.files}
    return {name: tensor.clone() for name, tensor in checkpoint.read_tensors(path).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and raw(found[name]) == raw(tensor)
        for name, tensor in expected.items()
    )


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def flip(out: Path, rng: random.Random) -> Flip | None:
    """Changes one bit of a random weight or state file; of the header as often as of the numbers."""
    files = sorted([*out.rglob("*.safetensors"), *out.rglob("*.npz")])
    if not files:
        return None
    path = rng.choice(files)
    before = path.read_bytes()
    place = rng.randrange(min(len(before), 2000) if rng.random() < 0.3 else len(before))
    after = bytearray(before)
    after[place] ^= 1 << rng.randrange(8)
    path.write_bytes(after)
    return Flip(path, before, bytes(after))


class Torture:
    """All runs, and what was found."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.seconds = math.nan  # of a run that nothing disturbs
        self.expected: dict = {}
        self.names: set[str] = set()
        self.caches: set[str] = set()

    def fault(self, kind: str, what: str):
        self.counts[kind] += 1
        self.faults.append(f"{kind}: {what}")
        print(f"  FAULT {self.faults[-1]}", flush=True)

    def reference(self):
        base = self.folder / "undisturbed"
        if not (base / "ci/state/evaluate/done.json").exists():
            (base / "tmp").mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            run = start(base / "ci", [], base / "tmp")
            self.end(run, 3600, base / "ci", "the undisturbed run")
            if run.process.returncode:
                sys.exit(f"the undisturbed run failed:\n{b''.join(run.output).decode()[-3000:]}")
            (base / "seconds").write_text(str(time.perf_counter() - began))
        self.seconds = float((base / "seconds").read_text())
        self.expected = results(base)
        self.names = names_in(base / "ci")
        self.caches = set(os.listdir(base / "tmp"))  # of torch, which stay
        print(f"undisturbed: {self.seconds:.0f} s, {len(self.expected)} files compared", flush=True)

    def end(self, run: Start, patience: float, out: Path, who: str) -> str:
        """Waits for the end of a run, looks at what it leaves, and returns all that it has printed."""
        try:
            run.process.wait(patience)
        except subprocess.TimeoutExpired:
            run.send(signal.SIGABRT)  # PYTHONFAULTHANDLER: each shows where it was
            time.sleep(2)
            self.fault("hang", f"{who} did not end within {patience:.0f} s")
        deadline = time.monotonic() + PATIENCE
        while (left := run.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:200] for pid in left]
            self.fault("process left over", f"{who}: {lines}")
            run.send(signal.SIGKILL)
        run.process.wait()
        for _ in range(50):  # the reader of its pipes
            if run.output:
                break
            time.sleep(0.1)
        text = b"\n".join(run.output).decode(errors="replace")
        for log in sorted(out.glob("state/*/log.txt")):
            text += f"\n{log.read_text(errors='replace')}"
        self.look_at(text, run, who)
        return text

    def look_at(self, text: str, run: Start, who: str):
        """Tracebacks, long lines, and where an error stands."""
        if "Traceback (most recent call last)" in text or "Fatal Python error" in text:
            place = re.search(r"Traceback \(most|Fatal Python", text).start()
            self.fault("traceback", f"{who}: {text[place:][:3000]}")
        for line in re.split(r"[\r\n]", text):
            if len(line) > 300 and not line.startswith(SHOWN):
                self.fault("long line", f"{who}: {len(line)} characters: {line[:300]}")
                break
        errors = run.output[1].decode(errors="replace").rstrip().split("\n") if run.output else [""]
        if run.process.returncode == 1 and not errors[-1].startswith("error: "):
            self.fault("no last line", f"{who}: the last line is {errors[-1][-200:]!r}")
        kind = run.disturbed or "undisturbed"
        self.codes[f"{kind}: {run.process.returncode}"] += 1

    def run(self, number: int):
        """One run: disturbed, resumed, finished, compared."""
        rng = random.Random(f"{self.seed} {number}")
        base = self.folder / f"run-{number}"
        shutil.rmtree(base, ignore_errors=True)
        out, scratch = base / "ci", base / "tmp"
        scratch.mkdir(parents=True)
        flags = rng.choice([[], [], ["--workers", "1"]])
        disturbances = rng.randint(1, 6)
        flipped: Flip | None = None
        before = len(self.faults)
        killed = False
        for n in range(1, 30):
            kind = rng.choice(KINDS) if n <= disturbances else ""
            after = rng.uniform(0, 4) if rng.random() < 0.3 else rng.uniform(0, self.seconds)
            who = f"run {number}, start {n} ({f'{kind} after {after:.1f} s' if kind else 'undisturbed'})"
            run = start(out, flags, scratch)
            if kind:
                disturb(run, kind, rng, after)
            ended_at_once = run.disturbed in ("kill", "term", "int")
            text = self.end(run, PATIENCE if ended_at_once else 60 + 10 * self.seconds, out, who)
            code = run.process.returncode
            self.counts["starts"] += 1
            self.counts[run.disturbed or "not disturbed"] += 1
            killed |= "kill" in run.disturbed

            if flipped and not flipped.noticed and run.disturbed != "disk":
                flipped.noticed = str(flipped.path.relative_to(out.parent)) in text
                if flipped.noticed and code == 1 and flipped.is_there():
                    flipped.undo()  # as from a copy
                    continue
            allowed = ONE if run.disturbed.endswith(" one") else CODES[run.disturbed]
            if code and code not in allowed:
                last = text.strip().splitlines()[-1:]
                self.fault("wrong end", f"{who}: exit code {code}: {last}")
                if not run.disturbed:  # nothing will finish it
                    self.counts["runs"] += 1
                    return
            if code == 0 and STOPPED not in b"".join(run.output).decode(errors="replace"):
                break
            if flipped is None and rng.random() < 0.9:
                flipped = flip(out, rng)

        self.compare(base, number, flipped, killed)
        self.counts["runs"] += 1
        if len(self.faults) == before:
            shutil.rmtree(base)

    def compare(self, base: Path, number: int, flipped: Flip | None, killed: bool):
        """Everything that a finished run has made, with the undisturbed run."""
        wrong = False
        if flipped and flipped.is_there():
            flipped.noticed |= not (wrong := flipped.is_read())
        lines = differences(self.expected, results(base))
        if flipped:
            what = f"run {number}, {flipped.path.relative_to(base)}"
            if flipped.noticed:
                self.counts["flips noticed"] += 1
            elif wrong or lines:
                self.fault(
                    "flips wrong without a word", f"{what}: {'it is read' if wrong else 'other results'}"
                )
            else:
                self.counts["flips harmless"] += 1
        if lines:
            self.fault("different", f"run {number}: {len(lines)} files: {'; '.join(lines[:3])}")
        else:
            self.counts["equal"] += 1
        if extra := sorted(names_in(base / "ci") - self.names):
            self.fault("file left over", f"run {number}: {', '.join(extra[:5])}")
        if left := sorted(set(os.listdir(base / "tmp")) - self.caches):
            if not killed:
                self.fault("file left over", f"run {number}: in TMPDIR: {', '.join(left[:5])}")
            self.counts["left in TMPDIR by SIGKILL"] += killed


def names_in(out: Path) -> set[str]:
    paths = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    return {path for path in paths if not path.endswith("log.txt")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--folder", type=Path, help="where the runs are (default: a new temporary folder)")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and inherited
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    torture = Torture(folder.resolve(), options.seed)
    print(f"runs in {folder}", flush=True)
    torture.reference()
    until = time.monotonic() + 60 * options.minutes
    number = options.first
    while time.monotonic() < until:
        torture.run(number)
        number += 1
        print(f"run {number}: {dict(torture.counts)}", flush=True)
    print("\ncounts")
    for name, count in sorted(torture.counts.items()):
        print(f"  {name:30} {count}")
    print("exit codes")
    for name, count in sorted(torture.codes.items()):
        print(f"  {name:30} {count}")
    print(f"faults: {len(torture.faults)}")
    for line in torture.faults:
        print(f"  {line}")
    sys.exit(bool(torture.faults))


if __name__ == "__main__":
    main()
