"""Training states: what an interrupted stage needs to go on, saved by all processes of a run together.

    meta = states.meta(folder)                                 {} if there is none
    meta = states.load(folder, trained, optimizers, steps)     the same; trained: {name: parameter}
    states.save(folder, trained, optimizers, {"step": 200})    called by all ranks
    states.wait()                                              until the last one is on disk
    states.remove(folder)                                      of a stage that is finished

Where every process has the whole model, the state is the one file of checkpoint.py, written by rank 0. Where
the model is divided, each writes what it has, and rank 0 a mark when all have:

    shards/step-200/rank-0-of-2.safetensors    rank 0's part of each weight and moment; in the metadata of
                                               the file, where in the whole tensor the part belongs
                    rank-1-of-2.safetensors
                    mark.json                  step and more, and size and hash of each file; a folder
                                               without it counts for nothing

    "adamw.exp_avg.model.embed_tokens.weight", 101 rows     rank-0-of-2: offset [0, 0], shape [51, 64]
                                                            rank-1-of-2: offset [51, 0], shape [50, 64]

A reader copies from each part what overlaps with its own, so any number of ranks goes on from what any other
number has saved, or from the one file; and one process from what many have.

A save costs the training the time of a copy to the host's memory: a thread writes it to disk. The last few
are kept, and one that is damaged is put aside for the one before it.

torch.distributed.checkpoint does the same, but keeps its table of contents as a pickle, which is a program
(no file of ours may be one), has no checksums, and promises nothing from one version of torch to the next.

References: safetensors (checkpoint.py); torch.distributed.checkpoint, for what a checkpoint of many processes
needs.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

import checkpoint
from config import STOPPED, end
from files import fingerprint, one_line, read_json, show, write_json
from run import barrier, destroy, rank, world_size
from training import shard
from training.shard import local

Trained = dict[str, nn.Parameter]
Optimizers = dict[str, torch.optim.Optimizer]


def load(folder: Path, trained: Trained, optimizers: Optimizers, steps: int | None = None) -> dict:
    """Puts back the newest state that is whole, to the last bit, and returns its `meta`; {} if there is none.

    Called by all ranks; `trained` and the optimizers may be divided among them, or not. A state that is
    damaged is told and put aside, and the one before it is taken; ValueError, one line, if none fits or the
    step is beyond `steps`; nothing is changed then."""
    wait()
    check_versions()
    single = single_file(folder)
    if not (is_divided(trained) or shards(folder).exists()):
        if not checkpoint.has_training(single):
            return {}
        return checkpoint.load_training(single, {"model": trained}, optimizers, steps)
    paths = of_rank_0(lambda: newest_first(folder, clean=True))
    weights = checkpoint.named_weights({"model": trained}, optimizers)
    slots = {name: checkpoint.moments(optimizer) for name, optimizer in optimizers.items()}
    refused: list[tuple[str, Path]] = []
    for path in paths:
        problem = None
        try:
            tensors, meta = read(path)
            with one_line(path):
                checkpoint.check_step(meta, steps)
                found = fit(tensors, weights, slots)
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = [problem for problem in of_all(problem) if problem]
        if not problems:
            break
        refused.append((problems[0], path))
    else:
        if refused:
            raise ValueError(f"{refused[0][0]}; delete {folder} to begin anew")
        return {}
    for problem, path in refused:
        if rank() == 0:
            put_aside(path)
            print(f"{problem}; going on from the state before it, of step {meta['step']}", flush=True)
    with torch.no_grad():
        for key, weight in weights.items():
            tensors[key].copy_to(weight)
    for name, optimizer in optimizers.items():
        optimizer.state.clear()
        optimizer.state.update(found[name])
    return meta


def meta(folder: Path) -> dict:
    """The `meta` of the state that `load` will take if it fits, which may be asked before there are
    optimizers; {} if there is none."""
    for path in newest_first(folder):
        with contextlib.suppress(ValueError, OSError):
            return checkpoint.load_state(path, checked=False)[1] if path.suffix else read_mark(path)["meta"]
    return {}


def save(folder: Path, trained: Trained, optimizers: Optimizers, meta: dict, keep: int = 2) -> None:
    """Saves the weights and what the optimizers keep of them, and `meta` (JSON types, with a "step"). Called
    by all ranks after the same step. keep: how many states of a divided model are kept.

    A divided model is only copied now, and written while training goes on; what goes wrong in that is raised
    by the next `save` or `wait`."""
    if not is_divided(trained):
        if rank() == 0:
            checkpoint.save_training(single_file(folder), {"model": trained}, optimizers, meta)
        return
    wait()
    parts, places = {}, {}
    for name, tensor in checkpoint.training_tensors({"model": trained}, optimizers).items():
        where = place(tensor)
        if where.is_mine and math.prod(where.shape):
            parts[name] = local(tensor).detach().to("cpu", copy=True)
            places[name] = [list(tensor.shape), list(where.offset)]
    to = shards(folder) / f"step-{meta['step']}"
    in_background(lambda: write(to, parts, places, meta, keep))


_writing: Future | None = None


def wait() -> None:
    """Returns when the last state is on disk; what went wrong in writing it is raised here. Called by all
    ranks."""
    global _writing
    last, _writing = _writing, None
    if last:
        last.result()


def end_after(step: int) -> NoReturn:
    """Ends this program, all ranks of it, when the state of `step` is on disk."""
    wait()
    barrier()
    destroy()
    end(STOPPED.format(step=step), 0)


def in_background(work: Callable[[], None]) -> None:
    global _writing
    _writing = done = Future()

    def run():
        try:
            done.set_result(work())
        except BaseException as problem:
            done.set_exception(problem)

    Thread(target=run, daemon=True).start()  # of a process that ends early, what it had not written is lost


def remove(folder: Path) -> None:
    """Of a stage that is finished; called by rank 0."""
    checkpoint.remove_training(single_file(folder))
    shutil.rmtree(shards(folder), ignore_errors=True)


def single_file(folder: Path) -> Path:
    """The state of a run whose processes all have the whole model."""
    return Path(folder) / "state.safetensors"


def shards(folder: Path) -> Path:
    """The states of a run whose processes each have a part of the model."""
    return Path(folder) / "shards"


# ---- Parts of tensors --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """The part of a tensor that this process has."""

    offset: tuple[int, ...]  # of its first number in the whole tensor
    shape: tuple[int, ...]
    is_mine: bool  # whether this process saves it; of what several have, the first


def place(tensor: Tensor) -> Place:
    if not shard.is_divided(tensor):
        return Place((0,) * tensor.ndim, tuple(tensor.shape), rank() == 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # slow to import

    mesh = tensor.device_mesh
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    copies = [mesh.get_local_rank(i) for i, how in enumerate(tensor.placements) if how.is_replicate()]
    return Place(tuple(offset), tuple(shape), not any(copies))


def is_divided(trained: Trained) -> bool:
    return any(map(shard.is_divided, trained.values()))


class Stored:
    """A tensor of a saved state, in one part or many, all of them views of memory maps."""

    def __init__(self, shape: list[int], dtype: torch.dtype):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.parts: list[tuple[tuple[int, ...], Tensor]] = []  # (offset, numbers)

    def add(self, offset: list[int], numbers: Tensor):
        """ValueError if it cannot be a part of this tensor."""
        ends = [begin + n for begin, n in zip(offset, numbers.shape, strict=True)]
        inside = all(0 <= begin and end <= n for begin, end, n in zip(offset, ends, self.shape, strict=True))
        if numbers.dtype != self.dtype or not inside:
            raise ValueError(f"a part of shape {show(numbers.shape)} at {show(offset)} is not in the tensor")
        self.parts.append((tuple(offset), numbers))

    def within(self, where: Place) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """(where in the part of this process, the saved numbers that belong there), from each saved part."""
        for offset, numbers in self.parts:
            here, there = [], []
            for a, n, b, m in zip(where.offset, where.shape, offset, numbers.shape):
                begin, end = max(a, b), min(a + n, b + m)
                here.append(slice(begin - a, end - a))
                there.append(slice(begin - b, end - b))
            if all(s.start < s.stop for s in here):
                yield tuple(here), numbers[tuple(there)]

    def check(self, name: str, like: Tensor, dtype: torch.dtype):
        """ValueError unless it can become `like`, whose format is `dtype`: of the part that this process
        needs, all is there and finite."""
        if (self.shape, self.dtype) != (like.shape, dtype):
            found = f"{show(self.shape)} {self.dtype}"
            raise ValueError(f"{name} is {found}, expected {show(like.shape)} {dtype}")
        where = place(like)
        covered = 0
        for _, numbers in self.within(where):
            covered += numbers.numel()
            if numbers.is_floating_point() and not numbers.isfinite().all():
                raise ValueError(f"{name} holds numbers that are NaN or infinite")
        if covered != math.prod(where.shape):
            raise ValueError(f"{name}: {covered} of {math.prod(where.shape)} numbers are there")

    def copy_to(self, tensor: Tensor) -> Tensor:
        mine = local(tensor.detach())
        for here, numbers in self.within(place(tensor)):
            mine[here].copy_(numbers)
        return tensor


def fit(tensors: dict[str, Stored], weights: dict[str, Tensor], slots: dict[str, dict]) -> dict[str, dict]:
    """The state of each optimizer, made from `tensors`; ValueError unless these and the weights are all."""
    left = dict(tensors)

    def take(name: str, like: Tensor, dtype: torch.dtype) -> Stored:
        if name not in left:
            raise ValueError(f"{name} is missing")
        left[name].check(name, like, dtype)
        return left.pop(name)

    for key, weight in weights.items():
        take(key, weight, weight.dtype)
    keys = {id(weight): key for key, weight in weights.items()}
    states: dict[str, dict] = {name: {} for name in slots}
    for name, slots_of in slots.items():
        for weight, kept in slots_of.items():
            names = {slot: f"{name}.{slot}.{keys[id(weight)]}" for slot in kept}
            if left.pop(f"{name}.{checkpoint.UNTOUCHED}.{keys[id(weight)]}", None) is not None:
                continue
            states[name][weight] = {}
            for slot, small in kept.items():
                like = weight if small.ndim == weight.ndim else small  # the step is one number
                stored = take(names[slot], like, small.dtype)
                made = torch.empty_like(like, dtype=small.dtype, device=small.device)
                states[name][weight][slot] = stored.copy_to(made.detach())
    if left:
        raise ValueError(f"{show(min(left))} has no place in this run")
    return states


# ---- Writing and reading a folder --------------------------------------------------------------------------

MARK = "mark.json"


def write(folder: Path, parts: dict[str, Tensor], places: dict[str, list], meta: dict, keep: int) -> None:
    """This rank's file, and when all ranks have written theirs, rank 0's mark."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"rank-{i}-of-{world_size()}" for i in range(world_size())]
    file = folder / f"{names[rank()]}.safetensors"
    checkpoint.save_state(file, parts, places)
    receipt = {"bytes": file.stat().st_size, "blake2b": fingerprint(file)}
    write_json(folder / f"{names[rank()]}.json", receipt)
    if rank() > 0:
        return
    receipts = [folder / f"{name}.json" for name in names]
    while not all(path.exists() for path in receipts):  # if one never comes, run.py ends this process
        time.sleep(0.02)
    files = {path.with_suffix(".safetensors").name: read_json(path) for path in receipts}
    mark = {"meta": meta, "torch": torch.__version__, "files": files}
    write_json(folder / MARK, mark | {"blake2b": hash_of(mark)})
    for path in receipts:
        path.unlink()
    for old in marked(folder.parent)[keep:]:
        discard(old)


def hash_of(mark: dict) -> str:
    return hashlib.blake2b(json.dumps(mark, sort_keys=True).encode(), digest_size=16).hexdigest()


def marked(states: Path) -> list[Path]:
    """The folders that count, newest first."""
    paths = [path for path in states.glob("step-*") if (path / MARK).exists()]
    return sorted((path for path in paths if step_of(path) >= 0), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Of a folder step-200: 200; -1 if it is none."""
    return int(path.name[5:]) if re.fullmatch(r"step-\d{1,10}", path.name) else -1


def step_in(file: Path) -> float:
    """The same of a state in one file; infinite if it cannot be read, which whoever tries it will tell."""
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
        return float(checkpoint.load_state(file, checked=False)[1]["step"])
    return math.inf


def discard(folder: Path) -> None:
    """Its mark first: a folder with a mark has all its files."""
    (folder / MARK).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def put_aside(path: Path) -> None:
    """A damaged state, for whoever wants to look at it; it is never taken again."""
    aside = path.with_name("state.damaged.safetensors" if path.suffix else "damaged")
    with contextlib.suppress(OSError):  # Windows renames no file that another process reads
        if aside.is_dir():
            shutil.rmtree(aside)
        os.replace(path, aside)


def newest_first(folder: Path, clean: bool = False) -> list[Path]:
    """All states there are, divided or not. clean: removes what a killed run has left half-written."""
    if clean:
        for path in shards(folder).glob("step-*"):
            if not (path / MARK).exists():
                shutil.rmtree(path, ignore_errors=True)
    steps = {path: step_of(path) for path in marked(shards(folder))}
    for path in checkpoint.training_files(single_file(folder)):
        steps[path] = step_in(path)
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def read_mark(path: Path) -> dict:
    """ValueError, one line, unless it is whole."""
    mark = read_json(path / MARK)
    with one_line(path / MARK):
        if mark.pop("blake2b") != hash_of(mark):
            raise ValueError("damaged: its own hash does not match")
        return {"meta": dict(mark["meta"]), "torch": str(mark["torch"]), "files": dict(mark["files"])}


def read(path: Path) -> tuple[dict[str, Stored], dict]:
    """The tensors and the `meta` of a folder or of one file. All ranks together read every byte of a folder
    once for its hash; of the rest, each what it needs."""
    if path.suffix:
        tensors, meta = checkpoint.load_state(path)
        whole = {name: Stored(list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            whole[name].add([0] * tensor.ndim, tensor)
        return whole, meta
    mark = read_mark(path)
    files = mark["files"]
    if mark["torch"] != torch.__version__ and rank() == 0:
        saved = f"saved by torch {show(mark['torch'])}, goes on with {torch.__version__}"
        print(f"{path}: {saved}; what follows may differ in its last digits", flush=True)
    for i, (name, receipt) in enumerate(files.items()):
        with one_line(path / name):
            if not re.fullmatch(r"rank-\d+-of-\d+\.safetensors", name):
                raise ValueError("not the name of a part of a state")
            if not (path / name).exists():
                raise ValueError("missing")
            if (path / name).stat().st_size != receipt["bytes"]:
                raise ValueError(f"has {(path / name).stat().st_size} bytes instead of {receipt['bytes']}")
            if i % world_size() == rank() and fingerprint(path / name) != receipt["blake2b"]:
                raise ValueError("damaged: its hash does not match")
    tensors: dict[str, Stored] = {}
    for name in files:
        parts, places = checkpoint.load_state(path / name, checked=False)
        with one_line(path / name):
            for key, numbers in parts.items():
                shape, offset = places[key]
                stored = tensors.setdefault(key, Stored(shape, numbers.dtype))
                if list(stored.shape) != shape:
                    raise ValueError(f"{show(key)} is {show(shape)} here and {show(stored.shape)} in others")
                stored.add(offset, numbers)
    return tensors, mark["meta"]


# ---- Agreement ---------------------------------------------------------------------------------------------


def of_all(value: object) -> list:
    """What each rank has said, in order."""
    if not dist.is_initialized():
        return [value]
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def of_rank_0(work: Callable[[], list[Path]]) -> list[Path]:
    """The result of `work` on rank 0, which alone does it."""
    return of_all(work() if rank() == 0 else None)[0]


def check_versions() -> None:
    """ValueError if the processes of this run do not have the same version of torch."""
    versions = of_all(torch.__version__)
    for i, version in enumerate(versions):
        if version != versions[0]:
            raise ValueError(
                f"process {i} has torch {version}, process 0 has {versions[0]}; install the same for all"
            )
