"""Weights on disk: reads ours and other people's without ever running them, writes ours whole or not at all.

A checkpoint is a table of names and tensors. The format we write, safetensors, is nothing else than that:

    8 bytes   n, the length of the header (little endian)
    n bytes   JSON {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest  the numbers of all tensors, end to end

    >>> save_tensors("a.safetensors", {"w": torch.eye(2)})
    >>> read_tensors("a.safetensors")
    {'w': tensor([[1., 0.], [0., 1.]])}

The older formats (torch.save, fairseq, joblib) are pickles, and a pickle is a program. Here a small machine runs it
that knows the opcodes which build data and has none that runs anything: see "Pickle, read as data".

Whatever the format, a tensor is a view of a memory map, checked against the true size of the file before it is
made: 27 GB of weights cost no memory until they are touched, and the kernel may drop clean pages of the map at any
time. `assign` then converts them into a module one by one. A file that is damaged, or lies, is a ValueError of one
line. Damage inside the numbers is seen only by the checksums of a zip (of records up to MAX_CRC: more would mean to
read 27 GB once more); the other formats have none.

References: safetensors, https://github.com/huggingface/safetensors
            pickle opcodes, Lib/pickletools.py of Python
            torch.save, torch/serialization.py and caffe2/serialize/inline_container.h of PyTorch
            zip, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import json
import math
import mmap
import os
import pickletools
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

# Bounds far above any honest file, so that a dishonest one costs little.
MAX_JSON = 16 << 20  # bytes; the index of the largest LLaMA has 0.1 MB
MAX_PICKLE = 64 << 20  # bytes without the tensors; SpeechGPT-7B has 0.05 MB
MAX_STEPS = 250_000  # of the pickle machine; SpeechGPT-7B has 10,000
MAX_RECORDS = 100_000  # in a zip archive; SpeechGPT-7B has 330
MAX_CRC = 16 << 20  # bytes of a zip record whose checksum is verified: all but the matrices of an LLM

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
}
TORCH = {str(dtype).replace(".", " "): dtype for dtype in DTYPES.values()}  # "torch float32"
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
NUMPY = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "b1": torch.bool,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u8": torch.uint64,
    "u4": torch.uint32,
    "u2": torch.uint16,
    "u1": torch.uint8,
}


# ---- The map: the one place where bytes of a file become a tensor --------------------------------


class MappedFile:
    """A regular file mapped into memory. Writing to one of its tensors never changes the file."""

    def __init__(self, path: Path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block or never end
            raise ValueError("not a regular file")
        with open(path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            if self.size == 0:
                raise ValueError("the file is empty")
            self.map = mmap.mmap(f.fileno(), self.size, **_map_flags())

    def check(self, start: int, n: int) -> None:
        if not 0 <= start <= start + n <= self.size:
            raise ValueError(f"{n} bytes at {start} lie outside the file of {self.size} bytes (truncated?)")

    def bytes(self, start: int, n: int) -> bytes:
        self.check(start, n)
        return self.map[start : start + n]

    def verify(self, crc: int, start: int, n: int) -> None:
        if (
            crc and n <= MAX_CRC and zlib.crc32(self.bytes(start, n)) != crc
        ):  # 0: torch was told not to compute it
            raise ValueError(f"damaged: the checksum of {n} bytes at {start} does not match")

    def unpack(self, layout: str, start: int) -> tuple:
        return struct.unpack(layout, self.bytes(start, struct.calcsize(layout)))

    def tensor(self, dtype: torch.dtype, start: int, shape: tuple | list) -> Tensor:
        """The contiguous tensor whose numbers begin at byte `start`: a view of the map, aligned or not."""
        if len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise ValueError(f"impossible shape {_show(shape)}")
        count = math.prod(shape)
        self.check(start, count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:  # a bool of any byte but 0 and 1 would be a broken one
            return self.tensor(torch.uint8, start, shape).ne(0)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=start).view(shape)


def _map_flags() -> dict[str, int]:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return {"access": mmap.ACCESS_COPY}
    # Linux counts a private writable map as memory that might all be needed, and would refuse 27 GB on a small
    # machine; NORESERVE (no name in Python before 3.13) says that it will not be.
    noreserve = 0x4000 if sys.platform == "linux" else 0
    return {"flags": mmap.MAP_PRIVATE | noreserve, "prot": mmap.PROT_READ | mmap.PROT_WRITE}


# ---- Safetensors ---------------------------------------------------------------------------------


def _safetensors_header(file: MappedFile) -> tuple[dict, int]:
    """The header, and the byte at which the numbers begin."""
    n = int.from_bytes(file.bytes(0, 8), "little")
    if n > MAX_JSON:
        raise ValueError(f"a safetensors header of {n} bytes (at most {MAX_JSON})")
    return _parse_json(file.bytes(8, n)), 8 + n


def _read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    header, start = _safetensors_header(file)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{_show(name)} has the unknown dtype {_show(entry['dtype'])}")
        if begin != end:  # tensors lie end to end: no overlap, no hole
            raise ValueError(f"{_show(name)} begins at {_show(begin)}, the one before it ends at {end}")
        tensors[name] = file.tensor(dtype, start + end, shape)
        end += tensors[name].nbytes
        if stop != end:
            raise ValueError(f"{_show(name)} ends at {_show(stop)}, but its shape and dtype say {end}")
    if start + end != file.size:
        raise ValueError(f"the header accounts for {start + end} bytes, the file has {file.size}")
    return {name: tensors[name] for name in header}


# ---- Pickle, read as data ------------------------------------------------------------------------
#
# A pickle is a program for a stack machine. {"w": 7} is
#
#     80 02  PROTO 2      7d  EMPTY_DICT      58 01000000 77  BINUNICODE "w"      4b 07  BININT1 7
#     73     SETITEM: pops 7 and "w", puts them into the dict below               2e     STOP: the top is the result
#
# Two opcodes make it dangerous in Python: GLOBAL imports a module and fetches a name from it, and REDUCE calls what
# was fetched. Here GLOBAL compares the name with two lists, refuses what is in neither, and pushes only the name;
# REDUCE calls functions of ours for the names of the first list, and makes an Inert for those of the second.


def _strided(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """What torch makes of a flat storage: element (i, j, ..) is storage[offset + i stride[0] + j stride[1] + ..]."""
    fits = len(size) == len(stride) <= 16
    if not fits or not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride)):
        raise ValueError(
            f"impossible tensor: offset {_show(offset)}, size {_show(size)}, stride {_show(stride)}"
        )
    count = math.prod(size)
    if count == 0:
        return storage.new_empty(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if max(count - 1, last) >= storage.numel():
        raise ValueError(f"a tensor {_show(size)} does not fit its storage of {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset)


CALLABLE = {
    "torch._utils _rebuild_tensor": _strided,
    "torch._utils _rebuild_tensor_v2": _strided,
    "torch._utils _rebuild_tensor_v3": lambda storage, offset, size, stride, _grad, _hooks, dtype, *_: (
        _strided(storage.view(TORCH[dtype.name]), offset, size, stride)
    ),
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda size: size,
    "collections OrderedDict": lambda: {},
    "collections defaultdict": lambda *_: {},
}
INERT = re.compile(
    r"argparse Namespace|typing Any|collections Counter|_codecs encode|(fairseq|omegaconf|sklearn)(\.\w+)* [A-Z]\w*"
    r"|joblib\.numpy_pickle NumpyArrayWrapper|numpy (ndarray|dtype)|numpy\._?core\.multiarray (scalar|_reconstruct)"
    r"|numpy\.random\._pickle \w+_ctor|numpy\.random\._mt19937 MT19937"
    r"|torch (device|bool|b?float\d+\w*|u?int\d+|\w+Storage)|torch\.storage \w+Storage"
    r"|(builtins|__builtin__) (object|bool|int|long|float|complex|str|unicode|bytes|bytearray|tuple|list|dict|set"
    r"|frozenset)",
    re.ASCII,
)
LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
# A set becomes a list: to hash what a stranger has composed can take for ever.
FRESH = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}


class Global:
    """A name that a pickle asked for, "module name": allowed, never looked up."""

    def __init__(self, name: str):
        if len(name) > 200 or name not in CALLABLE and not INERT.fullmatch(name):
            raise ValueError(
                f"refused: its pickle asks for {_show(name.replace(' ', '.'))}, which is not among the "
                "names that weights need (CALLABLE and INERT in checkpoint.py)"
            )
        self.name = name


class Inert(dict):
    """Stands for an object of somebody else's class: a dict of its attributes, with its class and arguments."""

    def __init__(self, name: str, args: tuple):
        super().__init__()
        self.name, self.args = name, args


class Stream:
    """The pickle in bytes [at, end) of a file, in the shape that pickletools reads. Counts what is read."""

    def __init__(self, file: MappedFile, at: int, end: int):
        self.file, self.at, self.end, self.left = file, at, end, MAX_PICKLE

    def read(self, n: int) -> bytes:
        n = max(0, min(n, self.end - self.at))
        self.at, self.left = self.at + n, self.left - n
        if self.left < 0:
            raise ValueError(f"a pickle of more than {MAX_PICKLE} bytes")
        return self.file.bytes(self.at - n, n)

    def readline(self) -> bytes:  # only names are lines
        return self.read(self.file.map.find(b"\n", self.at, self.at + 1000) + 1 - self.at)


def _unpickle(stream: Stream, storage: Callable | None = None, array: Callable | None = None) -> object:
    """Runs one pickle. `storage(id)` is the tensor for a persistent id, `array(wrapper)` the one for joblib's."""
    stack, marks, memo, steps = [], [], {}, 0

    def since_mark() -> list:
        nonlocal stack
        items, stack = stack, marks.pop()
        return items

    for op, arg, _ in pickletools.genops(stream):
        steps += 1
        if steps > MAX_STEPS:
            raise ValueError(f"a pickle of more than {MAX_STEPS} steps")
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(arg)
            case name if name in FRESH:
                stack.append(FRESH[name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE" | "FROZENSET":
                items = since_mark()
                stack.append(tuple(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if op.name == "APPEND" else since_mark()
                if type(stack[-1]) is not list:
                    raise ValueError(f"the pickle appends to a {type(stack[-1]).__name__}")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if op.name == "SETITEM" else since_mark()
                if not isinstance(stack[-1], dict):
                    raise ValueError(f"the pickle puts items into a {type(stack[-1]).__name__}")
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if type(key) is not str and not (type(key) is int and abs(key) < 2**60):
                        raise ValueError(f"the pickle has a {type(key).__name__} as a key")
                    stack[-1][key] = value
            case "GLOBAL":
                stack.append(Global(arg))
            case "STACK_GLOBAL":
                module, name = stack.pop(-2), stack.pop()
                stack.append(Global(f"{module} {name}" if type(module) is type(name) is str else "?"))
            case "REDUCE" | "NEWOBJ":
                wanted, args = stack.pop(-2), stack.pop()
                if type(wanted) is not Global or type(args) is not tuple:
                    raise ValueError("the pickle calls something that is not a name")
                make = CALLABLE.get(wanted.name)
                stack.append(make(*args) if make else Inert(wanted.name, args))
            case "BUILD":  # gives the object below its attributes
                state, made = stack.pop(), stack[-1]
                if type(made) is Inert:
                    steps += len(state)  # copies: counted, or many could share a large one
                    made.update(state if isinstance(state, dict) else {"state": state})
                    if array and made.name == "joblib.numpy_pickle NumpyArrayWrapper":
                        stack[-1] = array(made)
                elif type(made) is not dict:  # the _metadata of an OrderedDict is dropped
                    raise ValueError(f"the pickle sets attributes of a {type(made).__name__}")
            case "BINPERSID" if storage:
                stack.append(storage(stack.pop()))
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"the pickle opcode {name} has no place in a checkpoint")


# ---- torch.save: a zip archive of a pickle and one record per storage ----------------------------
#
#     <root>/data.pkl    a tensor is REDUCE of _rebuild_tensor_v2 and (storage, offset, size, stride, ...); its
#                        storage is the persistent id ("storage", torch.FloatStorage, "0", "cpu", count)
#     <root>/data/0      the numbers of storage "0", not compressed: they can be mapped where they lie
#     <root>/byteorder   "little"


def _storage_id(id: tuple) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements from a storage's persistent id."""
    tag, kind, key, _device, count, *view = id
    dtype = STORAGES.get(kind.name.split(" ")[1])
    if (
        tag != "storage"
        or type(key) is not str
        or type(count) is not int
        or not dtype
        or view not in ([], [None])
    ):
        raise ValueError("a storage of an unknown kind")
    return key, dtype, count


def _storages(file: MappedFile, places: dict[str, tuple[int, int, int]]) -> Callable:
    """The function from persistent id to flat tensor, given first byte, size and CRC of each storage."""
    made: dict[str, Tensor] = {}

    def storage(id: tuple) -> Tensor:
        key, dtype, count = _storage_id(id)
        start, size, crc = places[key]
        if size != count * dtype.itemsize or (key in made and made[key].dtype != dtype):
            raise ValueError(f"storage {_show(key)} claims {_show(count)} numbers of {dtype} in {size} bytes")
        if key not in made:
            file.verify(crc, start, size)
            made[key] = file.tensor(dtype, start, [count])
        return made[key]

    return storage


def _read_zip(file: MappedFile) -> object:
    records = _zip_records(file)
    roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in records:
        raise ValueError(
            "a zip archive, but not one that torch.save wrote (TorchScript programs are not read)"
        )
    start, size, crc = records[f"{roots[0]}data.pkl"]
    if size > MAX_PICKLE:
        raise ValueError(f"a pickle of {size} bytes (at most {MAX_PICKLE})")
    file.verify(crc, start, size)
    order = records.get(f"{roots[0]}byteorder")
    if order and file.bytes(order[0], min(order[1], 9)) != b"little":
        raise ValueError("written on a big-endian machine, which is not read")
    data = f"{roots[0]}data/"
    places = {name.removeprefix(data): place for name, place in records.items() if name.startswith(data)}
    return _unpickle(Stream(file, start, start + size), _storages(file, places))


def _zip_records(file: MappedFile) -> dict[str, tuple[int, int, int]]:
    """Where each record of an uncompressed zip archive lies: {name: (first byte, size, CRC)}.

    The directory is near the end, its address in the last 22 bytes. A value that exceeds 32 bits is all ones there,
    and its true self in a longer ("zip64") structure."""
    magic, _, _, _, count, _, at, comment = file.unpack("<4s4H2LH", file.size - 22)
    if magic != b"PK\5\6" or comment:
        raise ValueError("the zip archive has no directory at its end (truncated?)")
    if count == 0xFFFF or at == 0xFFFFFFFF:
        magic, _, where, _ = file.unpack("<4sLQL", file.size - 42)
        magic64, *_, count, _, at = file.unpack("<4sQ2H2L4Q", where)
        if (magic, magic64) != (b"PK\6\7", b"PK\6\6"):
            raise ValueError("the zip64 directory of the archive is damaged")
    if count > MAX_RECORDS:
        raise ValueError(f"a zip archive of {count} records (at most {MAX_RECORDS})")
    records = {}
    for _ in range(count):
        (magic, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, _, _, _, header) = (
            file.unpack("<4s6H3L5H2L", at)
        )
        if magic != b"PK\1\2" or max(n_name, n_extra) > 1000:
            raise ValueError("the directory of the zip archive is damaged")
        raw, extra = file.bytes(at + 46, n_name), file.bytes(at + 46 + n_name, n_extra)
        at += 46 + n_name + n_extra + n_comment
        packed, size, header = _zip64(extra, packed, size, header)
        magic, *_, n_name, n_extra = file.unpack("<4s5H3L2H", header)  # its own header, before its bytes
        start, name = header + 30 + n_name + n_extra, raw.decode("utf-8")
        if magic != b"PK\3\4" or file.bytes(header + 30, n_name) != raw or name in records:
            raise ValueError(f"the zip record {_show(name)} is not what the directory says")
        if method or flags & 1 or packed != size:
            raise ValueError(
                f"the zip record {_show(name)} is compressed or encrypted, as torch.save never does"
            )
        file.check(start, size)
        records[name] = (start, size, crc)
    spans = sorted(record[:2] for record in records.values())
    if any(start + size > after for (start, size), (after, _) in zip(spans, spans[1:])):
        raise ValueError("records of the zip archive overlap")
    return records


def _zip64(extra: bytes, packed: int, size: int, header: int) -> list[int]:
    """The three values, each one that is all ones replaced by the next of the extra field with tag 1."""
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        tag, n = struct.unpack("<2H", extra[:4])
        if tag == 1:
            wide = (value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + n // 8 * 8]))
        extra = extra[4 + n :]
    return [next(wide) if value == 0xFFFFFFFF else value for value in (size, packed, header)]


# ---- Bare pickles: joblib, and torch.save before 2020 --------------------------------------------
#
# joblib: the numbers of an array follow its wrapper in the middle of the pickle, aligned by a few bytes whose
# number comes first (since joblib 1.2).
#
# torch.save: magic number, 1001, {"little_endian": True, ..}, the object, [keys of its storages]: five pickles;
# then for each key 8 bytes that count its numbers, and the numbers.

LEGACY = 0x1950A86A20F9469CFC6C


def _read_pickle(file: MappedFile) -> object:
    stream = Stream(file, 0, file.size)

    def array(wrapper: Inert) -> Tensor:
        numpy, shape = wrapper["dtype"], wrapper["shape"]
        kind, order = numpy.args[0], numpy["state"][1]
        if type(kind) is not str or kind not in NUMPY or order not in ("<", "|"):
            raise ValueError(f"an array of the unknown dtype {_show(kind)}")
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            padding = stream.read(1)[0]
            stream.at += padding
        fortran = wrapper["order"] == "F"
        tensor = file.tensor(NUMPY[kind], stream.at, shape[::-1] if fortran else shape)
        stream.at += tensor.nbytes
        return tensor.permute(*reversed(range(tensor.ndim))) if fortran else tensor

    result = _unpickle(stream, array=array)
    return _read_legacy(file, stream.at) if type(result) is int and result == LEGACY else result


def _read_legacy(file: MappedFile, at: int) -> object:
    stream = Stream(file, at, file.size)
    protocol, system = _unpickle(stream), _unpickle(stream)
    if protocol != 1001 or system["little_endian"] is not True:
        raise ValueError("torch.save in an unknown protocol or from a big-endian machine, which is not read")
    # The object comes before we know where its storages are, so it is read twice: first with storages that have no
    # numbers ("meta"), to get past it and learn their sizes, then with the true ones.
    begin, sizes, places = stream.at, {}, {}

    def without_numbers(id: tuple) -> Tensor:
        key, dtype, count = _storage_id(id)
        file.check(0, count * dtype.itemsize)
        sizes[key] = (count, count * dtype.itemsize)
        return torch.empty(count, dtype=dtype, device="meta")

    _unpickle(stream, without_numbers)
    keys, at = _unpickle(stream), stream.at
    for key in keys:
        if type(key) is not str or key not in sizes or file.unpack("<Q", at) != sizes[key][:1]:
            raise ValueError("the storages are not those that were announced")
        places[key] = (at + 8, sizes[key][1], 0)
        at += 8 + sizes[key][1]
    if at != file.size:
        raise ValueError(f"the storages should end at byte {at}, the file has {file.size} (truncated?)")
    return _unpickle(Stream(file, begin, file.size), _storages(file, places))


# ---- Any file ------------------------------------------------------------------------------------

FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
NOT_WEIGHTS = {
    rb"version https://git-lfs": "a Git LFS pointer; fetch the file itself (git lfs pull)",
    rb"\s*<": "a web page; the download went wrong",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\]\0\0|x[\x01\x5e\x9c\xda]": "compressed; unpack it first (joblib: compress=0)",
}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a weight file, an index of shards (*.index.json), or a folder with one of FOLDER.

    Of a file that holds more than weights, only the weights: "model" of a fairseq checkpoint, "generator" of a
    vocoder's, the fitted arrays of a scikit-learn estimator. The format is told from the content. The tensors are
    views of a memory map: replacing the file, as our writers do, is harmless; truncating it under a running program
    is not. Raises OSError, or ValueError with one line that begins with the path."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"{path}: no weights in this folder; looked for {', '.join(FOLDER)}")
        path = found[0]
    return _read_shards(path) if path.name.endswith(".index.json") else _read_weights(path)


def read_checkpoint(path: str | Path) -> object:
    """All that one file holds: dicts, lists, numbers, strings and tensors (views of a map, as in read_tensors).

    Objects of foreign classes are Inert: a Namespace is the dict of its attributes, an enum's value in `.args`."""
    with _one_line(path):
        file = MappedFile(Path(path))
        start = file.bytes(0, min(file.size, 32))
        if start[8:9] == b"{":
            return _read_safetensors(file)
        if start.startswith(b"PK\3\4"):
            return _read_zip(file)
        if start.startswith(b"\x80"):
            return _read_pickle(file)
        what = [why for pattern, why in NOT_WEIGHTS.items() if re.match(pattern, start)]
        raise ValueError((what or ["not a weight file (safetensors, torch.save or joblib)"])[0])


def _read_weights(path: Path) -> dict[str, Tensor]:
    table = read_checkpoint(path)
    with _one_line(path):
        if isinstance(table, Inert):
            table = {name: value for name, value in table.items() if isinstance(value, Tensor)} or None
        for key in ("model", "generator", "state_dict"):
            if isinstance(table, dict) and isinstance(table.get(key), dict):
                table = table[key]
        if not isinstance(table, dict):
            raise ValueError("holds no table of tensors")
        for name, value in table.items():
            if type(name) is not str or not isinstance(value, Tensor):
                raise ValueError(f"{_show(name)} is no tensor but a {type(value).__name__}")
        return table


def _read_shards(index: Path) -> dict[str, Tensor]:
    """`index` maps each tensor's name to the file beside it that holds it: {"weight_map": {name: file}}."""
    table = read_json(index)
    files: dict[str, set[str]] = {}
    with _one_line(index):
        for name, file in table["weight_map"].items():
            if not re.fullmatch(r"[\w-][\w.-]*", file):
                raise ValueError(f"{_show(file)} is not the plain name of a file beside the index")
            files.setdefault(file, set()).add(name)
    tensors = {}
    for file, names in files.items():
        shard = _read_weights(index.parent / file)
        if shard.keys() != names:
            name = min(shard.keys() ^ names)
            raise ValueError(f"{index}: {file} {'lacks' if name in names else 'also holds'} {_show(name)}")
        tensors |= shard
    return tensors


# ---- Into a module -------------------------------------------------------------------------------


@torch.no_grad()
def assign(
    module: nn.Module,
    tensors: dict[str, Tensor],
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fills every parameter and persistent buffer of `module` from `tensors`, and uses every tensor.

    dtype: what floating-point weights become (None: what the module has); device: where they go (None: where the
    module is, or the CPU for one built on meta). Converts one tensor at a time, so the peak is the module plus one
    tensor. Weights tied in the module may be given under one of their names or all. A missing, unused or wrongly
    shaped tensor is a ValueError that names it and `source`; the module is then untouched."""
    wanted = module.state_dict(keep_vars=True)  # a tied weight appears under each of its names
    given = {id(weight) for name, weight in wanted.items() if name in tensors}
    for name, weight in wanted.items():
        if id(weight) not in given:
            raise ValueError(f"{source}: {name} {_show(weight.shape)} is missing")
    tied: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in wanted:
            place = type(module).__name__
            raise ValueError(f"{source}: {_show(name)} {_show(tensor.shape)} has no place in {place}")
        weight = wanted[name]
        if weight.shape != tensor.shape:
            raise ValueError(f"{source}: {name} is {_show(tensor.shape)}, expected {_show(weight.shape)}")
        if weight.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is {tensor.dtype}, expected {weight.dtype}")
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


# ---- Writing -------------------------------------------------------------------------------------


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes a file that is, at every moment and after every crash, either the old one or the new one.

    A failure (full disk, no permission) is an OSError that names the file; nothing of the attempt remains."""
    _replace(path, lambda file: file.write(data))


def _replace(path: str | Path, write: Callable) -> None:
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp")
    try:
        temp.unlink(missing_ok=True)  # left by a process that was killed
        with open(temp, "xb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the content is on disk before its name
                if not temp.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(temp)):
                    raise OSError("another process is writing the same file")
                os.replace(temp, path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
    except OSError as e:
        raise (OSError(e.errno, e.strerror, str(path)) if e.errno else OSError(f"{path}: {e}")) from None


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically and one tensor at a time. Tensors may be on any device."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # keeps every tensor aligned
    end = 0
    for name in order:
        t = tensors[name]
        assert t.dtype in names, f"{name}: safetensors has no name for {t.dtype}"
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


def halve(source: str | Path, target: str | Path) -> None:
    """Copies a folder of weights with every float32 tensor in half precision: how weights/tiny is made."""
    for file in sorted(path for path in Path(source).rglob("*") if path.is_file()):
        copy = Path(target) / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            tensors = read_tensors(file)
            save_tensors(
                copy, {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
            )
        else:  # a LLaMA's config.json says what its tensors are
            write_atomic(
                copy, file.read_bytes().replace(b'"torch_dtype": "float32"', b'"torch_dtype": "float16"')
            )


def save_state(path: str | Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """A training state: tensors of any dtype; everything else (step, seeds, ...) as JSON in the header."""
    save_tensors(path, tensors, {"state": json.dumps(meta)})


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What save_state wrote. The tensors are copies: training changes them and the file is soon replaced."""
    with _one_line(path):
        file = MappedFile(Path(path))
        header, _ = _safetensors_header(file)
        meta = _parse_json(header["__metadata__"]["state"].encode())
        return {name: t.clone() for name, t in _read_safetensors(file).items()}, meta


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
    if len(table) != len(pairs):  # two readers might take different ones
        raise ValueError("JSON with the same key twice")
    return table


def _show(x: object) -> str:
    """Something found in a file, made harmless: one line of ASCII, not long, and quick to make."""
    if isinstance(x, str):
        return ascii(x[:100]) + "..." * (len(x) > 100)
    if isinstance(x, list | tuple) and len(x) <= 16 and all(type(n) in (int, float) for n in x):
        return str(list(x))
    return str(x) if type(x) is int else f"<{type(x).__name__}>"


@contextmanager
def _one_line(path: str | Path):
    """Whatever goes wrong with the content of `path` becomes a ValueError of one line that names it.

    Strangers wrote it: a parser can fail in more ways than can be listed, and all of them mean a bad file."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        why = " ".join(str(e).split())[:300]
        what = why if type(e) is ValueError else f"damaged or not what it claims ({type(e).__name__}: {why})"
        raise ValueError(f"{path}: {what}") from None


def read_jsonl(path: str | Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """The rows of a JSON-lines file, each with the `needed` keys; a bad line is a ValueError with its number."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run the stage that writes it first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not all(key in row for key in needed):
                raise ValueError(f"needs the keys {', '.join(needed)}")
        except ValueError as problem:
            raise ValueError(f"{path}, line {number}: {problem}") from None
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict]):
    """One JSON object a line; atomic."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
