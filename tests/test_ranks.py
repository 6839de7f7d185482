"""One process, accumulation and many processes learn the same, in every stage with training/loop.py."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENVIRONMENT, ROOT, stages

from checkpoint import read_tensors

pytest.importorskip("hibari", reason="the tiny world is spoken by the extra 'demo'")


LEARNED = {  # by each stage, in an order in which none changes what the next one begins with
    "stage3": "model/lora/adapter_model.safetensors",
    "stage2": "model/llama/model.safetensors",
    "stage1": "stage1/model.safetensors",
    "text": "text/model.safetensors",
    "units": "model/hubert/model.safetensors",
    "hubert": "state/hubert/round1.safetensors",
}
LANGUAGE = ("text", "stage1", "stage2", "stage3")


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


def learn_again(out: Path, accumulate: int, ranks: int):
    """20 steps of 32 documents or crops in every stage, as so many micro-batches on so many processes."""
    flags = ["--normalizer.steps", 20, "--hubert.clusters", "[10]"]
    for section in ("hubert", "normalizer", *LANGUAGE):
        size = {"steps": 20, "batch_size": 32, "accumulate": accumulate, "bf16": "false", "eval_every": 1000}
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
    stages(out, "2", "3")
    return out


@pytest.fixture(scope="module")
def one_process(taught, tmp_path_factory) -> Path:
    out = Path(shutil.copytree(taught, tmp_path_factory.mktemp("run") / "ci"))
    learn_again(out, accumulate=1, ranks=1)
    return out


@pytest.mark.parametrize(
    "accumulate, ranks",
    [
        (1, 4),
        (3, 2),  # six pieces of 32: of unequal size
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_many_processes_and_micro_batches_learn_what_one_learns(
    taught, one_process, tmp_path, accumulate, ranks
):
    out = Path(shutil.copytree(taught, tmp_path / "ci"))
    learn_again(out, accumulate, ranks)
    for stage, path in LEARNED.items():
        one, many = read_tensors(one_process / path), read_tensors(out / path)
        assert one.keys() == many.keys()
        far = max((one[name].float() - many[name].float()).abs().max().item() for name in one)
        assert far < 1e-6, f"{stage}: {far}"
