"""kill -9 of one process or all, in a step or a save: nothing is lost but the steps since the last save."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import config
import run
from training import states
from training.loop import Optimization, optimize

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as starting.starting does
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill -9, /proc")
SAVE_EVERY = 2
STEPS = 10_000  # more than any of the runs comes to


def slowly(step: int, out: Path) -> list:
    """This rank's rows of a batch; which they are is written down."""
    from test_loop import batch_at

    time.sleep(0.01)
    x, y = batch_at(step)[0]
    rows = list(range(run.rank(), len(x), run.world_size()))
    with (out / "order.jsonl").open("a") as file:
        file.writelines(json.dumps([step, row, y[row].item()]) + "\n" for row in rows)
    return [(x[rows], y[rows])]


def kill(out: Path, who: str, ranks: int):
    """SIGKILL to this process, or to all of them."""
    for other in range(ranks) if who == "all" else ():
        if other != run.rank():
            os.kill(int((out / f"pid{other}").read_text()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def prepare_death(out: Path, ranks: int, plan: dict):
    """In a save: at one of the first file operations of the next ones. In a step: a moment from now."""
    left = [plan["after"]]

    def watch(event: str, arguments: tuple):
        of_files = event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if of_files and str(out / "state") in " ".join(map(str, arguments)):
            left[0] -= 1
            if left[0] == 0:
                kill(out, plan["who"], ranks)

    if plan["when"] == "full disk":  # no file of this process may grow beyond that
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["after"], resource.RLIM_INFINITY))
        return
    if plan["when"] == "save":
        sys.addaudithook(watch)
        return
    threading.Thread(target=lambda: (time.sleep(plan["after"] / 100), kill(out, plan["who"], ranks))).start()


def one_of(rank: int, ranks: int, port: int, out: Path, plan: dict):
    """Trains until it is killed as `plan` says, or for plan["steps"] steps more."""
    from test_loop import loss, new_model

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(out / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stderr = os.fdopen(2, "w")
    run.BEAT, run.PATIENCE = 0.2, 15
    (out / f"pid{rank}").write_text(str(os.getpid()))

    def batch_at(step: int) -> list:
        if step == first[0] + plan["steps"]:
            raise KeyboardInterrupt
        if step == first[0] + 1 and rank == plan.get("rank"):
            prepare_death(out, ranks, plan)
        return slowly(step, out)

    first = [0]

    @run.together()
    def main():
        run.init_distributed(torch.device("cpu"))
        where = run.Run(out, out, 0, torch.device("cpu"))
        first[0] = states.meta(out / "state").get("step", 0)
        settings = dict(steps=STEPS, batch_size=6, warmup=0, bf16=False, save_every=SAVE_EVERY)
        section = Optimization(**settings, sharding=plan["sharding"], muon=plan.get("muon", False))
        optimize(where, "name", out / "state", new_model(), loss, batch_at, section)

    config.command_line(main)


def start(out: Path, ranks: int, plan: dict) -> tuple[list[int], float, str]:
    """(exit codes, seconds from the first death to the last end, what was said on stderr) of one start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.loop", "test_loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_of, args=(i, ranks, port, out, plan)) for i in range(ranks)]
    for process in processes:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in processes], 120)
    began = time.monotonic()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    said = "".join((out / f"err{i}").read_text() for i in range(ranks))
    return [process.exitcode for process in processes], time.monotonic() - began, said


def told(said: str) -> list[str]:
    """The lines of stderr, without the progress bar."""
    lines = re.sub(r"name: .*?(\]|$)", "", said, flags=re.M).split("\n")
    return [line for line in lines if line.strip()]


def losses(out: Path) -> dict[int, float]:
    """By step; of a line that was being written when all were killed, nothing."""
    found = {}
    for line in (out / "metrics/name.jsonl").read_text().split("\n")[:-1]:
        line = json.loads(line)
        found[line["step"]] = line["loss"]
    return found


def endure(out: Path, kills: int, ranks: int, rng: random.Random) -> dict[str, list[float]]:
    """One run of many starts, each killed in its own way: {way: seconds until all had ended}."""
    ways = [f"{who} in a {when}" for who in ("one", "all") for when in ("step", "save")] * kills
    rng.shuffle(ways)
    lasted: dict[str, list[float]] = {}
    saved = 0
    for way in ways:
        who, _, _, when = way.split()
        plan = {"who": who, "when": when, "rank": rng.randrange(ranks), "steps": 40}
        plan |= {"after": rng.randint(1, 30), "sharding": rng.choice(["fsdp", "fsdp", "ddp"])}
        if when == "save" and plan["sharding"] == "ddp":
            plan |= {"rank": 0, "after": rng.randint(1, 8)}  # who writes the one file
        codes, seconds, said = start(out, ranks, plan)
        place = f"{way}, {plan}: {codes}, {said!r}"
        assert codes[plan["rank"]] == -9, place
        assert set(codes) == {-9} if who == "all" else sorted(codes) == [-9] + [1] * (ranks - 1), place
        assert seconds < 60, place
        lines = told(said)
        assert len(lines) == (who == "one") and all("lost the connection" in line for line in lines), place
        lasted.setdefault(way, []).append(seconds)
        done = max(losses(out)) + 1
        before, saved = saved, states.meta(out / "state").get("step", 0)
        assert saved >= before and saved >= done - 2 * SAVE_EVERY, f"{place}: {done} steps, {saved} saved"
    return lasted


@pytest.mark.parametrize("kills, ranks", [(1, 2), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_learns_what_an_undisturbed_one_does(tmp_path, kills, ranks):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    out.mkdir(), whole.mkdir()
    for way, seconds in endure(out, kills, ranks, random.Random(kills)).items():
        print(f"{way}: {len(seconds)} kills, all ended after at most {max(seconds):.1f} s")
    start(out, ranks, {"steps": 5, "sharding": "fsdp"})
    found = losses(out)
    start(whole, 1, {"steps": max(found) + 1, "sharding": "auto"})
    expected = losses(whole)
    assert [*found] == [*range(len(found))] == [*expected]  # each step once
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5


@pytest.mark.parametrize("muon", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_four_two_one_and_four_processes_go_on_with_the_same_samples(tmp_path, muon):
    out, whole = tmp_path / "run", tmp_path / "whole"
    out.mkdir(), whole.mkdir()
    for ranks in (4, 2, 1, 4):
        codes, _, said = start(
            out, ranks, {"steps": 6, "sharding": "fsdp" if ranks > 1 else "auto", "muon": muon}
        )
        assert codes == [130] * ranks, said
    found = losses(out)
    start(whole, 1, {"steps": max(found) + 1, "sharding": "auto", "muon": muon})
    expected = losses(whole)
    assert [*found] == [*range(len(found))] == [*expected] and len(found) >= 16
    assert max(abs(found[step] - expected[step]) for step in found) < 1e-5
    once = {line for line in (out / "order.jsonl").read_text().splitlines()}  # some steps twice
    assert once == {*(whole / "order.jsonl").read_text().splitlines()}


def test_a_process_that_cannot_write_its_part_says_so_and_all_end(tmp_path):
    plan = {"when": "full disk", "rank": 1, "after": 1000, "steps": 40, "sharding": "fsdp"}
    codes, seconds, said = start(tmp_path, 2, plan)
    assert codes == [1, 1] and seconds < 30, said
    file = "state/shards/step-2/rank-1-of-2.safetensors"
    assert told(said) == [f"error: {tmp_path}/{file}: File too large"], said
    assert states.meta(tmp_path / "state") == {}  # no mark
