"""A signal that takes the machine back ends a run between two steps, saved, with exit code 0."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT

SCRIPT = """
import os, sys, time, torch, config, run
from pathlib import Path
from test_loop import batch_at, loss, new_model
from training.loop import Optimization, optimize
from training.shard import blocks

out, sharding, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def slowly(step):
    time.sleep(0.04)
    x, y = batch_at(step)[0]
    return [(x[run.rank() :: run.world_size()], y[run.rank() :: run.world_size()])]

@run.together()
def main():
    run.init_distributed(torch.device("cpu"))
    (out / f"pid{run.rank()}").write_text(str(os.getpid()))
    where = run.Run(out, out, 0, torch.device("cpu"), workers)
    section = Optimization(steps=100, batch_size=6, bf16=False, save_every=60, sharding=sharding)
    optimize(where, "name", out / "state", new_model(), loss, slowly, section)

config.command_line(main)
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals of a cluster")


def begin(out: Path, ranks: int = 1, sharding: str = "auto", workers: int = 0) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    (out / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks] if ranks > 1 else []
    command = [sys.executable, *torchrun, out / "script.py", out, sharding, workers]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def losses(out: Path) -> list[float]:
    lines = out / "metrics/name.jsonl"
    return [json.loads(line)["loss"] for line in lines.read_text().splitlines()] if lines.exists() else []


def wait_for(out: Path, steps: int):
    deadline = time.monotonic() + 60
    while len(losses(out)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[float]:
    out = tmp_path_factory.mktemp("whole")
    assert begin(out).wait() == 0
    return losses(out)


@pytest.mark.parametrize(
    "number, ranks, sharding, workers, to",
    [
        (signal.SIGTERM, 1, "auto", 2, "all"),
        (signal.SIGUSR1, 2, "fsdp", 1, "rank 1"),
        pytest.param(signal.SIGUSR1, 1, "auto", 0, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, "fsdp", 0, "torchrun", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, "ddp", 0, "all", marks=pytest.mark.slow),
    ],
)
def test_a_warning_ends_it_after_a_step_that_is_saved(
    undisturbed, tmp_path, number, ranks, sharding, workers, to
):
    process = begin(tmp_path, ranks, sharding, workers)
    wait_for(tmp_path, 10)
    if to == "all":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if to == "torchrun" else int((tmp_path / "pid1").read_text()), number)
    began = time.monotonic()
    _, complaint = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    done = losses(tmp_path)
    assert 10 <= len(done) < 100
    assert f"told to end; step {len(done)} is saved, the same command continues\n" in complaint, complaint
    if "torchrun" == to or ranks > 1 and to == "all":  # it tells of the signal itself, at length
        assert process.returncode != 0
    else:
        assert process.returncode == 0 and "Traceback" not in complaint and "error" not in complaint, (
            complaint
        )
        assert complaint.endswith("the same command continues\n")
    assert begin(tmp_path, ranks, sharding, workers).wait() == 0
    assert losses(tmp_path) == pytest.approx(undisturbed, abs=1e-5)
