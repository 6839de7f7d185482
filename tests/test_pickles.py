"""pickles.py: torch.save, fairseq and joblib files are read exactly; hostile ones are refused, never run."""

import argparse
import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from hostile import (
    SEEN,
    Cases,
    assert_same,
    raw,
    read_or_refuse,
    refused_in_one_line,
    refused_with_little_memory,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from test_checkpoint import network, of_every_dtype
from torch import nn

from checkpoint import read_checkpoint, read_tensors
from pickles import LEGACY

# ---- What others write -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save_is_read_exactly(tmp_path, zipped):
    tensors = of_every_dtype()
    if not zipped:  # the old format has no storages for the new dtypes
        tensors = {
            n: t for n, t in tensors.items() if not n.startswith(("float8", "uint16", "uint32", "uint64"))
        }
    shared = torch.randn(6, 5)
    tensors |= {"all": shared, "part": shared[2:4, 1:], "parameter": nn.Parameter(torch.ones(2))}
    torch.save(collections.OrderedDict(tensors), tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "a.bin"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_modules_own_state_dict_is_read(tmp_path, zipped):
    torch.save(
        network().state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )  # with _metadata
    assert read_tensors(tmp_path / "a.pt").keys() == network().state_dict().keys()


def test_torch_save_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_tensors(tmp_path / "a.bin")["w"].tolist() == [1, 1, 1]


def test_zip64_archives_are_read(tmp_path, monkeypatch):
    torch.save({"w": torch.arange(100.0), "v": torch.ones(3)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as z:
        records = {name: z.read(name) for name in z.namelist()}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 5)  # everything above 5 bytes is written the 64-bit way
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as z:
        for name, data in records.items():
            z.writestr(name, data)
    assert b"PK\6\6" in (tmp_path / "b.bin").read_bytes()
    assert_same(
        read_tensors(tmp_path / "b.bin"), {"w": torch.arange(100.0), "v": torch.ones(3)}
    )  # misaligned, too


def test_the_generator_of_a_vocoder_is_read(tmp_path):
    torch.save({"generator": {"conv_pre.bias": torch.ones(2)}}, tmp_path / "g_00500000")
    assert_same(read_tensors(tmp_path / "g_00500000"), {"conv_pre.bias": torch.ones(2)})


def fairseq_checkpoint(monkeypatch, **more) -> dict:
    """The layout of a fairseq file, written with classes that have fairseq's names and attributes."""
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary", "omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    Dictionary = type("Dictionary", (), {"__module__": "fairseq.data.dictionary"})
    DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    sys.modules["fairseq.data.dictionary"].Dictionary = Dictionary
    sys.modules["omegaconf.dictconfig"].DictConfig = DictConfig
    words, config = Dictionary(), DictConfig()
    words.__dict__ = {
        "bos_word": "<s>",
        "symbols": ["<s>", "a"],
        "count": [1, 2],
        "indices": {"<s>": 0, "a": 1},
    }
    config.__dict__ = {"_content": {"normalize": False}, "_parent": config}
    model = {"encoder.layers.0.fc1.weight": torch.randn(4, 3), "mask_emb": torch.randn(3).half()}
    return {
        "args": argparse.Namespace(encoder_layers=6, arch="transformer"),
        "cfg": {"task": config},
        "model": collections.OrderedDict(model),
        "task_state": {"dictionaries": [words]},
        "extra_state": {"best": np.float64(3), "meters": collections.defaultdict(int, a=1), "set": {1, 2}},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(4, 3)}}},
        **more,
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_fairseq_checkpoints_give_their_model(tmp_path, monkeypatch, zipped, protocol):
    written = fairseq_checkpoint(monkeypatch)
    torch.save(written, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    for name in [n for n in sys.modules if n.split(".")[0] in ("fairseq", "omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    assert_same(read_tensors(tmp_path / "m.pt"), dict(written["model"]))
    whole = read_checkpoint(tmp_path / "m.pt")
    assert whole["args"]["encoder_layers"] == 6 and whole["args"].name == "argparse Namespace"
    assert whole["task_state"]["dictionaries"][0]["symbols"] == ["<s>", "a"]
    assert whole["cfg"]["task"]["_content"] == {"normalize": False}
    assert "fairseq" not in sys.modules


def k_means(**options) -> MiniBatchKMeans:
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    return MiniBatchKMeans(8, n_init=1, random_state=0, batch_size=100, **options).fit(x)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
def test_joblib_k_means_gives_its_arrays(tmp_path, monkeypatch, protocol, aligned, order):
    model = k_means()
    model.cluster_centers_ = np.asarray(model.cluster_centers_, order=order)
    model.random_state = np.random.RandomState(3)
    if not aligned:  # as joblib did before 1.2
        init = joblib.numpy_pickle.NumpyArrayWrapper.__init__

        def without(self, *args, **kwargs):
            init(self, *args, **kwargs)
            del self.numpy_array_alignment_bytes

        monkeypatch.setattr(joblib.numpy_pickle.NumpyArrayWrapper, "__init__", without)
    joblib.dump(model, tmp_path / "km.bin", protocol=protocol)
    tensors = read_tensors(tmp_path / "km.bin")
    assert np.array_equal(tensors["cluster_centers_"].numpy(), model.cluster_centers_)
    assert np.array_equal(tensors["labels_"].numpy(), model.labels_)


# ---- Hostile files -----------------------------------------------------------------------------------------

HOSTILE = Cases()


class Call:
    """Pickles as a call of function(*args)."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Storage:
    def __init__(self, *id):
        self.id = id


class Pickler(pickle._Pickler):
    """Pickles Storage as a persistent id; `Raw` bytes go in as they are."""

    def persistent_id(self, x):
        return x.id if isinstance(x, Storage) else None


class Raw(bytes):
    """Opcodes to be written as they are."""


def save_raw(pickler, x):
    pickler.write(bytes(x))


Pickler.dispatch = {**pickle._Pickler.dispatch, Raw: save_raw}


def pickled(obj, protocol=2) -> bytes:
    f = io.BytesIO()
    Pickler(f, protocol).dump(obj)
    return f.getvalue()


def torch_zip(path: Path, pkl: bytes, storages=None, records=None, **how) -> Path:
    with zipfile.ZipFile(path, "w", **how) as z:
        z.writestr("archive/data.pkl", pkl)
        for key, data in (storages or {"0": bytes(16)}).items():
            z.writestr(f"archive/data/{key}", data)
        for name, data in (records or {}).items():
            z.writestr(name, data)
    return path


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 4)  # the persistent id of what torch_zip writes


def tensor(size=(4,), stride=(1,), offset=0, id=FLOATS) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Storage(*id), offset, size, stride, False, {})


def global_(module: str, name: str) -> Raw:
    return Raw(f"c{module}\n{name}\n".encode())


def call(module: str, name: str, *args) -> Raw:
    return Raw(global_(module, name) + pickled(args)[2:-1] + b"R")


def test_the_tools_below_write_files_that_are_read(tmp_path):
    path = torch_zip(tmp_path / "a", pickled({"w": tensor(), "v": tensor((2, 2), (1, 2))}))
    assert_same(read_tensors(path), {"w": torch.zeros(4), "v": torch.zeros(2, 2)})


MARK = "touch executed"


@HOSTILE.family(
    os_system=call("os", "system", MARK),
    posix_system=call("posix", "system", MARK),
    eval=call("builtins", "eval", "open('executed', 'w')"),
    exec=call("builtins", "exec", "open('executed', 'w')"),
    python2_eval=call("__builtin__", "eval", "open('executed', 'w')"),
    open=call("builtins", "open", "executed", "w"),
    getattr=call("builtins", "getattr", "a", "upper"),
    import_=call("builtins", "__import__", "this"),
    subprocess=call("subprocess", "check_output", [MARK]),
    new_object=Raw(global_("subprocess", "Popen") + pickled(([MARK],))[2:-1] + b"\x81"),
    torch_load=call("torch.serialization", "load", "other.pt"),
    torch_hub=call("torch.hub", "load", "a/b", "c"),
    torch_dunder=call("torch", "__builtins__"),
    torch_dotted=call("torch", "os.system", MARK),
    torch_storage_file=call("torch.storage", "UntypedStorage.from_file", "executed", True, 10),
    numpy_run=call("numpy.testing._private.utils", "runstring", "open('executed', 'w')", {}),
    numpy_load=call("numpy", "load", "x.npy"),
    numpy_core=call("numpy.core.multiarray", "fromfile", "x"),
    fairseq_function=call("fairseq.utils", "import_user_module", "x"),
    pickle_loads=call("pickle", "loads", b"x"),
    sklearn_function=call("sklearn.utils", "import_module", "this"),
    runpy=call("runpy", "run_path", "x.py"),
    codecs=call("codecs", "open", "executed", "w"),
    operator=call("operator", "attrgetter", "x"),
    functools=call("functools", "partial", 1),
    importlib=call("importlib", "import_module", "this"),
    newline=Raw(b"\x8c\x02os\x8c\x0asystem\n\n\n\n\x93"),
    control=Raw(b"\x8c\x04o\x1b[2\x8c\x06system\x93"),
    no_names=Raw(b"K\x01K\x02\x93"),
)
def asks_for(tmp, opcodes):
    return torch_zip(tmp / "a.bin", pickled({"w": tensor(), "x": opcodes}))


@HOSTILE.one
def code_hides_in_a_fairseq_checkpoint(tmp):
    return torch_zip(
        tmp / "a.pt", pickled({"model": {"w": tensor()}, "extra_state": [call("os", "system", MARK)]})
    )


@HOSTILE.one
def code_in_a_protocol_4_pickle(tmp):
    return torch_zip(tmp / "a.bin", pickled({"w": tensor(), "x": Call(os.system, MARK)}, 4))


@HOSTILE.one
def code_in_a_legacy_file(tmp):
    torch.save({"w": Call(os.system, MARK)}, tmp / "a.bin", _use_new_zipfile_serialization=False)
    return tmp / "a.bin"


@HOSTILE.one
def code_in_a_joblib_file(tmp):
    model = k_means()
    model.extra = Call(os.system, MARK)
    joblib.dump(model, tmp / "a.bin")
    return tmp / "a.bin"


@HOSTILE.one
def code_in_a_bare_pickle(tmp):
    (tmp / "a.bin").write_bytes(pickle.dumps(Call(os.system, MARK)))
    return tmp / "a.bin"


@HOSTILE.family(
    inst=b"(ios\nsystem\n",
    obj=b"(\x8c\x02osX\x04\0\0\0exito",
    extension=b"\x82\x01",
    persid=b"Pabc\n",
    build_on_a_class=b"ccollections\nOrderedDict\n}b",
    build_on_a_list=b"]}b",
    build_on_a_tensor_name=b"X\1\0\0\0a}b",
    reduce_a_string=b"X\1\0\0\0a)R",
    reduce_without_tuple=b"ccollections\nOrderedDict\n]R",
    newobj_ex=b"ccollections\nOrderedDict\n)}\x92",
    wrong_arguments=b"ccollections\nOrderedDict\nK\1\x85R",
    underflow=b"s",
    pop_of_nothing=b"0000000",
    lost_mark=b"tttt",
    unknown_memo=b"h\x07",
    unknown_opcode=b"\xfe",
    append_to_dict=b"}K\1a",
    items_into_list=b"]K\1K\2s",
    odd_items=b"}(K\1K\2K\3u",
    tuple_as_key=b"})K\1s",
    list_as_key=b"}]K\1s",
    endless_string=b"X\xff\xff\xff\xff",
    endless_string_8=b"\x8d" + b"\xff" * 7 + b"\x7f",
    endless_bytes=b"\x8e" + b"\xff" * 8,
    endless_array=b"\x96" + b"\xff" * 7 + b"\x7f",
    endless_long=b"\x8b\xff\xff\xff\x7f",
    negative_long=b"\x8b\xff\xff\xff\xff",
    endless_line=b"c" + b"a" * 5000,
    long_digits=b"L" + b"9" * 5000 + b"L\n",
    buffer=b"\x97",
    dup=b"2222",
)
def opcodes(tmp, code):
    return torch_zip(tmp / "a.bin", pickled({"w": tensor(), "x": Raw(code)}))


DOUBLED = b")q\0" + b"h\0h\0\x86q\0" * 1000  # tuples of tuples: 1000 in memory, 2 ** 1000 to hash or to print
LONG = b"X" + struct.pack("<I", 60_000_000) + b"A" * 60_000_000 + b"q\0"  # to be copied again and again


@HOSTILE.family(
    dicts=b"}" * 300_000,
    marks=b"(" * 300_000,
    memo=b"}" + b"r\xff\xff\xff\xff" * 300_000,
    nested_lists=b"]" * 100_000 + b"a" * 99_999,
    nested_tuples=b")" + b"\x85" * 200_000,
    nested_objects=b"cargparse\nNamespace\nq\0" + b"h\0" * 60_000 + b")" + b"R\x85" * 60_000,
    doubled_key=DOUBLED + b"}h\0K\1s",
    doubled_size=DOUBLED + b"ctorch._utils\n_rebuild_tensor\n(K\0K\0h\0h\0tR",
    doubled_set=DOUBLED + b"\x8f(h\0\x90",
    sizes=LONG + b"ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 5_000,
    encoded=LONG + b"c_codecs\nencode\nq\1" + b"h\1h\0h\0\x86R" * 5_000,
    names=LONG + b"X\7\0\0\0fairseqq\1" + b"h\1h\0\x93" * 5_000,
    # one dict of 20,000 entries, to be the attributes of 5,000 objects
    states=b"}("
    + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(20_000))
    + b"uq\0"
    + b"cargparse\nNamespace\nq\1"
    + b"h\1)Rh\0b" * 5_000,
    only_stop=b"",
    nothing=None,
)
def bomb(tmp, code):
    return torch_zip(tmp / "a.bin", b"" if code is None else b"\x80\x02" + code + b".")


@HOSTILE.one
def a_pickle_of_100_megabytes(tmp):
    return torch_zip(tmp / "a.bin", pickled(["x" * 100_000_000]))


@HOSTILE.one
def a_bare_pickle_of_100_megabytes(tmp):
    (tmp / "a.bin").write_bytes(pickled(["x" * 1_000_000 + str(i) for i in range(100)]))
    return tmp / "a.bin"


@HOSTILE.family(
    size=tensor((5,)),
    product=tensor((3, 2), (2, 1)),
    offset=tensor((4,), (1,), 1),
    stride=tensor((2,), (4,)),
    zero_stride=tensor((2**40,), (0,)),
    little_zero_stride=tensor((5,), (0,)),
    negative_stride=tensor((2,), (-1,)),
    negative_offset=tensor((2,), (1,), -1),
    negative_size=tensor((-1,)),
    absurd=tensor((2**62, 2**62), (1, 1)),
    absurd_and_empty=tensor((0, 2**62, 2**62), (1, 1, 1)),
    wraps=tensor((2**32, 2**32), (0, 0)),
    far_stride=tensor((2, 1), (2**63, 1)),
    dimensions=tensor((1,) * 100, (1,) * 100),
    few_strides=tensor((2, 2), (1,)),
    float_size=tensor((4.0,)),
    string_size=tensor("4"),
    bool_size=tensor((True,)),
    none=tensor(None, None),
    no_storage=Call(torch._utils._rebuild_tensor_v2, {}, 0, (4,), (1,)),
    no_arguments=Call(torch._utils._rebuild_tensor_v2),
    count=tensor(id=FLOATS[:4] + (5,)),
    huge_count=tensor(id=FLOATS[:4] + (2**62,)),
    negative_count=tensor(id=FLOATS[:4] + (-4,)),
    float_count=tensor(id=FLOATS[:4] + (4.0,)),
    dtype=tensor(id=("storage", torch.DoubleStorage, "0", "cpu", 4)),
    missing=tensor(id=("storage", torch.FloatStorage, "7", "cpu", 4)),
    climbing_key=tensor(id=("storage", torch.FloatStorage, "../data.pkl", "cpu", 4)),
    unknown_storage=tensor(id=("storage", global_("torch", "EvilStorage"), "0", "cpu", 4)),
    no_type=tensor(id=("storage", "FloatStorage", "0", "cpu", 4)),
    short_id=tensor(id=("storage",)),
    integer_id=Storage(7),
    view=tensor(id=FLOATS + (("0", 0, 2),)),
    not_a_tensor="w",
    number=3,
    plain_list=[1],
)
def lying(tmp, value):
    if isinstance(value, Storage) and value.id == (7,):
        value = Raw(b"K\x07Q")
    return torch_zip(tmp / "a.bin", pickled({"w": value}))


@HOSTILE.family(list=[1], number=3, none=None, nested={"a": {"b": 1}}, integer_name={1: tensor()})
def no_table(tmp, value):
    return torch_zip(tmp / "a.bin", pickled(value))


@HOSTILE.one
def an_estimator_without_arrays(tmp):
    joblib.dump(MiniBatchKMeans(), tmp / "km.bin")
    return tmp / "km.bin"


# zip archives that lie

GOOD = pickled({"w": tensor()})


def edited(path: Path, edit) -> Path:
    """Applies edit(bytes) -> bytes to a file."""
    path.write_bytes(edit(bytearray(path.read_bytes())))
    return path


def put(data: bytearray, at: int, fmt: str, value: int) -> bytearray:
    struct.pack_into(fmt, data, at % len(data), value)
    return data


def directory(data: bytes, n: int = 0) -> int:
    """Where the n-th entry of the zip directory begins."""
    at = data.index(b"PK\1\2")
    for _ in range(n):
        at = data.index(b"PK\1\2", at + 1)
    return at


@HOSTILE.one
def zip_bomb(tmp):
    return torch_zip(tmp / "a.bin", GOOD, {"0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)


@HOSTILE.family(
    no_end=lambda d: d[:-22],
    half=lambda d: d[: len(d) // 2],
    cut_by_one=lambda d: d[:-1],
    only_magic=lambda d: d[:4],
    comment=lambda d: put(d, -2, "<H", 9) + b"123456789",
    trailing=lambda d: d + b"\0",
    many_entries=lambda d: put(d, -12, "<H", 60000),
    zip64_without=lambda d: put(d, -12, "<H", 0xFFFF),
    directory_outside=lambda d: put(d, -6, "<L", 2**31),
    directory_at_zero=lambda d: put(d, -6, "<L", 0),
    size_outside=lambda d: put(put(d, directory(d, 1) + 20, "<L", 2**30), directory(d, 1) + 24, "<L", 2**30),
    sizes_differ=lambda d: put(d, directory(d, 1) + 24, "<L", 2**30),
    encrypted=lambda d: put(d, directory(d) + 8, "<H", 1),
    method=lambda d: put(d, directory(d) + 10, "<H", 8),
    header_outside=lambda d: put(d, directory(d, 1) + 42, "<L", 2**31),
    shared_header=lambda d: put(d, directory(d, 1) + 42, "<L", 0),
    long_name=lambda d: put(d, directory(d, 1) + 28, "<H", 65535),
    zip64_value_missing=lambda d: put(
        put(d, directory(d, 1) + 20, "<L", 2**32 - 1), directory(d, 1) + 24, "<L", 2**32 - 1
    ),
    flipped_pickle=lambda d: put(d, 50, "B", d[50] ^ 1),
    name_not_utf8=lambda d: d.replace(b"archive/data/0", b"archive/data/\xff"),
    one_name_twice=lambda d: d.replace(b"archive/data/1", b"archive/data/0"),
    local_name_differs=lambda d: put(d, d.index(b"archive/data/0"), "B", 0x41),
)
def archive(tmp, edit):
    return edited(torch_zip(tmp / "a.bin", GOOD, {"0": bytes(16), "1": bytes(16)}), edit)


@HOSTILE.one
def zip_records_that_overlap(tmp):
    """A record that hides inside another: its header is part of the other's bytes."""
    inner = b"PK\3\4" + bytes(22) + struct.pack("<2H", 14, 0) + b"archive/data/1" + bytes(16)

    def edit(d):
        at = directory(d, 2)
        return put(d, at + 42, "<L", d.index(inner))

    return edited(torch_zip(tmp / "a.bin", GOOD, {"0": inner, "1": bytes(16)}), edit)


@HOSTILE.one
def zip64_with_absurd_count(tmp):
    def edit(d):
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, directory(d))
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(d) - 22, 1)
        return d[:-22] + end64 + locator + put(d[-22:], 10, "<H", 0xFFFF)

    return edited(torch_zip(tmp / "a.bin", GOOD), edit)


@HOSTILE.family(
    torchscript={"archive/constants.pkl": b""},
    big_endian={"archive/byteorder": b"big"},
    two_pickles={"other/data.pkl": GOOD},
)
def archive_with(tmp, records):
    return torch_zip(tmp / "a.bin", GOOD, records=records)


@HOSTILE.one
def a_zip_of_something_else(tmp):
    with zipfile.ZipFile(tmp / "a.bin", "w") as z:
        z.writestr("readme.txt", "hello")
    return tmp / "a.bin"


# legacy and joblib files that lie


def legacy_parts() -> dict[str, bytes]:
    return {
        "magic": pickled(LEGACY),
        "protocol": pickled(1001),
        "system": pickled({"little_endian": True}),
        "object": pickled({"w": tensor(id=(*FLOATS, None))}),
        "keys": pickled(["0"]),
        "count": struct.pack("<Q", 4),
        "numbers": bytes(16),
    }


def test_the_legacy_parts_below_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"".join(legacy_parts().values()))
    assert_same(read_tensors(tmp_path / "a"), {"w": torch.zeros(4)})


def two_storages(*second) -> bytes:
    return pickled([tensor(id=(*FLOATS, None)), tensor((1,), id=(*second, None))])


@HOSTILE.family(
    protocol={"protocol": pickled(1000)},
    big_endian={"system": pickled({"little_endian": False})},
    no_system={"system": pickled([])},
    code={"object": pickled({"w": Call(os.system, MARK)})},
    code_in_the_system={"system": pickled(Call(os.system, MARK))},
    code_in_the_keys={"keys": pickled([Call(os.system, MARK)])},
    unknown_key={"keys": pickled(["0", "1"])},
    no_keys={"keys": pickled([])},
    keys_number={"keys": pickled(3)},
    key_twice={"keys": pickled(["0", "0"])},
    key_number={"keys": pickled([0])},
    tuple_key={"keys": pickled([()])},
    count={"count": struct.pack("<Q", 5)},
    huge_count={"count": b"\xff" * 8},
    cut={"numbers": bytes(15)},
    trailing={"numbers": bytes(17)},
    no_numbers={"count": b"", "numbers": b""},
    huge_storage={"object": two_storages("storage", torch.FloatStorage, "1", "cpu", 2**45)},
    negative_storage={"object": two_storages("storage", torch.FloatStorage, "1", "cpu", -1)},
    two_sizes={"object": two_storages("storage", torch.FloatStorage, "0", "cpu", 3)},
    two_dtypes={"object": two_storages("storage", torch.IntStorage, "0", "cpu", 4)},
)
def legacy(tmp, change):
    (tmp / "a.bin").write_bytes(b"".join((legacy_parts() | change).values()))
    return tmp / "a.bin"


def joblib_file(tmp) -> Path:
    joblib.dump(k_means(), tmp / "km.bin", protocol=2)
    return tmp / "km.bin"


@HOSTILE.family(
    cut=lambda d: d[:-1],
    half=lambda d: d[: len(d) // 2],
    shape=lambda d: d.replace(b"shapeq\x0cK\x08", b"shapeq\x0cK\xff") if b"shapeq\x0cK\x08" in d else d[:99],
    dtype=lambda d: d.replace(b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00f9"),
    order=lambda d: d.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"),
)
def joblib_stream(tmp, edit):
    return edited(joblib_file(tmp), edit)


def wrapper(**attributes) -> bytes:
    """A joblib stream {"a": array of 4 floats}, with other attributes than it should have."""
    attributes = {
        "subclass": None,
        "shape": (4,),
        "order": "C",
        "dtype": np.dtype("f4"),
        "allow_mmap": True,
    } | attributes
    made = global_("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81" + pickled(attributes)[2:-1] + b"b"
    return b"\x80\x02}X\1\0\0\0a" + made + bytes(16) + b"s."


def test_the_joblib_stream_below_is_read(tmp_path):
    (tmp_path / "a").write_bytes(wrapper())
    assert read_tensors(tmp_path / "a")["a"].tolist() == [0, 0, 0, 0]


@HOSTILE.family(
    shape={"shape": (5000,)},
    huge={"shape": (2**40, 2**40)},
    negative={"shape": (-4,)},
    text={"shape": "ab"},
    float={"shape": (4.0,)},
    none={"shape": None},
    dimensions={"shape": (1,) * 99},
    objects={"dtype": np.dtype("O")},
    text_dtype={"dtype": np.dtype("U9")},
    no_dtype={"dtype": 3},
    big_endian={"dtype": np.dtype(">f4")},
    records={"dtype": np.dtype([("a", "f4")])},
    alignment={"numpy_array_alignment_bytes": 16, "shape": (4000,)},
)
def joblib_array(tmp, attributes):
    (tmp / "km.bin").write_bytes(wrapper(**attributes))
    return tmp / "km.bin"


@HOSTILE.family(zlib=("zlib", 3), gzip=("gzip", 3), bz2=("bz2", 3), xz=("xz", 3), lzma=("lzma", 3))
def joblib_compressed(tmp, compress):
    joblib.dump(k_means(), tmp / "km.bin", compress=compress)
    return tmp / "km.bin"


COSTLY = {name for name in HOSTILE if name.startswith(("bomb", "a_pickle", "a_bare_pickle"))}


@pytest.mark.parametrize("case", sorted(HOSTILE.keys() - COSTLY))
def test_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch, case):
    refused_in_one_line(tmp_path, monkeypatch, HOSTILE[case])


def test_there_are_many_hostile_cases():
    assert len(HOSTILE) >= 190


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_need_little_memory(tmp_path):
    refused_with_little_memory(tmp_path, HOSTILE)


# ---- Fuzzing -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, tuple[bytes, Path]]:
    """For each reader: the bytes of a small valid file, and the path to write variations of it to."""
    folder = tmp_path_factory.mktemp("valid")
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]).to(torch.bfloat16)}
    files = {kind: folder / kind for kind in KINDS}
    torch.save(tensors, files["zip"])
    torch.save(tensors, files["legacy"], _use_new_zipfile_serialization=False)
    joblib.dump(k_means(), files["joblib"])
    with pytest.MonkeyPatch.context() as patch:
        torch.save(fairseq_checkpoint(patch), files["fairseq"])
    return {kind: (path.read_bytes(), path) for kind, path in files.items()}


KINDS = ["zip", "legacy", "joblib", "fairseq"]


def test_the_valid_files_are_valid(valid):
    for data, path in valid.values():
        assert read_or_refuse(path, data)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4
    )
)
def test_mutated_files_are_refused_or_read(valid, kind, edits):
    """Each edit replaces some bytes by others, maybe fewer or more."""
    data, path = valid[kind]
    for where, n, new in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + n :]
    try:
        read_or_refuse(path, data)
    finally:
        path.write_bytes(valid[kind][0])


START = {
    "zip": b"PK\3\4",
    "legacy": pickled(LEGACY) + pickled(1001),
    "joblib": b"\x80\x04",
    "fairseq": b"\x80\x02}(",
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), start=st.booleans())
def test_random_bytes_are_refused(valid, kind, data, start):
    original, path = valid[kind]
    try:
        read_or_refuse(path, START[kind] * start + data)
    finally:
        path.write_bytes(original)


@settings(max_examples=100, deadline=None)
@given(
    code=st.lists(
        st.sampled_from(
            [
                b"}",
                b"]",
                b")",
                b"(",
                b"0",
                b"a",
                b"e",
                b"s",
                b"u",
                b"t",
                b"\x85",
                b"\x86",
                b"\x87",
                b"R",
                b"b",
                b"\x81",
                b"Q",
                b"K\1",
                b"N",
                b"\x88",
                b"q\0",
                b"h\0",
                b"\x94",
                b"X\1\0\0\0a",
                b"\x8f",
                b"\x90",
                b"\x91",
                b"\x93",
                b"J\xff\xff\xff\xff",
                b"ccollections\nOrderedDict\n",
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"ctorch\nFloatStorage\n",
                b"X\7\0\0\0storage",
                b"cargparse\nNamespace\n",
                b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n",
                b"cos\nsystem\n",
            ]
        ),
        max_size=40,
    )
)
def test_random_programs_execute_nothing(valid, code):
    path = valid["zip"][1].with_name("program")
    SEEN.clear()
    for data in (b"\x80\x02" + b"".join(code) + b".", b"\x80\x02}X\1\0\0\0w" + b"".join(code) + b"s."):
        torch_zip(path, data)
        read_or_refuse(path, path.read_bytes())
        read_or_refuse(path, data)
    assert not SEEN


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_every_single_flipped_byte_is_noticed_or_harmless(valid, kind):
    """In a zip it is refused, or where nobody looks. Legacy files have no checksums: a flipped byte in the
    numbers changes that number; anywhere else it is refused, or gives other names, shapes and dtypes that are
    possible."""
    data, path = valid[kind]
    expected = read_or_refuse(path, data)
    numbers = [data.index(raw(t)) for t in expected.values()]
    numbers = {i for at, t in zip(numbers, expected.values()) for i in range(at, at + t.nbytes)}
    for i in range(len(data)):
        tensors = read_or_refuse(path, data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        if i in numbers and kind != "zip":
            assert tensors.keys() == expected.keys()
            assert sum(raw(tensors[name]) != raw(expected[name]) for name in expected) == 1, i
        elif kind == "zip":
            assert tensors is None or i not in numbers
            assert_same(tensors or expected, expected)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(valid, kind):
    data, path = valid[kind]
    for n in {*range(0, len(data) - 1, 5), *range(len(data) - 50, len(data) - 1)}:
        assert read_or_refuse(path, data[:n]) is None, n
    path.write_bytes(data)
