"""Device, ranks, learning-rate schedule, progress bar, metrics file: what every run needs.

One process or many: `torchrun --nproc_per_node 8 train.py ...` sets RANK, WORLD_SIZE and LOCAL_RANK; without
them this is rank 0 of 1. Only rank 0 writes files, and one rank alone tells what has gone wrong.
"""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread

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
    tensorboard: bool = False  # metrics are written for it, too

    def __post_init__(self):
        if self.workers:
            check_workers(self.workers)
        if self.tensorboard:
            need_tensorboard()

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
    def imitated(self) -> Path:
        """Units of some recordings as other people would say them (train_hubert.py), if there are any."""
        return self.out / "imitated.jsonl"

    @property
    def spoken(self) -> Path:
        """The units of dialogues that the text-to-unit generator has spoken (train_text_to_unit.py)."""
        return self.out / "t2u.jsonl"

    @property
    def model(self) -> Path:
        """The talking model that it makes: llama/, lora/, hubert/, vocoder/; and text_to_unit/."""
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


def check_workers(workers: int):
    """ValueError, before anything is done, if this machine can have no processes that prepare batches."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"workers is {workers}, but this system cannot fork processes; use --workers 0")
    try:
        multiprocessing.get_context("fork").Queue()  # of semaphores, which are shared memory too
        torch.zeros(1).share_memory_()
    except (RuntimeError, OSError):
        raise ValueError(
            f"workers is {workers}, but there is no shared memory to hand batches over; use --workers 0, or "
            "mount /dev/shm (docker run --shm-size 2g)"
        ) from None


def need_tensorboard():
    """ValueError, one line, before anything is done, if TensorBoard is not installed."""
    if not find_spec("tensorboard"):
        raise ValueError("--tensorboard true needs the package tensorboard: pip install tensorboard")


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
    """Matrix products in bfloat16, on CUDA and CPUs. Whether a CPU is faster at them is measured by
    training/precision.py."""
    able = where.type in ("cuda", "cpu")
    return torch.autocast(where.type if able else "cpu", torch.bfloat16, enabled=able and wanted)


# ---- Many processes ----------------------------------------------------------------------------------------
# Rank 0 alone makes a corpus or its units, for hours perhaps, while the others wait: their patience has no
# end, as long as all are alive. Every process adds to its own counter on a notice board (a TCPStore, which
# torchrun keeps) every few seconds; one whose counter stands still is stuck, and then all of them end.

BEAT = 2.0  # seconds between two additions
PATIENCE = 40.0  # seconds after which a process whose counter stands still is given up
FOREVER = timedelta(days=20)  # of one that waits for what another does
JOINING = 300.0  # seconds that processes wait for each other at the beginning
LOST = "the others end, and the same command continues from the last saved state"

KEPT_BY_TORCHRUN = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

_board: dist.Store | None = None
_barriers = 0
_left = Event()  # this process has left the others


def init_distributed(where: torch.device):
    """Joins the other ranks, if there are any."""
    if world_size() > 1 and not dist.is_initialized():
        if where.type == "mps":
            raise ValueError("several processes cannot share an Apple GPU; use --device cpu")
        if where.type == "cuda":
            torch.cuda.set_device(where)
        backend = "nccl" if where.type == "cuda" else "gloo"
        if KEPT_BY_TORCHRUN:
            _open_board()  # first, because another may have failed already and would be waited for
        if KEPT_BY_TORCHRUN:
            dist.init_process_group(backend, timeout=FOREVER)
        else:
            group = {"store": _meet(), "rank": rank(), "world_size": world_size()}
            dist.init_process_group(backend, timeout=FOREVER, **group)
        if _board is None:
            _open_board()  # rank 0 keeps it now


class Unreachable(ConnectionError):
    """Process 0 cannot be found, or some have not come to it: each process tells it for itself."""


def _meet() -> dist.Store:
    """The store of process 0, when all processes have found it. Unreachable, one line, if they have not after
    JOINING seconds."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        advice = "start them with torchrun, or set both to where process 0 is"
        raise Unreachable(f"{world_size()} processes need MASTER_ADDR and MASTER_PORT; {advice}") from None
    until = time.monotonic() + JOINING
    place = f"process 0 at MASTER_ADDR {address}, MASTER_PORT {port}"
    while rank() > 0:
        try:
            socket.create_connection((address, port), 5).close()
            break
        except OSError as problem:
            if isinstance(problem, socket.gaierror) or time.monotonic() > until:
                raise Unreachable(f"process {rank()} cannot reach {place}: {problem}") from None
            time.sleep(0.2)
    try:
        patience = timedelta(seconds=PATIENCE)
        store = dist.TCPStore(address, port, world_size(), rank() == 0, patience, wait_for_workers=False)
        store.add("here", 1)
        while (here := store.add("here", 0)) < world_size():
            if time.monotonic() > until:
                few = f"{here} of {world_size()} processes"
                raise Unreachable(f"only {few} have come to {place} in {JOINING:.0f} seconds")
            time.sleep(0.05)
    except dist.DistError as problem:
        what = str(problem).splitlines()[0][:120]
        raise Unreachable(f"process {rank()} has no connection to {place}: {what}") from None
    store.set_timeout(FOREVER)
    return dist.PrefixStore("group", store)


def _open_board():
    global _board
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A connection of its own: others wait on that of the process group, for as long as it takes.
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    _board = dist.PrefixStore(f"board{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _board.add(f"beat {rank()}", 1)
    Thread(target=_watch, args=(_board,), daemon=True).start()


def barrier():
    """Returns when all ranks are here: what rank 0 wrote before, the others may read after."""
    global _barriers
    if _board is None:
        if dist.is_initialized():
            dist.barrier()
        return
    _barriers += 1
    here = f"barrier {_barriers}"
    _board.add(here, 1)
    while _board.add(here, 0) < world_size():
        time.sleep(0.01)


def destroy():
    """Leaves the other ranks."""
    if _board is not None:
        with suppress(dist.DistError):  # whoever kept the board has left
            _board.add(f"left {rank()}", 1)
        _left.set()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Around all that a process does which may be one of many: leaves the others at the end.

    What goes wrong in several of them is told by the first, and the rest end in silence; when one was killed,
    the first of the others to notice says so."""
    try:
        yield
    except Exception as problem:
        if world_size() > 1:
            if not isinstance(problem, Unreachable) and not _is_first():
                _end_in_silence()
            if rank() == 0 and _board is not None:  # it may keep the board: the others are to read it first
                time.sleep(1.5 * BEAT)
            if isinstance(problem, dist.DistError) or "gloo" in str(problem):
                lost = "lost the connection to another process of this run (was it killed, or its machine?)"
                problem = ConnectionError(f"{lost}; {LOST}")
            if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun will name as the cause
                with suppress(OSError):
                    cause = {"message": f"error: {problem}", "timestamp": int(time.time())}
                    Path(report).write_text(json.dumps(cause), encoding="utf-8")
        raise problem
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # told to end, perhaps because of what another has told already
        with suppress(dist.DistError):
            if _board is not None and _board.add("told", 0):
                _end_in_silence()
        raise
    destroy()


def _end_in_silence():
    """Another process is about to tell why, and must not be ended by torchrun before it has."""
    with suppress(ValueError):  # in another thread than the first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2 * BEAT)
    sys.exit(1)


def _is_first() -> bool:
    """Whether no other process has told yet what has gone wrong."""
    try:
        if _board is None and KEPT_BY_TORCHRUN:
            _open_board()
        if _board is None:  # all read the same config, with the same mistake in it
            return rank() == 0
        return _board.add("told", 1) == 1
    except dist.DistError:  # rank 0 kept the board, and is gone
        return rank() == 1


def _watch(board: dist.Store):
    """Ends this process when another has told of an error, or is stuck. Rank 0 watches all others,
    and they watch rank 0."""
    watched = {other: (0, time.monotonic()) for other in (range(1, world_size()) if rank() == 0 else (0,))}
    while not _left.wait(BEAT):
        try:
            board.add(f"beat {rank()}", 1)
            if board.add("told", 0):
                # Time to say it, and to write what is being written; rank 0 may keep the board: it is last.
                time.sleep(4 * BEAT if rank() else 6 * BEAT)
                os._exit(1)
            for other, (beats, since) in watched.items():
                now = board.add(f"beat {other}", 0)
                if now != beats:
                    watched[other] = (now, time.monotonic())
                elif beats and time.monotonic() - since > PATIENCE and not board.add(f"left {other}", 0):
                    if board.add("told", 1) == 1:
                        stuck = f"process {other} of {world_size()} has not moved for {PATIENCE:.0f} seconds"
                        print(f"\nerror: {stuck}; {LOST}", file=sys.stderr, flush=True)
        except dist.DistError:
            if not _left.wait(5 * BEAT):  # the board is gone, and this process is not about to end
                if rank() == 1:
                    print(f"\nerror: lost the connection to process 0; {LOST}", file=sys.stderr, flush=True)
                os._exit(1)


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
    first. With `tensorboard` a folder of the same name beside it has the numbers for TensorBoard."""

    def __init__(self, path: str | Path, step: int = 0, tensorboard: bool = False):
        self.path = Path(path)
        self.board = None
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
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.path.parent / "tensorboard" / self.path.stem
            self.board = SummaryWriter(folder, purge_step=step or None)

    def write(self, step: int, **numbers: float | str):
        if rank() > 0:
            return
        if self.board:
            for key, value in numbers.items():
                if isinstance(value, float | int):
                    self.board.add_scalar(key, value, step)
            self.board.flush()  # what it holds back would be lost at the end
        for key, value in numbers.items():
            if isinstance(value, float) and not math.isfinite(value):
                numbers[key] = None  # JSON has no NaN
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
