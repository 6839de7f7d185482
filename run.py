"""Device, ranks, learning-rate schedule, progress bar, metrics file: what every run needs.

One process or many: `torchrun --nproc_per_node 8 train.py ...` sets RANK, WORLD_SIZE and LOCAL_RANK; without
them this is rank 0 of 1. Only rank 0 writes files.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import write_atomic


@dataclass(frozen=True)
class Run:
    """What all stages of one run share."""

    out: Path  # the folder of everything it writes
    corpus: Path  # the folder with manifest.jsonl
    seed: int
    device: torch.device
    workers: int = 0  # processes that prepare batches while a GPU computes

    @property
    def manifest(self) -> Path:
        """The recordings that this run uses, every field filled in (data/corpus.py); dialogues.jsonl and
        skipped.jsonl are beside it. Nothing is written into the corpus folder."""
        return self.out / "manifest.jsonl"

    @property
    def units(self) -> Path:
        """Their units (data/units.py)."""
        return self.out / "units.jsonl"

    @property
    def model(self) -> Path:
        """The talking model that it makes: llama/, lora/, hubert/, vocoder/."""
        return self.out / "model"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def metrics(self) -> Path:
        """One JSON-lines file a stage."""
        return self.out / "metrics"

    def state(self, stage: str) -> Path:
        """What stage `stage` keeps while it works, and the record of what it was begun with."""
        return self.out / "state" / stage


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def device(name: str = "auto") -> torch.device:
    """'auto' prefers CUDA (this rank's), then Apple's MPS, then the CPU."""
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name == "auto":
        name = cuda if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"unknown device '{name}'; choose auto, cpu, cuda or mps")
    if (
        kind == "cuda"
        and not torch.cuda.is_available()
        or kind == "mps"
        and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"device '{name}' was asked for, but torch finds none here; use --device cpu")
    try:
        found = torch.device(cuda if name == "cuda" else name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; choose auto, cpu, cuda, cuda:1 or mps") from None
    if kind == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {found}: this machine has {torch.cuda.device_count()} GPU(s)")
    return found


def autocast(where: torch.device, wanted: bool = True) -> torch.autocast:
    """Matrix products in bfloat16, where the machine is faster at them: CUDA, and CPUs with AVX512-BF16."""
    able = (
        where.type == "cuda"
        or where.type == "cpu"
        and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    )
    return torch.autocast(where.type if able else "cpu", torch.bfloat16, enabled=able and wanted)


def init_distributed(where: torch.device):
    """Joins the other ranks, if there are any."""
    if world_size() > 1 and not dist.is_initialized():
        if where.type == "mps":
            raise ValueError("several processes cannot share an Apple GPU; use --device cpu")
        if where.type == "cuda":
            torch.cuda.set_device(where)
        backend = "nccl" if where.type == "cuda" else "gloo"
        # The others wait while rank 0 alone makes a corpus or its units: for hours, perhaps.
        dist.init_process_group(backend, timeout=timedelta(days=1))


def barrier():
    """Returns when all ranks are here: what rank 0 wrote before, the others may read after."""
    if dist.is_initialized():
        dist.barrier()


def destroy():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the ranks, in place; NCCL sums on a GPU, gloo on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def cosine(step: int, warmup: int, total: int, peak: float, floor: float = 0.1) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a half cosine down to `floor * peak` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def progress(total: int, start: int = 0, title: str = "", **kwargs) -> tqdm:
    """A progress bar with time left, silent on all ranks but the first."""
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        disable=rank() > 0,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        **kwargs,
    )


class Metrics:
    """One JSON line a step. Opened again at `step`, the lines from there on (a killed run's) are dropped
    first."""

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        if rank() > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] < step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # the half line of a killed run
                    continue
        write_atomic(self.path, "".join(kept).encode())

    def write(self, **numbers: float | str):
        if rank() > 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")
