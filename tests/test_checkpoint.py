"""checkpoint.py: files of every format are read exactly, hostile ones refused, writes are whole or not at all."""

import argparse
import collections
import io
import itertools
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import MiniBatchKMeans
from torch import nn

import checkpoint
from checkpoint import (
    assign,
    load_state,
    read_checkpoint,
    read_json,
    read_tensors,
    save_state,
    save_tensors,
    write_atomic,
    write_json,
)

ROOT = Path(__file__).parent.parent


def raw(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert raw(a[name]) == raw(b[name]), name


def of_every_dtype() -> dict[str, torch.Tensor]:
    dtypes = set(checkpoint.DTYPES.values()) - {torch.bool}
    tensors = {str(dtype).split(".")[1]: torch.arange(48, dtype=torch.uint8).view(dtype) for dtype in dtypes}
    return tensors | {
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "rng": torch.get_rng_state(),
        "transposed": torch.randn(3, 4).t(),
    }


# ---- what we write ---------------------------------------------------------------------------------


def test_state_round_trip_is_exact(tmp_path):
    tensors = of_every_dtype()
    meta = {"step": 7, "nested": [{"lr": 0.1 + 0.2, "none": None, "é\n": True}], "big": 2**70}
    save_state(tmp_path / "s", tensors, meta)
    loaded, loaded_meta = load_state(tmp_path / "s")
    assert_same(loaded, tensors)
    assert loaded_meta == meta


def test_the_safetensors_library_reads_ours_and_we_read_its(tmp_path):
    tensors = {name: t.contiguous() for name, t in of_every_dtype().items()}
    save_tensors(tmp_path / "ours", tensors, {"who": "us"})
    assert_same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    with safetensors.safe_open(tmp_path / "ours", "pt") as f:
        assert f.metadata() == {"format": "pt", "who": "us"}
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert_same(read_tensors(tmp_path / "theirs"), tensors)


def test_a_loaded_state_survives_the_next_save(tmp_path):
    save_state(tmp_path / "s", {"a": torch.ones(1000)}, {})
    loaded, _ = load_state(tmp_path / "s")
    save_state(tmp_path / "s", {"a": torch.zeros(1000)}, {})
    assert loaded["a"].sum() == 1000


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    save_tensors(tmp_path / "a", {"w": torch.ones(10)})
    before = (tmp_path / "a").read_bytes()
    read_tensors(tmp_path / "a")["w"].zero_()
    assert (tmp_path / "a").read_bytes() == before
    assert read_tensors(tmp_path / "a")["w"].sum() == 10


def test_json_round_trip(tmp_path):
    obj = {"a": [1, 2.5, None, "ü"], "b": {"c": False}}
    write_json(tmp_path / "a.json", obj)
    assert read_json(tmp_path / "a.json") == obj
    assert not list(tmp_path.glob(".*"))


def test_a_state_without_meta_is_refused_in_one_line(tmp_path):
    save_tensors(tmp_path / "a", {"w": torch.ones(1)})
    with pytest.raises(ValueError) as e:
        load_state(tmp_path / "a")
    assert str(e.value).startswith(f"{tmp_path / 'a'}: ") and "\n" not in str(e.value)


# ---- assign ----------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_assign_fills_every_weight(device, dtype):
    source = dict(network().state_dict())
    with torch.device(device):
        model = network()
    assign(model, source, "here", dtype=dtype)
    loaded = model.state_dict()
    assert loaded["1.num_batches_tracked"].dtype == torch.int64
    for name, t in source.items():
        expected = t.to(dtype) if dtype and t.is_floating_point() else t
        assert torch.equal(loaded[name], expected) and loaded[name].dtype == expected.dtype
        assert loaded[name].data_ptr() != t.data_ptr()
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(2, 3, dtype=dtype or torch.float32)).sum().backward()


@pytest.mark.parametrize("names", [["0.weight"], ["1.weight"], ["0.weight", "1.weight"]])
def test_assign_keeps_ties(names):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
    value = torch.randn(3, 3)
    assign(model, {name: value for name in names}, "here", torch.float16)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, value.half())


def test_tied_weights_that_differ_are_refused():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"here: 1\.weight"):
        assign(model, {"0.weight": torch.ones(3, 3), "1.weight": torch.zeros(3, 3)}, "here")


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("1.bias"), "1.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "extra"),
        (lambda t: t.update({"0.weight": torch.ones(4, 2)}), "0.weight"),
        (lambda t: t.update({"0.weight": torch.ones(4, 3, dtype=torch.int64)}), "0.weight"),
        (lambda t: t.update({"1.num_batches_tracked": torch.tensor(1.0)}), "1.num_batches_tracked"),
    ],
)
def test_assign_is_strict_both_ways_and_touches_nothing_before(change, named):
    model, tensors = network(), dict(network().state_dict())
    change(tensors)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as e:
        assign(model, tensors, "the/file")
    assert named in str(e.value) and "the/file" in str(e.value) and "\n" not in str(e.value)
    assert_same(model.state_dict(), before)


# ---- what others write -----------------------------------------------------------------------------


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


def shards(folder: Path, save, pattern: str, index: str) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}": torch.randn(3, i + 1) for i in range(5)}
    files = {name: pattern.format(i % 2 + 1) for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    write_json(folder / index, {"metadata": {"total_size": 1}, "weight_map": files})
    return tensors


@pytest.mark.parametrize(
    "save, pattern, index",
    [
        (safetensors.torch.save_file, "model-0000{}-of-00002.safetensors", "model.safetensors.index.json"),
        (torch.save, "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_sharded_folders(tmp_path, save, pattern, index):
    tensors = shards(tmp_path, save, pattern, index)
    assert_same(read_tensors(tmp_path), tensors)
    assert_same(read_tensors(tmp_path / index), tensors)


def test_symbolic_links_are_fine(tmp_path):
    """The Hugging Face cache: a snapshot folder of links to content-addressed files elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    tensors = shards(blobs, safetensors.torch.save_file, "m-{}.safetensors", "model.safetensors.index.json")
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../blobs/blob{i}")
    assert_same(read_tensors(snapshot), tensors)


@pytest.mark.parametrize("path", ["", "nothing", "nothing.index.json"])
def test_what_is_not_there_is_file_not_found(tmp_path, path):
    with pytest.raises(FileNotFoundError) as e:
        read_tensors(tmp_path / path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


# ---- hostile files ---------------------------------------------------------------------------------
# Each case writes one file and returns its path. All must end in one line of ValueError, with nothing executed and
# little memory used (both watched below).

HOSTILE = {}


def hostile(case):
    HOSTILE[case.__name__] = case
    return case


def hostile_family(**cases):
    """Cases that differ in one value: the decorated function gets (tmp_path, value)."""

    def add(write):
        for name, value in cases.items():
            HOSTILE[f"{write.__name__}_{name}"] = lambda tmp, value=value: write(tmp, value)

    return add


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


@hostile_family(
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


@hostile
def code_hides_in_a_fairseq_checkpoint(tmp):
    return torch_zip(
        tmp / "a.pt", pickled({"model": {"w": tensor()}, "extra_state": [call("os", "system", MARK)]})
    )


@hostile
def code_in_a_protocol_4_pickle(tmp):
    return torch_zip(tmp / "a.bin", pickled({"w": tensor(), "x": Call(os.system, MARK)}, 4))


@hostile
def code_in_a_legacy_file(tmp):
    torch.save({"w": Call(os.system, MARK)}, tmp / "a.bin", _use_new_zipfile_serialization=False)
    return tmp / "a.bin"


@hostile
def code_in_a_joblib_file(tmp):
    model = k_means()
    model.extra = Call(os.system, MARK)
    joblib.dump(model, tmp / "a.bin")
    return tmp / "a.bin"


@hostile
def code_in_a_bare_pickle(tmp):
    (tmp / "a.bin").write_bytes(pickle.dumps(Call(os.system, MARK)))
    return tmp / "a.bin"


@hostile_family(
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


@hostile_family(
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


@hostile
def a_pickle_of_100_megabytes(tmp):
    return torch_zip(tmp / "a.bin", pickled(["x" * 100_000_000]))


@hostile
def a_bare_pickle_of_100_megabytes(tmp):
    (tmp / "a.bin").write_bytes(pickled(["x" * 1_000_000 + str(i) for i in range(100)]))
    return tmp / "a.bin"


@hostile_family(
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


@hostile_family(list=[1], number=3, none=None, nested={"a": {"b": 1}}, integer_name={1: tensor()})
def no_table(tmp, value):
    return torch_zip(tmp / "a.bin", pickled(value))


@hostile
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


@hostile
def zip_bomb(tmp):
    return torch_zip(tmp / "a.bin", GOOD, {"0": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)


@hostile_family(
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


@hostile
def zip_records_that_overlap(tmp):
    """A record that hides inside another: its header is part of the other's bytes."""
    inner = b"PK\3\4" + bytes(22) + struct.pack("<2H", 14, 0) + b"archive/data/1" + bytes(16)

    def edit(d):
        at = directory(d, 2)
        return put(d, at + 42, "<L", d.index(inner))

    return edited(torch_zip(tmp / "a.bin", GOOD, {"0": inner, "1": bytes(16)}), edit)


@hostile
def zip64_with_absurd_count(tmp):
    def edit(d):
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, directory(d))
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(d) - 22, 1)
        return d[:-22] + end64 + locator + put(d[-22:], 10, "<H", 0xFFFF)

    return edited(torch_zip(tmp / "a.bin", GOOD), edit)


@hostile_family(
    torchscript={"archive/constants.pkl": b""},
    big_endian={"archive/byteorder": b"big"},
    two_pickles={"other/data.pkl": GOOD},
)
def archive_with(tmp, records):
    return torch_zip(tmp / "a.bin", GOOD, records=records)


@hostile
def a_zip_of_something_else(tmp):
    with zipfile.ZipFile(tmp / "a.bin", "w") as z:
        z.writestr("readme.txt", "hello")
    return tmp / "a.bin"


# legacy and joblib files that lie


def legacy_parts() -> dict[str, bytes]:
    return {
        "magic": pickled(checkpoint.LEGACY),
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


@hostile_family(
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


@hostile_family(
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


@hostile_family(
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


@hostile_family(zlib=("zlib", 3), gzip=("gzip", 3), bz2=("bz2", 3), xz=("xz", 3), lzma=("lzma", 3))
def joblib_compressed(tmp, compress):
    joblib.dump(k_means(), tmp / "km.bin", compress=compress)
    return tmp / "km.bin"


# safetensors that lie


def safetensors_file(path: Path, header, data: bytes = bytes(16), n: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)
    return path


def entry(dtype="F32", shape=(4,), span=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@hostile_family(
    beyond=entry(shape=(8,), span=(0, 32)),
    short=entry(shape=(2,), span=(0, 8)),
    hole=entry(shape=(2,), span=(8, 16)),
    dtype=entry("F31"),
    dtype_list=entry(["F32"]),
    product=entry(shape=(5,)),
    negative=entry(shape=(-4,)),
    two_negatives=entry(shape=(-2, -2)),
    float=entry(shape=(4.0,)),
    bool=entry(shape=(4, True)),
    text=entry(shape="4"),
    huge=entry(shape=(2**62, 2**62)),
    huge_and_empty=entry(shape=(0, 2**62, 2**62), span=(0, 0)),
    wraps=entry(shape=(2**32 + 4,)),
    dimensions=entry(shape=(4,) + (1,) * 99),
    backwards=entry(span=(16, 0)),
    before=entry(span=(-16, 0)),
    three_offsets=entry(span=(0, 8, 16)),
    float_offsets=entry(span=(0.0, 16.5)),
    text_offsets=entry(span=("0", "16")),
    no_offsets={"dtype": "F32", "shape": [4]},
    nothing={},
    list=[],
    number=3,
    none=None,
)
def safetensors_entry(tmp, value):
    return safetensors_file(tmp / "a.safetensors", {"w": value})


@hostile
def safetensors_that_overlap(tmp):
    return safetensors_file(
        tmp / "a.safetensors", {"a": entry(shape=(3,), span=(0, 12)), "b": entry(shape=(2,), span=(8, 16))}
    )


@hostile
def safetensors_that_share(tmp):
    return safetensors_file(tmp / "a.safetensors", {"a": entry(), "b": entry()})


@hostile_family(
    deep=b"{" + b'"a":{' * 100_000,
    deep_list=b'{"a":' + b"[" * 100_000,
    text=b"{not json}",
    list=b"[1]",
    cut=b'{"w":',
    twice=json.dumps({"w": entry()}).encode()[:-1] + b', "w": ' + json.dumps(entry()).encode() + b"}",
    utf8=b'{"\xff": 1}',
    digits=b'{"w": ' + b"9" * 10_000 + b"}",
    empty_table=b"{}",
    nul=b'{"\0": 1}',
)
def safetensors_header(tmp, header):
    return safetensors_file(tmp / "a.safetensors", header)


@hostile_family(absurd=2**63, beyond_all=2**64 - 1, gigabytes=2**32, beyond_the_file=2**20, zero=0, one=1)
def safetensors_header_length(tmp, n):
    return safetensors_file(tmp / "a.safetensors", {"w": entry()}, n=n)


@hostile
def safetensors_header_of_20_megabytes(tmp):
    return safetensors_file(tmp / "a.safetensors", b'{"w":' + b"[]," * 7_000_000 + b"}")


@hostile
def safetensors_with_a_name_of_many_lines(tmp):
    return safetensors_file(tmp / "a.safetensors", {"a\nerror: \x1b[31m" * 100: entry("F31")})


# an index that lies


@hostile_family(
    parent="../secret.safetensors",
    absolute="/etc/passwd",
    below="sub/model.safetensors",
    dot=".",
    up="..",
    backslash="..\\secret",
    empty="",
    number=3,
    none=None,
    list=[],
    nul="a\0b",
    newline="a\nb",
    itself="loop",
    home="~",
    url="http://x/y",
    drive="C:x",
    index="model.safetensors.index.json",
)
def index_that_names(tmp, file):
    (tmp / "loop").symlink_to(tmp)
    write_json(tmp / "model.safetensors.index.json", {"weight_map": {"w": file}})
    return tmp


@hostile_family(
    list=[], text="x", no_map={"metadata": {}}, none={"weight_map": None}, pairs={"weight_map": [["w", "a"]]}
)
def index_that_is(tmp, table):
    write_json(tmp / "model.safetensors.index.json", table)
    return tmp


@hostile_family(lacks={"w": "a", "v": "a"}, has_more={})
def index_whose_shard(tmp, more):
    save_tensors(tmp / "a", {"w": torch.ones(1), "u": torch.ones(1)})
    write_json(tmp / "model.safetensors.index.json", {"weight_map": {"w": "a", **more}})
    return tmp


@hostile
def index_of_absurd_size(tmp):
    with open(tmp / "model.safetensors.index.json", "wb") as f:
        f.truncate(2**40)  # a sparse terabyte
    return tmp


@hostile
def index_of_absurd_depth(tmp):
    (tmp / "model.safetensors.index.json").write_text("[" * 1_000_000)
    return tmp


# files that are something else


@hostile_family(
    empty=b"",
    one_byte=b"\x80",
    text=b"hello",
    pickle_start=b"\x80\x02",
    zeros=bytes(100),
    gzip=b"\x1f\x8b" + bytes(50),
    git_lfs=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    html=b"<!DOCTYPE html><html>" + bytes(30),
)
def content(tmp, data):
    (tmp / "a.bin").write_bytes(data)
    return tmp / "a.bin"


@hostile
def a_sparse_terabyte(tmp):
    with open(tmp / "a.bin", "wb") as f:
        f.truncate(2**40)
    return tmp / "a.bin"


@hostile
def a_pipe(tmp):
    os.mkfifo(tmp / "a.bin")
    return tmp / "a.bin"


@hostile
def a_device(tmp):
    (tmp / "a.bin").symlink_to("/dev/zero")
    return tmp / "a.bin"


WATCHED = {
    "os.system",
    "exec",
    "compile",
    "pickle.find_class",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "ctypes.dlopen",
}
SEEN: list[str] = []
sys.addaudithook(lambda event, args: SEEN.append(event) if event in WATCHED else None)

COSTLY = {name for name in HOSTILE if name.startswith(("bomb", "a_pickle", "a_bare_pickle"))}


@pytest.mark.parametrize("case", HOSTILE.keys() - COSTLY)
def test_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = HOSTILE[case](tmp_path)
    SEEN.clear()
    with pytest.raises(ValueError) as e:
        read_tensors(path)
    seen = list(SEEN)
    message = str(e.value)
    assert message.startswith(str(path)) and ": " in message, message
    assert message.isprintable() and len(message) < len(str(path)) + 500, message
    assert not (tmp_path / "executed").exists() and not seen


def test_there_are_many_hostile_cases():
    assert len(HOSTILE) >= 250


def run_python(code: str, stdin: str = "") -> str:
    """The output of a Python program that may import checkpoint."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_need_little_memory(tmp_path):
    """All cases in one process that may allocate 1 GB: each is refused, and none with a MemoryError."""
    paths = {}
    for name, case in HOSTILE.items():
        (tmp_path / name).mkdir()
        paths[name] = str(case(tmp_path / name))
    sparse = {"a_sparse_terabyte", "index_of_absurd_size"}  # their map alone is 1 TB
    output = run_python(
        """
        import json, re, resource, sys
        from checkpoint import read_tensors
        status = open("/proc/self/status").read()
        used = int(re.search(r"VmSize:\\s+(\\d+)", status)[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
        for name, path in json.load(sys.stdin).items():
            try:
                read_tensors(path)
                print("accepted", name)
            except ValueError as e:
                if "MemoryError" in str(e) or not str(e).isprintable() or not str(e).startswith(path):
                    print("badly refused", name, ascii(str(e)))
        """,
        json.dumps({name: path for name, path in paths.items() if name not in sparse}),
    )
    assert output == ""


# ---- fuzzing ---------------------------------------------------------------------------------------


def valid_files(folder: Path) -> dict[str, Path]:
    """One small valid file for each reader."""
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]).to(torch.bfloat16)}
    files = {kind: folder / kind for kind in ("safetensors", "zip", "legacy", "joblib", "fairseq", "index")}
    save_tensors(files["safetensors"], tensors)
    torch.save(tensors, files["zip"])
    torch.save(tensors, files["legacy"], _use_new_zipfile_serialization=False)
    joblib.dump(k_means(), files["joblib"])
    with pytest.MonkeyPatch.context() as patch:
        torch.save(fairseq_checkpoint(patch), files["fairseq"])
    files["index"] = folder / "model.safetensors.index.json"
    write_json(files["index"], {"weight_map": {name: "safetensors" for name in tensors}})
    return files


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, tuple[bytes, Path]]:
    """For each reader: a valid file's bytes, and the path to write variations of it to."""
    files = valid_files(tmp_path_factory.mktemp("valid"))
    return {kind: (path.read_bytes(), path) for kind, path in files.items()}


def read_or_refuse(path: Path, data: bytes) -> dict | None:
    """Reads `data` as a file: tensors whose every byte can be touched and that are no larger than it, or None."""
    path.write_bytes(data)
    try:
        tensors = read_tensors(path)
    except (ValueError, OSError) as e:
        assert str(path.parent) in str(e) and str(e).isprintable(), e
        return None
    for name, t in tensors.items():
        assert type(name) is str and t.nbytes <= max(len(data), 1000)
        raw(t)
    return {name: t.clone() for name, t in tensors.items()}  # the file is about to be overwritten in place


KINDS = ["safetensors", "zip", "legacy", "joblib", "fairseq", "index"]


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
    "safetensors": struct.pack("<Q", 40) + b'{"',
    "zip": b"PK\3\4",
    "legacy": pickled(checkpoint.LEGACY) + pickled(1001),
    "joblib": b"\x80\x04",
    "fairseq": b"\x80\x02}(",
    "index": b'{"weight_map": {',
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


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_single_flipped_byte_is_noticed_or_harmless(valid, kind):
    """In a zip it is refused, or where nobody looks. The other formats have no checksums: a flipped byte in the numbers
    changes that number; anywhere else it is refused, or gives other names, shapes and dtypes that are possible."""
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


# ---- atomic writing --------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


WRITERS = {
    "write_atomic": lambda path: write_atomic(path, b"new" * 100),
    "write_json": lambda path: write_json(path, {"new": 1}),
    "save_tensors": lambda path: save_tensors(path, {"w": torch.ones(100)}),
    "save_state": lambda path: save_state(path, {"w": torch.ones(100)}, {"step": 1}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, writer, fails, error):
    def fail(*args):
        raise error

    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        with pytest.raises(type(error)) as e:
            WRITERS[writer](path)
    if isinstance(error, OSError):
        assert str(path) in str(e.value) and "No space left" in str(e.value) and "\n" not in str(e.value)
    assert path.read_text() == "old" and leftovers(tmp_path) == ["file"]
    WRITERS[writer](path)
    assert path.read_bytes() != b"old" and leftovers(tmp_path) == ["file"]


def fork(function) -> int:
    """Starts function() in a child process that shares nothing with this one; returns its id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(
            1
        )  # the other threads of torch did not come along: waiting for them would be for ever
        try:
            function()
        finally:
            os._exit(0)
    return child


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@needs_fork
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path):
    """A limit on file sizes stands in for the full disk: the write fails in the middle in the same way."""
    import resource

    path = tmp_path / "model.safetensors"
    save_tensors(path, {"w": torch.ones(10)})
    before = path.read_bytes()
    answer, tell = os.pipe()

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_tensors(path, {"w": torch.ones(100_000), "v": torch.ones(100_000)})
        except OSError as e:
            os.write(tell, str(e).encode())

    os.waitpid(fork(write), 0)
    os.close(tell)
    message = os.read(answer, 10_000).decode()
    os.close(answer)
    assert str(path) in message and message.isprintable()
    assert path.read_bytes() == before and leftovers(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("path", ["missing/file", "folder"])
def test_a_path_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as e:
        write_atomic(tmp_path / path, b"x")
    assert str(tmp_path / path) in str(e.value) and leftovers(tmp_path) == ["folder"]


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@needs_fork
def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    save_state(path, {"w": torch.zeros(1000)}, {"step": 1})
    before = path.read_bytes()
    answer, tell = os.pipe()
    with monkeypatch.context() as patch:  # the child waits where all is written and nothing renamed
        patch.setattr(os, "fsync", lambda fd: (os.write(tell, b"written"), time.sleep(60)))
        child = fork(lambda: save_state(path, {"w": torch.ones(1000)}, {"step": 2}))
        assert os.read(answer, 7) == b"written"
        kill(child)
    assert path.read_bytes() == before and load_state(path)[1] == {"step": 1}
    assert len(leftovers(tmp_path)) == 2  # the killed process could not clean up ...
    save_state(path, {"w": torch.ones(1000)}, {"step": 3})
    assert leftovers(tmp_path) == ["state"] and load_state(path)[1] == {"step": 3}  # ... the next one does


@needs_fork
def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    """A process rewrites a file without pause and is killed at moments that nobody chose."""
    path = tmp_path / "file"
    write_atomic(path, b"0" * 1_000_000)

    def rewrite():
        for i in itertools.count():
            write_atomic(path, bytes([i % 256]) * 1_000_000)

    for round in range(20):
        child = fork(rewrite)
        time.sleep(0.01 + 0.0037 * round)
        kill(child)
        data = path.read_bytes()
        assert len(data) == 1_000_000 and len(set(data)) == 1


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="another process"):

        def first(file):
            file.write(b"first")
            write_atomic(path, b"second")

        checkpoint._replace(path, first)
    assert path.read_bytes() == b"second" and leftovers(tmp_path) == ["file"]


# ---- memory ----------------------------------------------------------------------------------------


def convert(folder: Path, tensors: int, mb: int) -> dict[str, float]:
    """Anonymous memory in MB while a .bin of so many fp32 tensors of so many MB becomes a bf16 module."""
    return json.loads(
        run_python(f"""
        import json, re, threading, time, torch
        from torch import nn
        from checkpoint import assign, read_tensors

        def anonymous():
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

        n = {mb} * 2**18 // 1024
        weights = {{f"{{i}}.weight": torch.full((n, 1024), float(i)) for i in range({tensors})}}
        torch.save(weights, "{folder}/pytorch_model.bin")
        del weights
        with torch.device("meta"):
            model = nn.ModuleList(nn.Linear(1024, n, bias=False) for _ in range({tensors}))
        begin, peak, done = anonymous(), [0], threading.Event()
        def sample():
            while not done.wait(0.005):
                peak[0] = max(peak[0], anonymous() - begin)
        watcher = threading.Thread(target=sample)
        watcher.start()
        tensors = read_tensors("{folder}")
        read = anonymous() - begin
        assign(model, tensors, "x", dtype=torch.bfloat16)
        done.set(); watcher.join()
        assert all((model[i].weight == i).all() for i in range({tensors}))
        print(json.dumps({{"read": read, "peak": peak[0]}}))
        """)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("tensors, mb", [(40, 8), pytest.param(68, 64, marks=pytest.mark.slow)])
def test_converting_needs_the_memory_of_the_result_only(tmp_path, tensors, mb):
    """320 MB of fp32 become bf16: reading costs nothing, converting half of the file's size.

    The slow one has more than 4 GB, where zip archives change to 64 bits."""
    used = convert(tmp_path, tensors, mb)
    assert used["read"] < 16
    assert used["peak"] < tensors * mb / 2 * 1.05 + 2 * mb


def test_halve_copies_a_folder_with_floats_in_half_precision(tmp_path):
    source, target = tmp_path / "model", tmp_path / "small"
    (source / "llama").mkdir(parents=True)
    tensors = {"w": torch.randn(4, 3), "n": torch.arange(5), "b": torch.randn(2).bfloat16()}
    checkpoint.save_tensors(source / "llama/model.safetensors", tensors)
    (source / "llama/config.json").write_text('{"dim": 3, "torch_dtype": "float32"}')
    checkpoint.halve(source, target)
    copy = checkpoint.read_tensors(target / "llama/model.safetensors")
    assert copy["w"].dtype == torch.float16 and torch.equal(copy["w"], tensors["w"].half())
    assert torch.equal(copy["n"], tensors["n"]) and copy["b"].dtype == torch.bfloat16
    assert (target / "llama/config.json").read_text() == '{"dim": 3, "torch_dtype": "float16"}'
    assert (target / "llama/model.safetensors").stat().st_size < (
        source / "llama/model.safetensors"
    ).stat().st_size
