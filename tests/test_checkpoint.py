"""checkpoint.py: files are read exactly, hostile ones refused; a training state continues the run exactly."""

import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hostile import (
    Cases,
    assert_same,
    raw,
    read_or_refuse,
    refused_in_one_line,
    refused_with_little_memory,
    run_python,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files import fails_and_leaves_the_old_file, fork, kill, leftovers, needs_fork
from torch import nn

import checkpoint
from checkpoint import (
    assign,
    has_training,
    load_state,
    load_training,
    read_tensors,
    remove_training,
    save_state,
    save_tensors,
    save_training,
    training_meta,
)
from files import write_json
from training.muon import Muon


def of_every_dtype() -> dict[str, torch.Tensor]:
    dtypes = set(checkpoint.DTYPES.values()) - {torch.bool}
    tensors = {str(dtype).split(".")[1]: torch.arange(48, dtype=torch.uint8).view(dtype) for dtype in dtypes}
    return tensors | {
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(3.1415927),
        "empty": torch.empty(0, 3),
        "rng": torch.Generator().manual_seed(0).get_state(),
        "transposed": torch.randn(3, 4).t(),
    }


# ---- What we write -----------------------------------------------------------------------------------------


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
        assert {**f.metadata(), "crc32": ""} == {"format": "pt", "who": "us", "crc32": ""}
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    assert_same(read_tensors(tmp_path / "theirs"), tensors)


def test_every_tensor_has_its_checksum_and_so_has_the_metadata(tmp_path):
    path = tmp_path / "s"
    save_state(path, of_every_dtype(), {"step": 7})
    with safetensors.safe_open(path, "pt") as file:
        sums = file.metadata()["crc32"].split(" ")
        assert len(sums) == 1 + len(file.keys()) and all(len(crc) == 8 for crc in sums)
    data = path.read_bytes()
    for old, new, named in (
        (b'step\\": 7', b'step\\": 9', "metadata"),
        (b'"BF16"', b'"F16" ', "'bfloat16'"),  # as many bytes: only a checksum can tell
        (b'"shape":[4,3]', b'"shape":[3,4]', "'transposed'"),
        (raw(torch.tensor(3.1415927)), raw(torch.tensor(3.25)), "'scalar'"),
    ):
        assert data.count(old) == 1, old
        path.write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match=f"the checksum of .*{named}.* does not match"):
            load_state(path)


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


def test_a_state_without_meta_is_refused_in_one_line(tmp_path):
    save_tensors(tmp_path / "a", {"w": torch.ones(1)})
    with pytest.raises(ValueError) as e:
        load_state(tmp_path / "a")
    assert str(e.value).startswith(f"{tmp_path / 'a'}: ") and "\n" not in str(e.value)


# ---- Into a module -----------------------------------------------------------------------------------------


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


# ---- Training state ----------------------------------------------------------------------------------------


def small_run(seed: int):
    """A small model, some of its weights for a fused AdamW, one for Muon; and a critic with its own AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    critic = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    optimizers = {
        "adamw": torch.optim.AdamW(
            [
                {"params": [model[0].weight, *model[3].parameters()]},
                {"params": [model[0].bias], "weight_decay": 0},
            ],
            lr=1e-2,
            fused=True,
        ),
        "muon": Muon([model[2].weight], lr=1e-2, weight_decay=0.1),
        "critic_adamw": torch.optim.AdamW(critic.parameters(), 1e-2, fused=True),
    }
    trained = {name: p for name, p in critic.named_parameters()}
    return model, {"model": model, "critic": trained}, optimizers


def train(modules, optimizers, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 8, generator=generator)
        y = modules["model"](x)
        weight = modules["critic"]["parametrizations.weight.original1"]
        loss = y.square().mean() + (y @ weight.T).abs().mean() + modules["critic"]["bias"].square().sum()
        loss = loss + modules["critic"]["parametrizations.weight.original0"].square().sum()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def everything(modules, optimizers) -> dict[str, torch.Tensor]:
    table = {name: t.clone() for name, t in modules["model"].state_dict().items()}
    table |= {f"critic.{name}": t.detach().clone() for name, t in modules["critic"].items()}
    for name, optimizer in optimizers.items():
        for i, (_, slots) in enumerate(optimizer.state.items()):
            table |= {f"{name}.{i}.{slot}": value.clone() for slot, value in slots.items()}
    return table


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_run_is_equal_to_one_that_never_stopped(tmp_path, stop):
    _, modules, optimizers = small_run(0)
    train(modules, optimizers, range(stop))
    meta = {"step": stop, "stage": {"lr": 0.1, "betas": [0.9, 0.95]}}
    save_training(tmp_path / "state", modules, optimizers, meta)
    train(modules, optimizers, range(stop, 12))

    _, again, their_optimizers = small_run(1)
    train(again, their_optimizers, range(3))  # what was there is replaced
    assert load_training(tmp_path / "state", again, their_optimizers) == meta
    train(again, their_optimizers, range(stop, 12))
    assert_same(everything(again, their_optimizers), everything(modules, optimizers))
    assert modules["model"][1].num_batches_tracked == 12  # buffers too


def test_a_parameter_without_gradients_has_no_state(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_training(tmp_path / "state", {"model": model}, {"adamw": optimizer}, {"step": 1})
    again = torch.optim.AdamW(model.parameters(), fused=True)
    load_training(tmp_path / "state", {"model": model}, {"adamw": again})
    assert set(again.state) == set(model[0].parameters())


def test_one_parameter_may_be_tied_and_belong_to_two_optimizers(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].weight = model[0].weight
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr) for name, lr in [("one", 0.1), ("two", 0.2)]
    }
    model[0](torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    save_training(tmp_path / "state", {"a": model, "b": model[0]}, optimizers, {"step": 1})
    assert len(read_tensors(tmp_path / "state")) == 1 + 2 * 3
    before = model[0].weight.detach().clone()
    model[0].weight.data.zero_()
    load_training(tmp_path / "state", {"a": model, "b": model[0]}, optimizers)
    assert torch.equal(model[1].weight, before)


def flip_a_bit(path: Path, byte: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x04
    path.write_bytes(data)


def two_states(folder: Path) -> tuple[Path, dict, dict]:
    """A state of step 4, with that of step 2 beside it; and what the two hold."""
    path = folder / "state"
    _, modules, optimizers = small_run(0)
    held = []
    for steps in (range(2), range(2, 4)):
        train(modules, optimizers, steps)
        save_training(path, modules, optimizers, {"step": steps.stop})
        held.append(everything(modules, optimizers))
    return path, *held


def test_the_state_before_the_last_one_is_kept_and_all_go_at_the_end(tmp_path):
    path, before, last = two_states(tmp_path)
    assert leftovers(tmp_path) == ["state", "state.previous"]
    for file, held, step in ((path, last, 4), (tmp_path / "state.previous", before, 2)):
        _, modules, optimizers = small_run(1)
        assert load_training(file, modules, optimizers) == {"step": step}
        assert_same(everything(modules, optimizers), held)
    assert has_training(path)
    remove_training(path)
    assert leftovers(tmp_path) == [] and not has_training(path)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone", "nan"])
def test_a_damaged_state_is_put_aside_and_the_one_before_it_taken(tmp_path, capsys, damage):
    path, before, _ = two_states(tmp_path)
    if damage == "nan":  # as versions without checks have written them
        tensors, meta = load_state(path)
        tensors = {name: t.clone() for name, t in tensors.items()}
        tensors["model.0.weight"][3, 3] = float("nan")
        save_state(path, tensors, meta)
    else:
        data = path.read_bytes()
        write = {"cut": lambda: path.write_bytes(data[:-1]), "empty": lambda: path.write_bytes(b"")}
        write |= {"bit": lambda: flip_a_bit(path), "gone": path.unlink}
        write[damage]()
    assert has_training(path)
    assert training_meta(path)["step"] == (4 if damage == "nan" else 2)
    _, modules, optimizers = small_run(1)
    assert load_training(path, modules, optimizers, steps=9) == {"step": 2}
    assert_same(everything(modules, optimizers), before)
    said = capsys.readouterr().out
    if damage == "gone":  # killed between two renamings: nothing is lost
        assert said == ""
    else:
        assert said.startswith(f"{path}: ") and "going on from the state before it, of step 2" in said
        assert said.count("\n") == 1 and leftovers(tmp_path) == ["state.damaged", "state.previous"]
    save_training(path, modules, optimizers, {"step": 6})  # does not put the damaged one before the good one
    assert load_training(tmp_path / "state.previous", modules, optimizers) == {"step": 2}
    assert load_training(path, modules, optimizers) == {"step": 6}


def test_two_damaged_states_are_one_line(tmp_path):
    path, *_ = two_states(tmp_path)
    for file in (path, tmp_path / "state.previous"):
        flip_a_bit(file)
    _, modules, optimizers = small_run(1)
    before = everything(modules, optimizers)
    with pytest.raises(ValueError, match="checksum of 'critic_adamw.* does not match; delete"):
        load_training(path, modules, optimizers)
    assert_same(everything(modules, optimizers), before) and training_meta(path) == {}


def test_a_state_beyond_the_end_of_the_run_is_damaged(tmp_path):
    path, before, _ = two_states(tmp_path)
    _, modules, optimizers = small_run(1)
    assert load_training(path, modules, optimizers, steps=3) == {"step": 2}
    assert_same(everything(modules, optimizers), before)
    with pytest.raises(ValueError, match="step is 2, not a whole number of 0 to 1; delete"):
        load_training(path, modules, optimizers, steps=1)


@needs_fork
def test_a_process_killed_between_the_two_renamings_loses_nothing(tmp_path, monkeypatch):
    path, _, last = two_states(tmp_path)
    answer, tell = os.pipe()
    replace = os.replace

    def slow(old, new):
        replace(old, new)
        os.write(tell, b"renamed")
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", slow)
        _, modules, optimizers = small_run(2)
        child = fork(lambda: save_training(path, modules, optimizers, {"step": 6}))
        assert os.read(answer, 7) == b"renamed"
        kill(child)
    assert not path.exists() and has_training(path)
    _, modules, optimizers = small_run(1)
    assert load_training(path, modules, optimizers) == {"step": 4}
    assert_same(everything(modules, optimizers), last)


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]


def damaged(data: st.DataObject, file: bytes, path: Path) -> None:
    """Writes the state `file` to `path` with one damage drawn from `data`."""
    header = 8 + int.from_bytes(file[:8], "little")
    kind = data.draw(st.sampled_from(["bits", "header", "cut", "grown", "tensors", "metadata"]))
    changed = bytearray(file)
    if kind in ("bits", "header"):
        places = st.integers(0, (header if kind == "header" else len(file)) - 1)
        for place, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=5)):
            changed[place] ^= 1 << bit
    elif kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(file) - 1))]
    elif kind == "grown":
        changed += data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(changed)
    if kind not in ("tensors", "metadata"):
        return
    path.write_bytes(file)  # a forger, whose checksums are right
    tensors, meta = load_state(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    if kind == "metadata":
        numbers = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=5))
        meta = data.draw(
            st.one_of(numbers, st.lists(numbers, max_size=2), st.dictionaries(st.text(), numbers))
        )
        meta = data.draw(st.sampled_from([meta, {"step": meta}]))
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3))
        dtype = data.draw(st.sampled_from(DTYPES))
        change = data.draw(st.sampled_from(["shape", "dtype", "gone", "renamed", "nan"]))
        old = tensors.pop(name)
        if change == "shape":
            tensors[name] = old if [*old.shape] == shape else torch.ones(shape, dtype=old.dtype)
        elif change == "dtype":
            tensors[name] = old.to(dtype)
        elif change == "renamed":
            tensors[data.draw(st.text(max_size=9))] = old
        elif change == "nan":
            tensors[name] = torch.full_like(old, float("nan")) if old.is_floating_point() else old
    save_state(path, tensors, meta)


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> tuple[Path, bytes, bytes, dict, dict]:
    path, before, last = two_states(tmp_path_factory.mktemp("states"))
    return path, path.read_bytes(), path.with_name("state.previous").read_bytes(), before, last


@pytest.mark.parametrize("kept", [False, True])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_state_damaged_at_random_is_refused_in_one_line_or_read_as_it_was(states, kept, data):
    """And never a crash, of the next step of a fused optimizer either. kept: the state before it is there."""
    path, file, previous, before, last = states
    remove_training(path)
    damaged(data, file, path)
    if kept:
        path.with_name("state.previous").write_bytes(previous)
    _, modules, optimizers = small_run(1)
    train(modules, optimizers, range(1))
    untouched = everything(modules, optimizers)
    try:
        meta = load_training(path, modules, optimizers, steps=9)
        assert 0 <= meta["step"] <= 9  # which a forger may change alone
        read = everything(modules, optimizers)
        assert_same(read, before if kept and not torch.equal(read["0.weight"], last["0.weight"]) else last)
        train(modules, optimizers, range(4, 5))
    except ValueError as error:
        message = str(error)
        assert not kept and message.startswith(f"{path}: ") and message.isprintable(), message
        assert len(message) < 400 + 2 * len(str(path))
        assert_same(everything(modules, optimizers), untouched)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the metadata of a state of small_run after two steps."""
    path = tmp_path_factory.mktemp("saved") / "state"
    _, modules, optimizers = small_run(0)
    train(modules, optimizers, range(2))
    save_training(path, modules, optimizers, {"step": 2})
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["crc32"]  # the tests' changes are meant to be found without
    return safetensors.torch.load_file(path), metadata


FIRST = "adamw.exp_avg.model.0.weight"  # the first moment of a weight (8, 8)


def put_in(name: str, tensor: torch.Tensor):
    return lambda tensors, metadata: tensors.update({name: tensor})


def take_out(*names: str):
    """Also from the count of tensors, as a careful forger would."""

    def change(tensors, metadata):
        for name in names:
            del tensors[name]
        metadata["tensors"] = str(len(tensors))

    return change


def moved(name: str, to: str):
    return lambda tensors, metadata: tensors.update({to: tensors.pop(name)})


def with_metadata(**metadata):
    return lambda tensors, before: before.update(metadata)


DAMAGED_STATES = {
    "three numbers for a weight of 64": (put_in(FIRST, torch.zeros(3)), FIRST),
    "the same count of numbers": (put_in(FIRST, torch.zeros(64)), FIRST),
    "a larger moment": (put_in(FIRST, torch.zeros(9, 8)), FIRST),
    "an empty moment": (put_in(FIRST, torch.zeros(0, 8)), FIRST),
    "a moment in half precision": (put_in(FIRST, torch.zeros(8, 8, dtype=torch.float16)), FIRST),
    "a moment in double precision": (put_in(FIRST, torch.zeros(8, 8, dtype=torch.float64)), FIRST),
    "a moment of integers": (put_in(FIRST, torch.zeros(8, 8, dtype=torch.int32)), FIRST),
    "a second moment of one number": (put_in("adamw.exp_avg_sq.model.0.bias", torch.zeros(())), "exp_avg_sq"),
    "a step of eight numbers": (put_in("adamw.step.model.0.bias", torch.zeros(8)), "adamw.step"),
    "a step of one dimension": (put_in("adamw.step.model.0.bias", torch.zeros(1)), "adamw.step"),
    "a whole step": (put_in("adamw.step.model.0.bias", torch.tensor(2)), "adamw.step"),
    "a small momentum": (put_in("muon.momentum.model.2.weight", torch.zeros(8)), "muon.momentum"),
    "momentum in half precision": (put_in("muon.momentum.model.2.weight", torch.zeros(8, 8).half()), "muon"),
    "a weight of another shape": (put_in("model.0.weight", torch.zeros(8, 9)), "model.0.weight"),
    "a weight in half precision": (put_in("model.0.weight", torch.zeros(8, 8).half()), "model.0.weight"),
    "a weight in double precision": (put_in("critic.bias", torch.zeros(1).double()), "critic.bias"),
    "a buffer of floats": (put_in("model.1.num_batches_tracked", torch.tensor(2.0)), "num_batches_tracked"),
    "no first moment": (take_out(FIRST), f"{FIRST} is missing"),
    "no step": (take_out("critic_adamw.step.critic.bias"), "critic_adamw.step.critic.bias is missing"),
    "no weight": (take_out("model.0.weight"), "model.0.weight is missing"),
    "no buffer": (take_out("model.1.running_mean"), "running_mean is missing"),
    "no moments, uncounted": (lambda t, m: [t.pop(n) for n in list(t) if n.startswith("muon.")], "tensors"),
    "a weight too many": (
        lambda t, m: t.update(more=torch.zeros(1)) or m.update(tensors=str(len(t))),
        "'more' has no place",
    ),
    "a slot that is not AdamW's": (
        moved("muon.momentum.model.2.weight", "adamw.momentum.model.2.weight"),
        "muon.momentum.model.2.weight is missing",
    ),
    "a slot of a buffer": (moved(FIRST, "adamw.exp_avg.model.1.running_mean"), "missing"),
    "another optimizer's name": (
        moved("muon.momentum.model.2.weight", "sgd.momentum.model.2.weight"),
        "muon.momentum.model.2.weight is missing",
    ),
    "a step of 2.5": (with_metadata(state='{"step": 2.5}'), "step is 2.5"),
    "a step of -1": (with_metadata(state='{"step": -1}'), "step is -1"),
    "a step that is true": (with_metadata(state='{"step": true}'), "step is True"),
    "a step in words": (with_metadata(state='{"step": "2"}'), "step is '2'"),
    "a step that is nothing": (with_metadata(state='{"step": null}'), "step is None"),
    "no step at all": (with_metadata(state="{}"), "'step'"),
    "a list": (with_metadata(state="[2]"), "damaged"),
    "no JSON": (with_metadata(state="{"), "damaged"),
    "no state": (lambda tensors, metadata: metadata.pop("state"), "'state'"),
    "no count": (lambda tensors, metadata: metadata.pop("tensors"), "'tensors'"),
}


@pytest.mark.parametrize("case", DAMAGED_STATES)
def test_a_damaged_state_is_one_line_and_changes_nothing(tmp_path, saved, case):
    change, named = DAMAGED_STATES[case]
    tensors, metadata = dict(saved[0]), dict(saved[1])
    change(tensors, metadata)
    path = tmp_path / "state"
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    _, modules, optimizers = small_run(1)
    train(modules, optimizers, range(1))
    before = everything(modules, optimizers)
    with pytest.raises(ValueError) as e:
        load_training(path, modules, optimizers)
    message = str(e.value)
    assert message.startswith(f"{path}: ") and named in message, message
    assert message.endswith(f"; delete {tmp_path} to begin anew") and message.isprintable()
    assert len(message) < 300 + 2 * len(str(path))
    assert_same(everything(modules, optimizers), before)


def test_the_undamaged_state_is_read(tmp_path, saved):
    safetensors.torch.save_file(saved[0], tmp_path / "state", saved[1])
    _, modules, optimizers = small_run(1)
    assert load_training(tmp_path / "state", modules, optimizers) == {"step": 2}


def test_a_state_of_another_model_is_refused(tmp_path):
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    save_training(tmp_path / "state", {"model": small}, {}, {"step": 1})
    for modules, named in (
        ({"model": large}, "model.weight is"),
        ({"another": small}, "another.weight is missing"),
    ):
        with pytest.raises(ValueError, match=named):
            load_training(tmp_path / "state", modules, {})
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-1])
    with pytest.raises(ValueError, match="to begin anew"):
        load_training(tmp_path / "state", {"model": small}, {})
    with pytest.raises(FileNotFoundError):
        load_training(tmp_path / "nothing", {"model": small}, {})


def test_mistakes_of_the_programmer_are_asserted(tmp_path):
    model = nn.Linear(2, 2)
    adamw = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    for modules, optimizers, step in (
        ({"model": model}, {"adamw": adamw}, 1),  # parameters of no module
        ({"a.b": model}, {}, 1),
        ({"adamw": model}, {"adamw": adamw}, 1),
        ({"model": model}, {}, 1.5),
        ({"model": model}, {}, True),
    ):
        with pytest.raises(AssertionError):
            save_training(tmp_path / "state", modules, optimizers, {"step": step})
    assert leftovers(tmp_path) == []


# ---- Half precision ----------------------------------------------------------------------------------------


def test_floats_are_written_in_half_precision_if_wanted(tmp_path):
    tensors = {
        "w": torch.randn(4, 3),
        "n": torch.arange(5),
        "b": torch.randn(2).bfloat16(),
        "s": torch.tensor(0.1),
    }
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors)
    size = path.stat().st_size
    save_tensors(path, read_tensors(path), dtype=torch.float16)  # the very file that is being read
    halved = read_tensors(path)
    assert_same(halved, tensors | {"w": tensors["w"].half(), "s": tensors["s"].half()})
    assert path.stat().st_size < size
    assert_same(safetensors.torch.load_file(path), halved)


# ---- Folders -----------------------------------------------------------------------------------------------


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


# ---- Hostile files -----------------------------------------------------------------------------------------

HOSTILE = Cases()


def safetensors_file(path: Path, header, data: bytes = bytes(16), n: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)
    return path


def entry(dtype="F32", shape=(4,), span=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@HOSTILE.family(
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


@HOSTILE.one
def safetensors_that_overlap(tmp):
    return safetensors_file(
        tmp / "a.safetensors", {"a": entry(shape=(3,), span=(0, 12)), "b": entry(shape=(2,), span=(8, 16))}
    )


@HOSTILE.one
def safetensors_that_share(tmp):
    return safetensors_file(tmp / "a.safetensors", {"a": entry(), "b": entry()})


@HOSTILE.family(
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


@HOSTILE.family(absurd=2**63, beyond_all=2**64 - 1, gigabytes=2**32, beyond_the_file=2**20, zero=0, one=1)
def safetensors_header_length(tmp, n):
    return safetensors_file(tmp / "a.safetensors", {"w": entry()}, n=n)


@HOSTILE.one
def safetensors_header_of_20_megabytes(tmp):
    return safetensors_file(tmp / "a.safetensors", b'{"w":' + b"[]," * 7_000_000 + b"}")


@HOSTILE.one
def safetensors_with_a_name_of_many_lines(tmp):
    return safetensors_file(tmp / "a.safetensors", {"a\nerror: \x1b[31m" * 100: entry("F31")})


# a false index


@HOSTILE.family(
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


@HOSTILE.family(
    list=[], text="x", no_map={"metadata": {}}, none={"weight_map": None}, pairs={"weight_map": [["w", "a"]]}
)
def index_that_is(tmp, table):
    write_json(tmp / "model.safetensors.index.json", table)
    return tmp


@HOSTILE.family(lacks={"w": "a", "v": "a"}, has_more={})
def index_whose_shard(tmp, more):
    save_tensors(tmp / "a", {"w": torch.ones(1), "u": torch.ones(1)})
    write_json(tmp / "model.safetensors.index.json", {"weight_map": {"w": "a", **more}})
    return tmp


@HOSTILE.one
def index_of_absurd_size(tmp):
    with open(tmp / "model.safetensors.index.json", "wb") as f:
        f.truncate(2**40)  # a sparse terabyte
    return tmp


@HOSTILE.one
def index_of_absurd_depth(tmp):
    (tmp / "model.safetensors.index.json").write_text("[" * 1_000_000)
    return tmp


# files that are something else


@HOSTILE.family(
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


@HOSTILE.one
def a_sparse_terabyte(tmp):
    with open(tmp / "a.bin", "wb") as f:
        f.truncate(2**40)
    return tmp / "a.bin"


@HOSTILE.one
def a_pipe(tmp):
    os.mkfifo(tmp / "a.bin")
    return tmp / "a.bin"


@HOSTILE.one
def a_device(tmp):
    (tmp / "a.bin").symlink_to("/dev/zero")
    return tmp / "a.bin"


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, monkeypatch, case):
    refused_in_one_line(tmp_path, monkeypatch, HOSTILE[case])


def test_there_are_many_hostile_cases():
    assert len(HOSTILE) >= 80


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_need_little_memory(tmp_path):
    refused_with_little_memory(tmp_path, HOSTILE)


# ---- Fuzzing -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, tuple[bytes, Path]]:
    """For each reader: the bytes of a small valid file, and the path to write variations of it to."""
    folder = tmp_path_factory.mktemp("valid")
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]).to(torch.bfloat16)}
    files = {"safetensors": folder / "safetensors", "index": folder / "model.safetensors.index.json"}
    save_tensors(files["safetensors"], tensors)
    write_json(files["index"], {"weight_map": {name: "safetensors" for name in tensors}})
    return {kind: (path.read_bytes(), path) for kind, path in files.items()}


KINDS = ["safetensors", "index"]


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


START = {"safetensors": struct.pack("<Q", 40) + b'{"', "index": b'{"weight_map": {'}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), start=st.booleans())
def test_random_bytes_are_refused(valid, kind, data, start):
    original, path = valid[kind]
    try:
        read_or_refuse(path, START[kind] * start + data)
    finally:
        path.write_bytes(original)


def test_every_single_flipped_byte_is_refused_or_changes_nothing(valid):
    """A flipped byte in numbers, names, shapes, dtypes and metadata does not match its checksum. One in the
    word "crc32" makes the file another's, without checksums, and leaves the rest as it is."""
    data, path = valid["safetensors"]
    expected = read_or_refuse(path, data)
    read = set()
    for bit in (0x01, 0x10, 0x80):
        for i in range(len(data)):
            tensors = read_or_refuse(path, data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            if tensors is not None:
                assert_same(tensors, expected)
                read.add(i)
    word = data.index(b"crc32")
    assert read <= set(range(word, word + 5))
    path.write_bytes(data)


def test_a_flipped_byte_in_another_s_file_changes_one_number(tmp_path):
    """Their files have no checksums."""
    path = tmp_path / "theirs"
    safetensors.torch.save_file({"w": torch.arange(6.0)}, path)
    data = bytearray(path.read_bytes())
    data[-6] ^= 0x10
    path.write_bytes(data)
    assert (read_tensors(path)["w"] != torch.arange(6.0)).sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused(valid, kind):
    data, path = valid[kind]
    for n in {*range(0, len(data) - 1, 5), *range(len(data) - 50, len(data) - 1)}:
        assert read_or_refuse(path, data[:n]) is None, n
    path.write_bytes(data)


# ---- Atomic writing ----------------------------------------------------------------------------------------


WRITERS = {
    "save_tensors": lambda path: save_tensors(path, {"w": torch.ones(100)}),
    "save_state": lambda path: save_state(path, {"w": torch.ones(100)}, {"step": 1}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, writer, fails, error):
    fails_and_leaves_the_old_file(tmp_path, monkeypatch, WRITERS[writer], fails, error)


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


# ---- Memory ------------------------------------------------------------------------------------------------


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
