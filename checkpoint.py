"""Weights on disk: reads ours and other people's without ever running them, writes ours whole or not at all.

A checkpoint is a table of names and tensors. The format we write, safetensors, is nothing else than that:

    8 bytes   n, the length of the header (little endian)
    n bytes   JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest  the numbers of all tensors, end to end

    >>> save_tensors("a.safetensors", {"w": torch.eye(2)})
    >>> read_tensors("a.safetensors")
    {'w': tensor([[1., 0.], [0., 1.]])}

Every tensor we hand out is a view of a memory map, checked against the true size of the file before it is
made: 27 GB of weights cost no memory until they are touched, and clean pages of the map can be dropped by the
kernel at any time. `assign` then converts them into a module one by one. A file that is damaged, or that lies,
is a ValueError of one line.

References: https://github.com/huggingface/safetensors (format)
"""

import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

MAX_JSON = 16 << 20       # bytes of a JSON file or header; the index of the largest LLaMA has 0.1 MB
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8}


# ---- the map: the one place where bytes of a file become a tensor --------------------------------

class MappedFile:
    """A regular file mapped into memory. Writing to one of its tensors never changes the file."""

    def __init__(self, path: Path):
        if not stat.S_ISREG(os.stat(path).st_mode):       # a pipe or a device would block or never end
            raise ValueError("not a regular file")
        with open(path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            if self.size == 0:
                raise ValueError("the file is empty")
            self.map = mmap.mmap(f.fileno(), self.size, **_map_flags())

    def bytes(self, start: int, n: int) -> bytes:
        self.check(start, n)
        return self.map[start:start + n]

    def check(self, start: int, n: int) -> None:
        if not 0 <= start <= start + n <= self.size:
            raise ValueError(f"{n} bytes at {start} lie outside the file of {self.size} bytes (truncated?)")

    def tensor(self, dtype: torch.dtype, start: int, shape: Iterable[int]) -> Tensor:
        """The contiguous tensor whose numbers begin at byte `start`: a view of the map."""
        shape = tuple(shape)
        if not all(type(n) is int and 0 <= n < 2**48 for n in shape) or len(shape) > 16:
            raise ValueError(f"impossible shape {_show(shape)}")
        count = math.prod(shape)
        self.check(start, count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:                           # any byte but 0 and 1 would be a broken bool
            return self.tensor(torch.uint8, start, shape).ne(0)
        if start % dtype.itemsize:                        # misaligned, in old files: must be copied
            raw = torch.frombuffer(self.map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=start).view(shape)


def _map_flags() -> dict[str, int]:
    if not hasattr(mmap, "MAP_PRIVATE"):                  # Windows
        return {"access": mmap.ACCESS_COPY}
    # Linux counts a private writable map as memory that might all be needed, and would refuse 27 GB on a
    # small machine; NORESERVE says that it will not be.
    noreserve = 0x4000 if sys.platform == "linux" else 0
    return {"flags": mmap.MAP_PRIVATE | noreserve, "prot": mmap.PROT_READ | mmap.PROT_WRITE}


# ---- safetensors ---------------------------------------------------------------------------------

def _safetensors_header(file: MappedFile) -> tuple[dict, int]:
    """The JSON header and the byte at which the numbers begin."""
    n = int.from_bytes(file.bytes(0, 8), "little")
    if n > MAX_JSON:
        raise ValueError(f"a safetensors header of {n} bytes (at most {MAX_JSON})")
    header = _parse_json(file.bytes(8, n))
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is no JSON object")
    return header, 8 + n


def _read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    header, start = _safetensors_header(file)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{_show(name)} has the unknown dtype {_show(entry['dtype'])}")
        if begin != end:                                  # tensors lie end to end: no overlap, no hole
            raise ValueError(f"{_show(name)} begins at {_show(begin)}, the one before it ends at {end}")
        tensors[name] = file.tensor(dtype, start + begin, shape)
        end += tensors[name].nbytes
        if stop != end:
            raise ValueError(f"{_show(name)} ends at {_show(stop)}, but its shape and dtype say {end}")
    if start + end != file.size:
        raise ValueError(f"the header accounts for {start + end} bytes, the file has {file.size}")
    return {name: tensors[name] for name in header}


# ---- any file ------------------------------------------------------------------------------------

FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
          "pytorch_model.bin.index.json", "adapter_model.safetensors", "adapter_model.bin")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a weight file, an index of shards (*.index.json), or a folder with one of FOLDER.

    The format is told from the content. The tensors are views of a memory map: truncating the file under a
    running program kills it, replacing the file (as all our writers do) is harmless.
    Raises FileNotFoundError, OSError, or ValueError with one line that begins with the path."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: no weights in this folder; looked for {', '.join(FOLDER)}")
        path = found[0]
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with _one_line(path):
        return _read_safetensors(MappedFile(path))


def _read_shards(index: Path) -> dict[str, Tensor]:
    """`index` maps each tensor's name to the file beside it that holds it: {"weight_map": {name: file}}."""
    table = read_json(index)
    with _one_line(index):
        files: dict[str, set[str]] = {}
        for name, file in table["weight_map"].items():
            if file != Path(file).name or "\\" in file or file in ("", "..") or file.endswith(".index.json"):
                raise ValueError(f"{_show(file)} is not the plain name of a file beside the index")
            files.setdefault(file, set()).add(name)
    tensors = {}
    for file, names in files.items():
        shard = read_tensors(index.parent / file)
        if shard.keys() != names:
            name = min(shard.keys() ^ names)
            where = "lacks" if name in names else "holds unannounced"
            raise ValueError(f"{index}: {file} {where} {_show(name)}")
        tensors |= shard
    return tensors


# ---- into a module -------------------------------------------------------------------------------

@torch.no_grad()
def assign(module: nn.Module, tensors: dict[str, Tensor], source: str | Path,
           dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
    """Fills every parameter and persistent buffer of `module` from `tensors`, and uses every tensor.

    dtype: what floating-point weights become (None: what the module has); device: where they go (None: where
    the module is, or the CPU for one built on meta). Converts one tensor at a time, so the peak is the module
    plus one tensor. Weights tied in the module may be given under one of their names or all. A missing, unused
    or wrongly shaped tensor is a ValueError that names it and `source`; the module is then untouched."""
    wanted = module.state_dict(keep_vars=True)            # a tied weight appears under each of its names
    given = {id(weight) for name, weight in wanted.items() if name in tensors}
    for name, weight in wanted.items():
        if id(weight) not in given:
            raise ValueError(f"{source}: {name} {_show(weight.shape)} is missing")
    for name, tensor in tensors.items():
        if name not in wanted:
            place = type(module).__name__
            raise ValueError(f"{source}: {_show(name)} {_show(tensor.shape)} has no place in {place}")
        weight = wanted[name]
        if weight.shape != tensor.shape:
            raise ValueError(f"{source}: {name} is {_show(tensor.shape)}, expected {_show(weight.shape)}")
        if weight.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected {weight.dtype}")
    for name, tensor in tensors.items():
        weight = wanted[name]
        to = (dtype or weight.dtype) if weight.is_floating_point() else weight.dtype
        on = torch.device(device or ("cpu" if weight.is_meta else weight.device))
        if (to, on) == (weight.dtype, weight.device):
            weight.copy_(tensor)
            continue
        new = tensor.to(on, to, copy=True)                # the copy lets go of the map
        if isinstance(weight, nn.Parameter):
            new = nn.Parameter(new, weight.requires_grad)
        torch.utils.swap_tensors(weight, new)             # keeps the object, and with it every tie


# ---- writing -------------------------------------------------------------------------------------

def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes a file that is, at every moment and after every crash, either the old one or the new one.

    A failure (full disk, no permission) is an OSError that names the file; nothing of the attempt remains."""
    _replace(path, lambda file: file.write(data))


def _replace(path: str | Path, write: Callable) -> None:
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp")
    try:
        temp.unlink(missing_ok=True)                      # left by a process that was killed
        with open(temp, "xb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())                   # the content is on disk before its name
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(temp)):
                    raise OSError("another process is writing the same file")
                os.replace(temp, path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise (OSError(e.errno, e.strerror, str(path)) if e.errno else OSError(f"{path}: {e}")) from None


def save_tensors(path: str | Path, tensors: dict[str, Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, atomically and one tensor at a time. Tensors may be on any device."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    assert "__metadata__" not in tensors
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)   # keeps every tensor aligned
    end = 0
    for name in order:
        t = tensors[name]
        span = [end, end + t.nbytes]
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": span}
        end += t.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    assert len(head) <= MAX_JSON, f"the header of {path} would have {len(head)} bytes, at most {MAX_JSON}"

    def write(file) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    _replace(path, write)


def save_state(path: str | Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """A training state: tensors of any dtype; everything else (step, seeds, ...) as JSON in the header."""
    save_tensors(path, tensors, {"state": json.dumps(meta)})


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What save_state wrote. The tensors are copies: training changes them and the file is soon replaced."""
    path = Path(path)
    tensors = read_tensors(path)
    with _one_line(path):
        header, _ = _safetensors_header(MappedFile(path))
        meta = _parse_json(header["__metadata__"]["state"].encode())
    return {name: t.clone() for name, t in tensors.items()}, meta


# ---- JSON, and errors of one line ----------------------------------------------------------------

def write_json(path: str | Path, obj: object) -> None:
    write_atomic(path, (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path, max_bytes: int = MAX_JSON) -> object:
    """Parses a JSON file of at most max_bytes. Damaged, too large or too deep: ValueError, one line."""
    with _one_line(path):
        file = MappedFile(Path(path))
        if file.size > max_bytes:
            raise ValueError(f"{file.size} bytes of JSON (at most {max_bytes})")
        return _parse_json(file.bytes(0, file.size))


def _parse_json(data: bytes) -> object:
    return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) != len(pairs):                          # two readers might take different ones
        raise ValueError("JSON with the same key twice")
    return table


def _show(x: object) -> str:
    """Something found in a file, made harmless: one line of ASCII, not long."""
    if isinstance(x, torch.Size):
        x = list(x)
    text = ascii(x) if isinstance(x, str | int | float | list | tuple) else type(x).__name__
    return text if len(text) <= 100 else text[:97] + "..."


@contextmanager
def _one_line(path: str | Path):
    """Whatever goes wrong with the content of `path` becomes a ValueError of one line that names it.

    Strangers wrote it: a parser can fail in more ways than can be listed, and all of them mean a bad file."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        if isinstance(e, ValueError) and str(e).startswith(f"{path}: "):
            raise
        why = " ".join(str(e).split())[:300]
        what = why if type(e) is ValueError else f"damaged or not what it claims ({type(e).__name__}: {why})"
        raise ValueError(f"{path}: {what}") from None
