"""Weights on disk: reads ours and other people's without running anything, writes ours whole or not at all.

A checkpoint is a table of names and tensors. The format we write, safetensors, is nothing more than that:

    8 bytes   n, the length of the header (little endian)
    n bytes   JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest  the numbers of all tensors, end to end

    >>> save_tensors("a.safetensors", {"w": torch.eye(2)})
    >>> read_tensors("a.safetensors")
    {'w': tensor([[1., 0.], [0., 1.]])}

The older formats (torch.save, fairseq, joblib) are pickles, and a pickle is a program: see pickles.py.

Whatever the format, a tensor is a view of a memory map; `assign` converts them into a module one by one. A
damaged file is a ValueError of one line. Safetensors has no checksums, so our files carry their own in the
header's metadata, where other readers ignore them: one for each tensor, so that whoever reads a part of a
file can check that part.

References: safetensors, https://github.com/huggingface/safetensors
            sharded folders, https://huggingface.co/docs/transformers/big_models
"""

import contextlib
import copy
import json
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from files import MAX_JSON, one_line, parse_json, read_json, show, stream_atomic, write_json
from pickles import Inert, MappedFile, read_pickle, read_zip
from run import barrier, rank, world_size

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


# ---- Safetensors -------------------------------------------------------------------------------------------


def _safetensors_header(file: MappedFile) -> tuple[dict, int]:
    """The header, and the byte at which the numbers begin."""
    n = int.from_bytes(file.bytes(0, 8), "little")
    if n > MAX_JSON:
        raise ValueError(f"a safetensors header of {n} bytes (at most {MAX_JSON})")
    return parse_json(file.bytes(8, n)), 8 + n


def _checksum(name: str, entry: dict, numbers: object) -> str:
    """CRC-32 of a tensor's name, dtype, shape and numbers: eight hexadecimal digits."""
    start = zlib.crc32(f"{name} {entry['dtype']} {entry['shape']}".encode())
    return f"{zlib.crc32(numbers, start):08x}"


def _checksum_of_metadata(metadata: dict[str, str]) -> str:
    """The same of everything in the metadata but the checksums."""
    rest = {key: value for key, value in metadata.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def _read_safetensors(file: MappedFile, checked: bool = True) -> dict[str, Tensor]:
    header, start = _safetensors_header(file)
    metadata = header.pop("__metadata__", {})
    ours = "crc32" in metadata
    checksums = metadata["crc32"].split(" ") if ours else [""] * (1 + len(header))
    if len(checksums) != 1 + len(header) or ours and checksums[0] != _checksum_of_metadata(metadata):
        raise ValueError("damaged: the checksum of its metadata does not match")
    tensors = {}
    end = 0
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    for (name, entry), checksum in zip(in_order, checksums[1:]):
        dtype = DTYPES.get(entry["dtype"])
        begin, stop = entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{show(name)} has the unknown dtype {show(entry['dtype'])}")
        if begin != end:  # tensors are end to end: no overlap, no hole
            raise ValueError(f"{show(name)} begins at {show(begin)}, the one before it ends at {end}")
        tensors[name] = file.tensor(dtype, start + end, entry["shape"])
        end += tensors[name].nbytes
        if stop != end:
            raise ValueError(f"{show(name)} ends at {show(stop)}, but its shape and dtype say {end}")
        if ours and checked and checksum != _checksum(name, entry, file.view(start + begin, end - begin)):
            raise ValueError(f"damaged: the checksum of {show(name)} does not match")
    if start + end != file.size:
        raise ValueError(f"the header accounts for {start + end} bytes, the file has {file.size}")
    return {name: tensors[name] for name in header}


def save_tensors(
    path: str | Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    previous: Path | None = None,
) -> None:
    """Writes a safetensors file, atomically and one tensor at a time. Tensors may be on any device; if some
    are divided among ranks, all ranks call this, and rank 0 writes.

    previous: where the old file is kept. dtype: what float32 tensors become on disk (None: they stay). To
    halve a folder of weights:

        for file in Path("model").rglob("*.safetensors"):
            save_tensors(file, read_tensors(file), dtype=torch.float16)"""
    stored = {name: dtype if dtype and t.dtype == torch.float32 else t.dtype for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: -stored[name].itemsize)  # keeps every tensor aligned
    table = {name: (stored[name], list(tensors[name].shape)) for name in order}
    numbers = (whole(tensors[name]) for name in order)
    if rank() == 0 or not is_divided(tensors.values()):
        _write_safetensors(path, table, numbers, metadata, previous)
    _drain(numbers)


def _write_safetensors(
    path: str | Path,
    table: dict[str, tuple[torch.dtype, list[int]]],
    tensors: Iterable[Tensor],
    metadata: dict[str, str] | None = None,
    previous: Path | None = None,
) -> None:
    """table: what the file will hold, {name: (dtype, shape)}; tensors: these, each when its turn comes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    metadata = {"format": "pt", **(metadata or {})}
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in table.items():
        assert dtype in names, f"{name}: safetensors has no name for {dtype}"
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, end]}

    def head(checksums: list[str]) -> bytes:
        metadata["crc32"] = " ".join([_checksum_of_metadata(metadata), *checksums])
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        assert len(text) <= MAX_JSON, f"the header of {path} would have {len(text)} bytes, at most {MAX_JSON}"
        return len(text).to_bytes(8, "little") + text

    def write(file: BinaryIO) -> None:
        file.write(head(["00000000"] * len(table)))
        checksums = []
        for (name, (dtype, _)), tensor in zip(table.items(), tensors):
            tensor = tensor.detach().to("cpu", dtype).contiguous()
            numbers = tensor.reshape(-1).view(torch.uint8).numpy()
            checksums.append(_checksum(name, header[name], numbers))
            file.write(numbers)
        file.seek(0)
        file.write(head(checksums))  # as long as before

    stream_atomic(path, write, previous=previous)


# ---- A model, whole or divided among ranks, as Hugging Face's folder ---------------------------------------

INDEX = "model.safetensors.index.json"


def is_divided(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank has a part of one of these (a DTensor of torch.distributed.tensor, whose import takes
    long)."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is divided: then all ranks call this."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor


def takes_part(model: nn.Module) -> bool:
    """Whether this process has to call what saves `model`: rank 0, and all if it is divided among them."""
    return rank() == 0 or is_divided(model.parameters())


def _drain(numbers: Iterator) -> None:
    """A rank that writes nothing takes part in gathering what others write."""
    for _ in numbers:
        continue


def save_model(folder: str | Path, tensors: dict[str, Tensor], max_shard_size: int = 5_000_000_000) -> None:
    """Writes folder/model.safetensors, or if that had more bytes than max_shard_size, files of at most so
    many (but for a tensor that is larger) and an index, as Hugging Face's libraries do.

    If the tensors are divided among ranks, all ranks call this; each writes its share of the files, and has
    at most two tensors whole at a time."""
    folder = Path(folder)
    files = _split(tensors, max_shard_size)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    together = is_divided(tensors.values())
    if len(files) > 1 and rank() == 0:
        for old in (INDEX, "model.safetensors"):  # of other weights
            (folder / old).unlink(missing_ok=True)
    ranks, me = (world_size(), rank()) if together else (1, 0)
    for first in range(0, len(files), ranks):
        wave = files[first : first + ranks]  # one for each rank
        numbers = _gathered(tensors, wave, me)
        if me < len(wave):
            table = {name: (tensors[name].dtype, list(tensors[name].shape)) for name in wave[me]}
            _write_safetensors(folder / names[first + me], table, numbers)
        _drain(numbers)
    if together:
        barrier()  # all files are there before the index says so
    if rank() == 0:
        if len(files) > 1:
            place = {name: file for file, some in zip(names, files) for name in some}
            total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
        for old in {*folder.glob("model-*-of-*.safetensors"), folder / INDEX}:
            if len(files) == 1 or old.name not in (*names, INDEX):
                old.unlink(missing_ok=True)


def _split(tensors: dict[str, Tensor], most: int) -> list[list[str]]:
    """The names of each file, in order of size of their numbers, which keeps every tensor aligned."""
    files: list[list[str]] = [[]]
    room = most
    for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
        size = tensors[name].numel() * tensors[name].dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def _gathered(tensors: dict[str, Tensor], wave: list[list[str]], me: int) -> Iterator[Tensor]:
    """The tensors of file `me` of a wave, in order. All ranks gather the first tensor of each file, then the
    second of each: so all write at the same time."""
    for i in range(max(map(len, wave))):
        mine = None
        for owner, names in enumerate(wave):
            if i < len(names):
                found = whole(tensors[names[i]])
                mine = found if owner == me else mine
        if mine is not None:
            yield mine


# ---- Any file ----------------------------------------------------------------------------------------------

FOLDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
NOT_WEIGHTS = {
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file itself (git lfs pull)",
    rb"\s*<": "a web page; the download went wrong",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\]\0\0|x[\x01\x5e\x9c\xda]": "compressed; unpack it first (joblib: compress=0)",
}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a weight file, an index of shards (*.index.json), or a folder with one of FOLDER.

    Of a file that holds more than weights, only the weights: "model" of a fairseq checkpoint, "generator" of
    a vocoder's, the fitted arrays of a scikit-learn estimator. The format follows from the content. The
    tensors are views of a memory map: replacing the file, as our writers do, is harmless; truncating it under
    a running program is not. Raises OSError, or ValueError with one line that begins with the path."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: no weights in this folder; looked for {', '.join(FOLDER)}")
        path = found[0]
    return _read_shards(path) if path.name.endswith(".index.json") else _read_weights(path)


def read_checkpoint(path: str | Path) -> object:
    """All that one file holds: dicts, lists, numbers, strings and tensors (views of a map).

    Objects of foreign classes are Inert: a Namespace is a dict of its attributes, an enum has .args."""
    with one_line(path):
        file = MappedFile(Path(path))
        start = file.bytes(0, min(file.size, 32))
        if start[8:9] == b"{":
            return _read_safetensors(file)
        if start.startswith(b"PK\3\4"):
            return read_zip(file)
        if start.startswith(b"\x80"):
            return read_pickle(file)
        for pattern, why in NOT_WEIGHTS.items():
            if re.match(pattern, start):
                raise ValueError(why)
        raise ValueError("not a weight file (safetensors, torch.save or joblib)")


def _read_weights(path: Path) -> dict[str, Tensor]:
    table = read_checkpoint(path)
    with one_line(path):
        if isinstance(table, Inert):
            table = {name: value for name, value in table.items() if isinstance(value, Tensor)} or None
        for key in ("model", "generator", "state_dict"):
            if isinstance(table, dict) and isinstance(table.get(key), dict):
                table = table[key]
        if not isinstance(table, dict):
            raise ValueError("holds no table of tensors")
        for name, value in table.items():
            if type(name) is not str or not isinstance(value, Tensor):
                raise ValueError(f"{show(name)} is no tensor but a {type(value).__name__}")
        # Tensors of a pickle may share numbers, as tied ones do. Hundreds of them would be a small file that
        # asks for the machine's memory.
        total, size = sum(tensor.nbytes for tensor in table.values()), path.stat().st_size
        if total > 4 * size:
            raise ValueError(f"its tensors have {total} bytes, the file {size}: they share their numbers")
        return table


def _read_shards(index: Path) -> dict[str, Tensor]:
    """`index` maps each tensor's name to the file that holds it: {"weight_map": {name: file}}."""
    table = read_json(index)
    files: dict[str, set[str]] = {}
    with one_line(index):
        for name, file in table["weight_map"].items():
            if not re.fullmatch(r"[\w-][\w.-]*", file):
                raise ValueError(f"{show(file)} is not the plain name of a file in the folder of the index")
            files.setdefault(file, set()).add(name)
    tensors = {}
    for file, names in files.items():
        shard = _read_weights(index.parent / file)
        if shard.keys() != names:
            name = min(shard.keys() ^ names)
            raise ValueError(f"{index}: {file} {'lacks' if name in names else 'also holds'} {show(name)}")
        tensors |= shard
    return tensors


# ---- Into a module -----------------------------------------------------------------------------------------


@torch.no_grad()
def assign(
    module: nn.Module,
    tensors: dict[str, Tensor],
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fills every parameter and persistent buffer of `module` from `tensors`, and uses every tensor.

    dtype: what floating-point weights become (None: what the module has); device: where they go (None: where
    the module is, or the CPU for one built on meta). Converts one tensor at a time, so the peak is the module
    plus one tensor. Weights tied in the module may be given under one of their names or all. A missing,
    unused or misshapen tensor, or one that is not finite, is a ValueError that names it and `source`; the
    module is then untouched."""
    wanted = module.state_dict(keep_vars=True)  # a tied weight appears under each of its names
    given = {id(weight) for name, weight in wanted.items() if name in tensors}
    for name, weight in wanted.items():
        if id(weight) not in given:
            raise ValueError(f"{source}: {name} {show(weight.shape)} is missing")
    tied: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in wanted:
            place = type(module).__name__
            raise ValueError(f"{source}: {show(name)} {show(tensor.shape)} has no place in {place}")
        weight = wanted[name]
        check_weight(f"{source}: {name}", tensor, weight, dtype)
        twin = tied.setdefault(id(weight), tensor)
        if twin is not tensor and not torch.equal(twin, tensor):
            raise ValueError(f"{source}: {name} differs from the weight that it is tied to")
    for name, tensor in tensors.items():
        weight = wanted[name]
        to = (dtype or weight.dtype) if weight.is_floating_point() else weight.dtype
        on = torch.device(device or ("cpu" if weight.is_meta else weight.device))
        if (to, on) == (weight.dtype, weight.device):
            weight.copy_(tensor)
            continue
        new = tensor.to(on, to, copy=True)  # the copy lets go of the map
        if isinstance(weight, nn.Parameter):
            new = nn.Parameter(new, weight.requires_grad)
        torch.utils.swap_tensors(weight, new)  # keeps the object, and with it every tie


def check_weight(place: str, tensor: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """ValueError, one line that begins with `place`, unless `tensor` can become `weight` and is finite, also
    as `dtype` (None: of `weight`)."""
    if weight.shape != tensor.shape:
        raise ValueError(f"{place} is {show(tensor.shape)}, expected {show(weight.shape)}")
    if weight.is_floating_point() != tensor.is_floating_point():
        raise ValueError(f"{place} is {tensor.dtype}, expected {weight.dtype}")
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch compares no float8
    ends = torch.stack(values.aminmax())  # both NaN if any number is: one pass, no memory
    if not ends.isfinite().all():
        raise ValueError(f"{place} holds NaN or infinity: it was damaged in training or on its way")
    if not ends.to(dtype or weight.dtype).isfinite().all():
        raise ValueError(f"{place} holds numbers too large for {dtype or weight.dtype}; use another dtype")


# ---- Training state: all that an interrupted run needs to continue as if it had not stopped ----------------
#
# A safetensors file with names that begin with a module's or an optimizer's, and the rest in its metadata:
#
#     generator.conv.weight                a weight or buffer
#     adamw.exp_avg.generator.conv.weight  what an optimizer keeps for that weight: here its first moment
#     adamw.untouched.critic.bias          it keeps nothing yet: no step has changed that weight
#     "state"                              JSON: the step, and what else the caller wants to find again
#     "tensors"                            how many there are
#
# The state saved before the last one is kept beside it, in case that the last one is damaged.

Modules = dict[str, nn.Module | dict[str, nn.Parameter]]
Optimizers = dict[str, torch.optim.Optimizer]
UNTOUCHED = "untouched"


def save_training(path: str | Path, modules: Modules, optimizers: Optimizers, meta: dict) -> None:
    """Writes the weights of `modules`, the state of `optimizers` and `meta` (JSON types, with a "step") as
    one file, atomically, and keeps the one that was there. Every parameter of an optimizer belongs to one of
    the modules, which names it."""
    assert _is_step(meta["step"]), f"step is {meta['step']!r}, not a whole number >= 0"
    save_state(path, training_tensors(modules, optimizers), meta, _beside(path, "previous"))


def training_tensors(modules: Modules, optimizers: Optimizers) -> dict[str, Tensor]:
    """All that a state holds: weights, and what the optimizers keep of them."""
    weights = named_weights(modules, optimizers)
    tensors = dict(weights)
    for name, optimizer in optimizers.items():
        mine = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for key, weight in weights.items():
            kept = _tensors(optimizer.state.get(weight, {}))
            for slot, value in kept.items():
                tensors[f"{name}.{slot}.{key}"] = value
            if not kept and id(weight) in mine:
                tensors[f"{name}.{UNTOUCHED}.{key}"] = torch.ones(1, dtype=torch.uint8)
    return tensors


def _beside(path: str | Path, what: str) -> Path:
    """state.safetensors -> state.previous.safetensors"""
    return Path(path).with_suffix(f".{what}{Path(path).suffix}")


def training_files(path: str | Path) -> list[Path]:
    """The states there are to go on from, the last one first."""
    return [file for file in (Path(path), _beside(path, "previous")) if file.exists()]


def has_training(path: str | Path) -> bool:
    """Whether there is a state to go on from."""
    return bool(training_files(path))


def remove_training(path: str | Path) -> None:
    """Of a run that is finished."""
    for file in (Path(path), _beside(path, "previous"), _beside(path, "damaged")):
        file.unlink(missing_ok=True)


def training_meta(path: str | Path) -> dict:
    """The `meta` of the state that load_training will take if it fits; {} if none can be read."""
    for file in (Path(path), _beside(path, "previous")):
        with contextlib.suppress(ValueError, FileNotFoundError):
            meta = load_state(file)[1]
            if isinstance(meta, dict):
                return meta
    return {}


@torch.no_grad()
def load_training(
    path: str | Path, modules: Modules, optimizers: Optimizers, steps: int | None = None
) -> dict:
    """Puts back what save_training wrote, to the last bit, and returns its `meta`.

    Every tensor must have exactly the shape and dtype of its weight, or those that the optimizer itself would
    make (a fused optimizer writes beyond the end of a moment that is too small); none may be missing or left
    over, none NaN or infinite, and the step not beyond `steps`. A state that is not so is put aside, and the
    one before it is taken. If there is none, a ValueError of one line says to delete the folder, and nothing
    is changed."""
    path = Path(path)
    weights = named_weights(modules, optimizers)
    kept = {name: moments(optimizer) for name, optimizer in optimizers.items()}
    problem: Exception | None = None
    for file in (path, _beside(path, "previous")):
        try:
            tensors, meta = load_state(file)
            with one_line(file):
                check_step(meta, steps)
                states = _fit(tensors, weights, kept)
            break
        except (ValueError, FileNotFoundError) as error:
            if problem is None or isinstance(problem, FileNotFoundError):
                problem = error
    else:
        if isinstance(problem, FileNotFoundError):
            raise problem
        raise ValueError(f"{problem}; delete {path.parent} to begin anew") from None
    if problem and path.exists() and rank() == 0:
        with contextlib.suppress(OSError):  # Windows renames no file that another process reads
            os.replace(path, _beside(path, "damaged"))
        print(f"{problem}; going on from the state before it, of step {meta['step']}", flush=True)
    for key, weight in weights.items():
        weight.copy_(tensors[key])
    for name, optimizer in optimizers.items():
        optimizer.state.clear()
        optimizer.state.update(states[name])
    return meta


def check_step(meta: dict, steps: int | None) -> None:
    """ValueError if a state is not of one of the steps 0 to `steps`."""
    if not _is_step(meta["step"]) or steps is not None and meta["step"] > steps:
        most = f"of 0 to {steps}" if steps is not None else ">= 0"
        raise ValueError(f"step is {show(meta['step'])}, not a whole number {most}")


def _is_step(value: object) -> bool:
    return type(value) is int and value >= 0


def named_weights(modules: Modules, optimizers: Optimizers) -> dict[str, Tensor]:
    """Every weight and buffer once, under the first of its names."""
    weights: dict[str, Tensor] = {}
    seen = set()
    for part, module in modules.items():
        assert "." not in part and part not in optimizers, f"module {part}: no dot, no optimizer of that name"
        table = module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else module
        for name, weight in table.items():
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[f"{part}.{name}"] = weight
    for name, optimizer in optimizers.items():
        known = all(id(weight) in seen for group in optimizer.param_groups for weight in group["params"])
        assert known, f"the optimizer {name} has parameters of no module"
    return weights


def moments(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """The tensors (moments, step) that `optimizer` keeps for each of its parameters, but of one number each:
    found by one step of a copy of it on parameters of one number."""
    small = copy.copy(optimizer)
    small.state = defaultdict(dict)
    small.param_groups = []
    twins = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            twins[weight] = nn.Parameter(
                torch.zeros([1] * weight.ndim, dtype=weight.dtype, device=weight.device)
            )
            twins[weight].grad = torch.zeros_like(twins[weight])
        small.param_groups.append({**group, "params": [twins[weight] for weight in group["params"]]})
    small.step()
    return {weight: _tensors(small.state[twin]) for weight, twin in twins.items()}


def _tensors(state: dict[str, object]) -> dict[str, Tensor]:
    return {slot: value for slot, value in state.items() if isinstance(value, Tensor)}


def _fit(tensors: dict[str, Tensor], weights: dict[str, Tensor], kept: dict[str, dict]) -> dict[str, dict]:
    """The state of each optimizer, made from `tensors`; ValueError unless these and the weights are all."""
    left = dict(tensors)
    for key, weight in weights.items():
        _check(key, left.pop(key, None), weight.shape, weight.dtype)
    keys = {id(weight): key for key, weight in weights.items()}
    states: dict[str, dict] = {name: {} for name in kept}
    for name, slots_of in kept.items():
        for weight, slots in slots_of.items():
            names = {slot: f"{name}.{slot}.{keys[id(weight)]}" for slot in slots}
            if left.pop(f"{name}.{UNTOUCHED}.{keys[id(weight)]}", None) is not None:
                continue
            states[name][weight] = {}
            for slot, small in slots.items():
                like = weight if small.ndim == weight.ndim else small  # the step is one number
                found = left.pop(names[slot], None)
                _check(names[slot], found, like.shape, small.dtype)
                made = torch.empty_like(like, dtype=small.dtype, device=small.device)
                states[name][weight][slot] = made.copy_(found)
    if left:
        raise ValueError(f"{show(min(left))} has no place in this run")
    return states


def _check(name: str, found: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
    if found is None:
        raise ValueError(f"{name} is missing")
    if (found.shape, found.dtype) != (shape, dtype):
        raise ValueError(f"{name} is {show(found.shape)} {found.dtype}, expected {show(shape)} {dtype}")
    if found.is_floating_point() and not found.isfinite().all():
        raise ValueError(f"{name} holds numbers that are NaN or infinite")


def save_state(
    path: str | Path, tensors: dict[str, Tensor], meta: dict, previous: Path | None = None
) -> None:
    """Tensors of any dtype; everything else (step, seeds, ...) as JSON in the header."""
    metadata = {"state": json.dumps(meta), "tensors": str(len(tensors))}
    save_tensors(path, tensors, metadata, previous=previous)


def load_state(path: str | Path, checked: bool = True) -> tuple[dict[str, Tensor], dict]:
    """What save_state wrote: the tensors are views of the file as it is now, replaced or not; and `meta`.
    checked=False: of the tensors' numbers nothing is read yet, and no checksum compared."""
    with one_line(path):
        file = MappedFile(Path(path))
        header, _ = _safetensors_header(file)
        metadata = header["__metadata__"]
        tensors = _read_safetensors(file, checked)
        if metadata["tensors"] != str(len(tensors)):
            raise ValueError(f"holds {len(tensors)} tensors instead of {show(metadata['tensors'])}")
        return tensors, parse_json(metadata["state"].encode())
