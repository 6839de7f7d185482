"""Other people's pickles read as data: torch.save (zip and legacy) and joblib. Nothing in them is ever run.

A pickle is a program for a stack machine. {"w": 7} is

    80 02  PROTO 2    7d  EMPTY_DICT    58 01000000 77  BINUNICODE "w"    4b 07  BININT1 7
    73     SETITEM: pops 7 and "w", puts them into the dict below         2e     STOP: the top is the result

Two opcodes make it dangerous in Python: GLOBAL imports a module and fetches a name from it, REDUCE calls what
was fetched. Here GLOBAL compares the name with two lists, refuses what is in neither, and pushes only the
name; REDUCE calls a function of ours for a name of the first list, and makes an Inert for one of the second.

A tensor is a view of a memory map, checked against the true size of the file before it is made: 27 GB of
weights cost no memory until they are touched. Damaged numbers are noticed only by the checksums of a zip, of
records up to MAX_CRC: more would mean to read 27 GB once more.

References: pickle opcodes, Lib/pickletools.py of Python; joblib/numpy_pickle.py of joblib
            torch.save, torch/serialization.py and caffe2/serialize/inline_container.h of PyTorch
            zip, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import math
import mmap
import os
import pickletools
import re
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from files import show

# Bounds far above any honest file, so that a dishonest one costs little.
MAX_PICKLE = 64 << 20  # bytes without the tensors; SpeechGPT-7B has 0.05 MB
MAX_STEPS = 250_000  # of the stack machine; SpeechGPT-7B has 10,000
MAX_RECORDS = 100_000  # in a zip archive; SpeechGPT-7B has 330
MAX_CRC = 16 << 20  # bytes of a zip record whose checksum is verified: all but the matrices of an LLM
MAX_SIZE = 1 << 48  # elements along one dimension

STORAGES = {  # torch's names for a flat array of numbers
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
NUMPY = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "b1": torch.bool,
    "i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8,
    "u8": torch.uint64, "u4": torch.uint32, "u2": torch.uint16, "u1": torch.uint8,
}  # fmt: skip
NEWER = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)  # than numpy
TORCH = {str(dtype).replace(".", " "): dtype for dtype in (*NUMPY.values(), *NEWER)}  # "torch float32"


# ---- The map: the one place where bytes of a file become a tensor ------------------------------------------


class MappedFile:
    """A regular file mapped into memory. Writing to one of its tensors never changes the file."""

    def __init__(self, path: Path):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block or never end
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size == 0:
                raise ValueError("the file is empty")
            self.map = _map(file.fileno(), self.size)

    def check(self, start: int, n: int) -> None:
        if not 0 <= start <= start + n <= self.size:
            raise ValueError(f"{n} bytes at {start} lie outside the file of {self.size} bytes (truncated?)")

    def bytes(self, start: int, n: int) -> bytes:
        self.check(start, n)
        return self.map[start : start + n]

    def view(self, start: int, n: int) -> memoryview:
        """The same without a copy."""
        self.check(start, n)
        return memoryview(self.map)[start : start + n]

    def verify(self, crc: int, start: int, n: int) -> None:
        if crc == 0 or n > MAX_CRC:  # 0: torch was told not to compute it
            return
        if zlib.crc32(self.bytes(start, n)) != crc:
            raise ValueError(f"damaged: the checksum of {n} bytes at {start} does not match")

    def unpack(self, layout: str, start: int) -> tuple:
        return struct.unpack(layout, self.bytes(start, struct.calcsize(layout)))

    def tensor(self, dtype: torch.dtype, start: int, shape: tuple | list) -> Tensor:
        """The contiguous tensor whose numbers begin at byte `start`: a view of the map, aligned or not."""
        if len(shape) > 16 or not _are_sizes(shape):
            raise ValueError(f"impossible shape {show(shape)}")
        count = math.prod(shape)
        self.check(start, count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:  # a bool of any byte but 0 and 1 would be a broken one
            return self.tensor(torch.uint8, start, shape).ne(0)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=start).view(shape)


def _map(file: int, size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    # Linux counts a private writable map as memory that might all be needed, and would refuse 27 GB on a
    # small machine. NORESERVE says that it will not be (mmap has no name for it before Python 3.13).
    noreserve = 0x4000 if sys.platform == "linux" else 0
    return mmap.mmap(file, size, mmap.MAP_PRIVATE | noreserve, mmap.PROT_READ | mmap.PROT_WRITE)


def _are_sizes(numbers: tuple | list) -> bool:
    return all(type(n) is int and 0 <= n < MAX_SIZE for n in numbers)


# ---- The names that weights need ---------------------------------------------------------------------------


def _strided(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """A view of a flat storage: element (i, j, ..) is storage[offset + i stride[0] + j stride[1] + ..]."""
    fits = len(size) == len(stride) <= 16
    if not fits or not _are_sizes((offset, *size, *stride)):
        raise ValueError(
            f"impossible tensor: offset {show(offset)}, size {show(size)}, stride {show(stride)}"
        )
    count = math.prod(size)
    if count == 0:
        return storage.new_empty(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if max(count - 1, last) >= storage.numel():
        raise ValueError(f"a tensor {show(size)} does not fit its storage of {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset)


def _strided_as(storage: Tensor, offset: int, size: tuple, stride: tuple, _grad, _hooks, dtype, *_) -> Tensor:
    return _strided(storage.view(TORCH[dtype.name]), offset, size, stride)


CALLABLE = {
    "torch._utils _rebuild_tensor": _strided,
    "torch._utils _rebuild_tensor_v2": _strided,
    "torch._utils _rebuild_tensor_v3": _strided_as,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch Size": lambda size: size,
    "collections OrderedDict": lambda: {},
    "collections defaultdict": lambda *_: {},
}
INERT = re.compile(
    r"argparse Namespace|typing Any|collections Counter|_codecs encode"
    r"|(fairseq|omegaconf|sklearn)(\.\w+)* [A-Z]\w*|joblib\.numpy_pickle NumpyArrayWrapper"
    r"|numpy (ndarray|dtype)|numpy\._?core\.multiarray (scalar|_reconstruct)"
    r"|numpy\.random\._pickle \w+_ctor|numpy\.random\._mt19937 MT19937"
    r"|torch (device|bool|b?float\d+\w*|u?int\d+|\w+Storage)|torch\.storage \w+Storage"
    r"|(builtins|__builtin__) (object|bool|int|long|float|complex|str|unicode|bytes|bytearray"
    r"|tuple|list|dict|set|frozenset)",
    re.ASCII,
)


class Global:
    """A name that a pickle asked for, "module name": allowed, never looked up."""

    def __init__(self, name: str):
        if len(name) > 200 or name not in CALLABLE and not INERT.fullmatch(name):
            asked = show(name.replace(" ", "."))
            raise ValueError(
                f"refused: its pickle asks for {asked}, which is not among the names that weights need "
                "(CALLABLE and INERT in pickles.py)"
            )
        self.name = name


class Inert(dict):
    """Stands for an object of a foreign class: a dict of its attributes, with its class and arguments."""

    def __init__(self, name: str, args: tuple):
        super().__init__()
        self.name = name
        self.args = args


# ---- The stack machine -------------------------------------------------------------------------------------

LITERALS = set(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
FRESH = {  # a set becomes a list: to hash what a stranger has composed can take for ever
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list,
}  # fmt: skip


class Stream:
    """The pickle in bytes [at, end) of a file, in the shape that pickletools reads. Counts what is read."""

    def __init__(self, file: MappedFile, at: int, end: int):
        self.file = file
        self.at = at
        self.end = end
        self.left = MAX_PICKLE

    def read(self, n: int) -> bytes:
        n = max(0, min(n, self.end - self.at))
        self.at += n
        self.left -= n
        if self.left < 0:
            raise ValueError(f"a pickle of more than {MAX_PICKLE} bytes")
        return self.file.bytes(self.at - n, n)

    def readline(self) -> bytes:  # only names are lines
        return self.read(self.file.map.find(b"\n", self.at, self.at + 1000) + 1 - self.at)


def unpickle(stream: Stream, storage: Callable | None = None, array: Callable | None = None) -> object:
    """Runs one pickle. `storage(id)` gives the tensor of a persistent id, `array(wrapper)` that of joblib."""
    stack, marks, memo = [], [], {}
    steps = 0

    def since_mark() -> list:
        nonlocal stack
        items = stack
        stack = marks.pop()
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
                module = stack.pop(-2)
                name = stack.pop()
                stack.append(Global(f"{module} {name}" if type(module) is type(name) is str else "?"))
            case "REDUCE" | "NEWOBJ":
                wanted = stack.pop(-2)
                args = stack.pop()
                if type(wanted) is not Global or type(args) is not tuple:
                    raise ValueError("the pickle calls something that is not a name")
                make = CALLABLE.get(wanted.name)
                stack.append(make(*args) if make else Inert(wanted.name, args))
            case "BUILD":  # gives the object below its attributes
                state = stack.pop()
                made = stack[-1]
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


# ---- torch.save: a zip archive of a pickle and one record per storage --------------------------------------
#
#     <root>/data.pkl    a tensor is REDUCE of _rebuild_tensor_v2 and (storage, offset, size, stride, ...);
#                        its storage is the persistent id ("storage", torch.FloatStorage, "0", "cpu", count)
#     <root>/data/0      the numbers of storage "0", not compressed: they can be mapped where they are
#     <root>/byteorder   "little"


def read_zip(file: MappedFile) -> object:
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
    return unpickle(Stream(file, start, start + size), _storages(file, places))


def _zip_records(file: MappedFile) -> dict[str, tuple[int, int, int]]:
    """Where each record of an uncompressed zip archive is: {name: (first byte, size, CRC)}.

    The directory is near the end, its address in the last 22 bytes. A value that exceeds 32 bits is all ones
    there, and the true value is in a longer ("zip64") structure."""
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
        fields = file.unpack("<4s6H3L5H2L", at)
        magic, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, *_, header = fields
        if magic != b"PK\1\2" or max(n_name, n_extra) > 1000:
            raise ValueError("the directory of the zip archive is damaged")
        raw = file.bytes(at + 46, n_name)
        extra = file.bytes(at + 46 + n_name, n_extra)
        at += 46 + n_name + n_extra + n_comment
        size, packed, header = _zip64(extra, size, packed, header)
        magic, *_, n_name, n_extra = file.unpack("<4s5H3L2H", header)  # its own header, before its bytes
        start = header + 30 + n_name + n_extra
        name = raw.decode("utf-8")
        if magic != b"PK\3\4" or file.bytes(header + 30, n_name) != raw or name in records:
            raise ValueError(f"the zip record {show(name)} is not what the directory says")
        if method or flags & 1 or packed != size:
            raise ValueError(
                f"the zip record {show(name)} is compressed or encrypted; torch.save does neither"
            )
        file.check(start, size)
        records[name] = (start, size, crc)
    end = 0
    for start, size, _ in sorted(records.values()):
        if start < end:
            raise ValueError("records of the zip archive overlap")
        end = start + size
    return records


def _zip64(extra: bytes, size: int, packed: int, header: int) -> list[int]:
    """The three values; each one that is all ones is replaced by the next of the extra field with tag 1."""
    wide: Iterator[int] = iter(())
    while len(extra) >= 4:
        tag, n = struct.unpack("<2H", extra[:4])
        if tag == 1:
            wide = (value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + n // 8 * 8]))
        extra = extra[4 + n :]
    return [next(wide) if value == 0xFFFFFFFF else value for value in (size, packed, header)]


def _storages(file: MappedFile, places: dict[str, tuple[int, int, int]]) -> Callable:
    """The function from persistent id to flat tensor, given first byte, size and CRC of each storage."""
    made: dict[str, Tensor] = {}

    def storage(id: tuple) -> Tensor:
        key, dtype, count = _storage_id(id)
        start, size, crc = places[key]
        if size != count * dtype.itemsize or (key in made and made[key].dtype != dtype):
            raise ValueError(f"storage {show(key)} claims {show(count)} numbers of {dtype} in {size} bytes")
        if key not in made:
            file.verify(crc, start, size)
            made[key] = file.tensor(dtype, start, [count])
        return made[key]

    return storage


def _storage_id(id: tuple) -> tuple[str, torch.dtype, int]:
    """Key, dtype and number of elements from a storage's persistent id."""
    tag, kind, key, _device, count, *view = id
    dtype = STORAGES.get(kind.name.split(" ")[1])
    known = tag == "storage" and dtype and view in ([], [None])
    if not known or type(key) is not str or type(count) is not int:
        raise ValueError("a storage of an unknown kind")
    return key, dtype, count


# ---- Bare pickles: joblib, and torch.save before 2020 ------------------------------------------------------
#
# joblib: the numbers of an array follow its wrapper in the middle of the pickle, aligned by a few bytes whose
# number comes first (since joblib 1.2).
#
# torch.save: magic number, 1001, {"little_endian": True, ..}, the object, [keys of its storages]: five
# pickles; then for each key 8 bytes that count its numbers, and the numbers.

LEGACY = 0x1950A86A20F9469CFC6C


def read_pickle(file: MappedFile) -> object:
    stream = Stream(file, 0, file.size)

    def array(wrapper: Inert) -> Tensor:
        numpy, shape = wrapper["dtype"], wrapper["shape"]
        kind, order = numpy.args[0], numpy["state"][1]
        if type(kind) is not str or kind not in NUMPY or order not in ("<", "|"):
            raise ValueError(f"an array of the unknown dtype {show(kind)}")
        if wrapper.get("numpy_array_alignment_bytes") is not None:
            padding = stream.read(1)[0]
            stream.at += padding
        fortran = wrapper["order"] == "F"
        tensor = file.tensor(NUMPY[kind], stream.at, shape[::-1] if fortran else shape)
        stream.at += tensor.nbytes
        return tensor.permute(*reversed(range(tensor.ndim))) if fortran else tensor

    result = unpickle(stream, array=array)
    return _read_legacy(file, stream.at) if type(result) is int and result == LEGACY else result


def _read_legacy(file: MappedFile, at: int) -> object:
    stream = Stream(file, at, file.size)
    protocol = unpickle(stream)
    system = unpickle(stream)
    if protocol != 1001 or system["little_endian"] is not True:
        raise ValueError("torch.save in an unknown protocol or from a big-endian machine, which is not read")
    # The object comes before we know where its storages are, so it is read twice: first with storages that
    # have no numbers ("meta"), to get past it and learn their sizes, then with the true ones.
    begin = stream.at
    sizes, places = {}, {}

    def without_numbers(id: tuple) -> Tensor:
        key, dtype, count = _storage_id(id)
        file.check(0, count * dtype.itemsize)
        sizes[key] = (count, count * dtype.itemsize)
        return torch.empty(count, dtype=dtype, device="meta")

    unpickle(stream, without_numbers)
    keys = unpickle(stream)
    at = stream.at
    for key in keys:
        if type(key) is not str or key not in sizes or file.unpack("<Q", at) != sizes[key][:1]:
            raise ValueError("the storages are not those that were announced")
        places[key] = (at + 8, sizes[key][1], 0)
        at += 8 + sizes[key][1]
    if at != file.size:
        raise ValueError(f"the storages should end at byte {at}, the file has {file.size} (truncated?)")
    return unpickle(Stream(file, begin, file.size), _storages(file, places))
