"""Runs of train.py as real processes, on configs/ci.toml; the fixtures built from them are in conftest.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training.meters import COSTS

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def train(*arguments, launcher=(sys.executable,)):
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def stages(out: Path, *names: str, flags=()):
    """One after the other, in one process: most of the time of a stage this small is importing torch."""
    arguments = ["train.py", "configs/ci.toml", "--out", *map(str, [out, *flags]), "--stage"]
    script = f"import sys, train\nfor name in {names}:\n    sys.argv = [*{arguments}, name]\n    train.main()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]


def metrics(out: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / f"metrics/{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in COSTS} for line in lines]
