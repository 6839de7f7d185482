"""One process, accumulation and many processes learn the same, in every stage with training/loop.py; and what
many say when one is killed, stuck or mistaken."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, ROOT, metrics, stages

import config
import run
import train
from checkpoint import read_tensors
from training.before import check_divisions

LEARNED = {  # by each stage, in an order in which none changes what the next one begins with
    "stage3": "model/lora/adapter_model.safetensors",
    "t2u": "model/text_to_unit/model.safetensors",
    "stage2": "model/llama/model.safetensors",
    "stage1": "stage1/model.safetensors",
    "text": "text/model.safetensors",
    "units": "model/hubert/model.safetensors",
    "hubert": "state/hubert/round1.safetensors",
}
LANGUAGE = ("text", "stage1", "stage2", "t2u", "stage3")


AGAIN = """
import os, time, torch, config, train
from pathlib import Path
from run import Run, destroy, init_distributed

c = config.read("configs/ci.toml", train.Config, {flags})
run = Run(Path({out!r}), Path({out!r}) / "corpus", c.seed, torch.device("cpu"))
init_distributed(run.device)
for name in {names}:
    if os.environ.get("RANK", "0") == "0":
        run.state(name).rename(run.state(name + "-before"))
    while (run.state(name) / "done.json").exists():
        time.sleep(0.01)
    train.run_some((name,), run, c)
destroy()
"""


STEPS = int(os.environ.get("STEPS", 8))  # 20 are measured in docs/results.md


def learn_again(out: Path, accumulate: int, ranks: int, sharding: str = "auto"):
    """STEPS of 32 documents or crops in every stage, as so many micro-batches on so many processes."""
    flags = ["--normalizer.steps", STEPS, "--hubert.clusters", "[10]"]
    flags += ["--t2u.noise", 0, "--t2u.model.dropout", 0]  # each rank draws these for itself
    for section in ("hubert", "normalizer", *LANGUAGE):
        size = {
            "steps": STEPS,
            "batch_size": 32,
            "accumulate": accumulate,
            "bf16": "false",
            "eval_every": 1000,
        }
        size |= {} if section == "t2u" else {"sharding": sharding}
        flags += [word for key, value in size.items() for word in (f"--{section}.{key}", value)]
    script = out / "again.py"
    script.write_text(AGAIN.format(flags=[*map(str, flags)], out=str(out), names=[*LEARNED]))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else ()), str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def taught(adapted, tmp_path_factory) -> Path:
    """A run as far as stage 3."""
    out = Path(shutil.copytree(adapted, tmp_path_factory.mktemp("run") / "ci"))
    stages(out, "2", "t2u", "3")
    return out


@pytest.fixture(scope="module")
def one_process(taught, tmp_path_factory) -> Path:
    out = Path(shutil.copytree(taught, tmp_path_factory.mktemp("run") / "ci"))
    learn_again(out, accumulate=1, ranks=1)
    return out


@pytest.mark.skipif(find_spec("hibari") is None, reason="the tiny world is spoken by the extra 'demo'")
@pytest.mark.parametrize(
    "accumulate, ranks, sharding",
    [
        pytest.param(1, 4, "ddp", marks=pytest.mark.slow),
        (3, 2, "fsdp"),  # six pieces of 32: of unequal size
        pytest.param(4, 1, "auto", marks=pytest.mark.slow),
        pytest.param(1, 2, "ddp", marks=pytest.mark.slow),
        pytest.param(1, 2, "fsdp", marks=pytest.mark.slow),
        pytest.param(1, 4, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_many_processes_and_micro_batches_learn_what_one_learns(
    taught, one_process, tmp_path, accumulate, ranks, sharding
):
    out = Path(shutil.copytree(taught, tmp_path / "ci"))
    learn_again(out, accumulate, ranks, sharding)
    for stage, path in LEARNED.items():
        one, many = read_tensors(one_process / path), read_tensors(out / path)
        assert one.keys() == many.keys()
        far = max((one[name].float() - many[name].float()).abs().max().item() for name in one)
        assert far < (2e-6 if stage == "t2u" else 1e-6), f"{stage}: {far}"  # t2u: 1.004e-6 was seen
    for name in (*LANGUAGE, "hubert1", "normalize"):
        first, *rest = zip(metrics(one_process, name), metrics(out, name), strict=True)
        assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6), (
            name
        )  # the same documents and masks
        for one, many in (first, *rest):
            assert one.keys() == many.keys()
            # Smaller rows have other padding. Of a thousand guesses, one may be a tie; 1.2e-4 was seen of a
            # gradient's norm.
            for key in one.keys() - {"padding"}:
                assert one[key] == pytest.approx(
                    many[key],
                    rel=5e-4 if key == "grad_norm" else 1e-5 if key == "loss" else 1e-4,
                    abs=2e-3 * (key in ("accuracy", "same")),
                ), (name, key)


# ---- What goes wrong in one of many ------------------------------------------------------------------------


def one_of_many(rank: int, n: int, port: int, folder: Path, event: str):
    """Exchanges numbers with the other processes, until one of them does `event` at the fifth step."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    err = (folder / f"err{rank}").open("w")
    os.dup2(err.fileno(), 2)
    sys.stderr = err
    run.BEAT, run.PATIENCE = 0.1, 1.5

    @run.together()
    def main():
        if event == "config":
            raise ValueError("lr: a typo")
        run.init_distributed(torch.device("cpu"))
        for step in range(1000 if event != "end" else 10):
            if step == 5:
                (folder / f"ready{rank}").touch()
                if event == "all":
                    raise ValueError("the same mistake")
                if event == "work" and rank == 0:
                    time.sleep(4)  # longer than the patience with those who do not answer
                if event in ("work", "end"):
                    run.barrier()
                if event == "work":
                    break
                if rank == n - 1:
                    if event == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    if event == "stop":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    if event == "own":
                        raise ValueError("a mistake of its own")
            run.all_reduce_sum(torch.ones(1))
            time.sleep(0.005)

    config.command_line(main)


def many(folder: Path, event: str, n: int = 3) -> tuple[list[int], str, float]:
    """The exit codes of n processes, all that they said, and the seconds it took from `event`."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["run", "train_vocoder"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_of_many, args=(i, n, port, folder, event)) for i in range(n)]
    for process in processes:
        process.start()
    began = None
    deadline = time.monotonic() + 60
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if began is None and (event == "config" or (folder / f"ready{n - 1}").exists()):
            began = time.monotonic()
        if event == "stop" and not any(process.is_alive() for process in processes[:-1]):
            processes[-1].kill()
        time.sleep(0.01)
    seconds = time.monotonic() - began
    for process in processes:
        process.kill()
        process.join()
    said = "".join((folder / f"err{i}").read_text() for i in range(n))
    return [process.exitcode for process in processes], said, seconds


@pytest.mark.skipif(not hasattr(os, "dup2") or sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "event, codes, said",
    [
        ("end", [0, 0, 0], None),
        ("work", [0, 0, 0], None),
        ("kill", [1, 1, -9], "error: lost the connection to another process of this run"),
        ("stop", [1, 1, -9], "error: process 2 of 3 has not moved for 2 seconds"),
        ("own", [1, 1, 1], "error: a mistake of its own"),
        ("all", [1, 1, 1], "error: the same mistake"),
        ("config", [1, 1, 1], "error: lr: a typo"),
    ],
)
def test_many_processes_end_soon_and_with_one_line(tmp_path, event, codes, said):
    found, lines, seconds = many(tmp_path, event)
    assert found == codes and len(lines) < 300, lines
    assert (
        lines.strip().splitlines() == [lines.strip()] and lines.strip().startswith(said)
        if said
        else not lines
    )
    assert seconds < 20, seconds
    assert len(lines) < 300


def learn_with_a_nan(rank: int, out: Path):
    """Six steps on two processes; in the third and fourth, rank 1 alone has a batch that is not finite."""
    import test_loop  # its model, loss and batches

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", (out / "store").as_uri(), rank=rank, world_size=2)
    batches = test_loop.not_a_number({2, 3} if rank == 1 else set())
    model = test_loop.learn(out / "run", batches, steps=6)
    torch.save(model.state_dict(), out / f"{rank}.pt")
    run.destroy()


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(tmp_path):
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    processes = [context.Process(target=learn_with_a_nan, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics/name.jsonl").read_text().splitlines()]
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == {2: 1, 3: 2}
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)


ALONE = """
import config, torch, run
run.JOINING = 1
@run.together()
def main():
    run.init_distributed(torch.device("cpu"))
config.command_line(main)
"""


@pytest.mark.parametrize(
    "rank, place, said",
    [
        (
            1,
            {"MASTER_ADDR": "127.0.0.1"},
            "error: process 1 cannot reach process 0 at MASTER_ADDR 127.0.0.1, ",
        ),
        (
            1,
            {"MASTER_ADDR": "no.such.host.invalid"},
            "error: process 1 cannot reach process 0 at MASTER_ADDR no",
        ),
        (
            0,
            {"MASTER_ADDR": "127.0.0.1"},
            "error: only 1 of 2 processes have come to process 0 at MASTER_ADDR",
        ),
        (1, {}, "error: 2 processes need MASTER_ADDR and MASTER_PORT; start them with torchrun"),
    ],
)
def test_who_cannot_find_the_others_says_so(rank, place, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | variables | place,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.startswith(said) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "when, what, cause",
    [
        (5, "os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        (5, "raise ValueError('a mistake of its own')", "traceback : error: a mistake of its own"),
        (0, "raise ValueError('there is no cuda:1')", "traceback : error: there is no cuda:1"),
    ],
)
def test_torchrun_ends_all_when_one_has_ended(tmp_path, when, what, cause):
    """What torchrun itself reports, in many lines, is not ours to shorten; but its end names the cause."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import os, signal, time, torch, config, run\n"
        "@run.together()\n"
        "def main():\n"
        "    for step in range(10_000):\n"
        "        if step == 1:\n"
        "            run.init_distributed(torch.device('cpu'))\n"
        f"        if step == {when} and run.rank() == 1:\n"
        f"            {what}\n"
        "        run.all_reduce_sum(torch.ones(1))  # of its own, before it has joined the others\n"
        "config.command_line(main)\n"
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert done.returncode == 1 and time.monotonic() - began < 60
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) <= 1 and f'File "{script}"' not in done.stderr
    assert cause in "".join(done.stderr.splitlines(keepends=True)[-5:]), done.stderr
    assert cause == "SIGKILL" or ours == [cause.removeprefix("traceback : ")]


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_a_batch_that_eight_processes_cannot_divide_is_one_line_before_the_first_stage(
    tmp_path, monkeypatch, rank, capsys
):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "8")
    out = tmp_path / "ci"
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/ci.toml", "--out", str(out), "--device", "cpu"])
    monkeypatch.setattr(train, "need_extra", lambda: None)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        config.command_line(train.main)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and not [*out.glob("[!.]*")]  # but for its lock
    assert said.count("\n") == (rank == 0)
    assert rank > 0 or said.startswith(
        "error: hubert.batch_size is 4: less than one for each of 8 process(es)"
    )


def test_the_tiny_config_can_be_divided_among_eight():
    tiny = config.read(ROOT / "configs/tiny.toml", train.Config)
    check_divisions(train.STAGES, train.STAGES, tiny, 8)
    with pytest.raises(ValueError, match="hubert.batch_size is 8"):
        check_divisions(train.STAGES, train.STAGES, tiny, 9)
    check_divisions(train.STAGES, ["stage1", "vocoder"], tiny, 9)  # only what is asked for
