"""training/loop.py, training/precision.py: steps that are not finite, formats, memory, worker processes."""

import json
import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm import tqdm

import checkpoint
from run import Run
from training import precision
from training.loop import Loss, Optimization, check_ranks, optimize, read_ahead, told_of_memory


def batch_at(step: int) -> list:
    generator = torch.Generator().manual_seed(step)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator))]


def loss(model: nn.Module, batch) -> Loss:
    x, y = batch
    n = torch.tensor(len(x))
    return Loss((model(x) - y).square().sum(), n, n, {})


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def learn(out: Path, batch_at=batch_at, loss=loss, model=None, workers: int = 0, **section) -> nn.Module:
    model = model or new_model()
    run = Run(out, out, 0, torch.device("cpu"), workers)
    settings = dict(steps=16, batch_size=6, lr=0.01, warmup=0, bf16=False, eval_every=100, save_every=1)
    optimize(run, "name", out / "state", model, loss, batch_at, Optimization(**settings | section))
    return model


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics/name.jsonl").read_text().splitlines()]


def state(out: Path) -> tuple[dict, dict]:
    return checkpoint.load_state(out / "state/state.safetensors")


def test_a_step_without_a_target_changes_nothing(tmp_path):
    def empty(model: nn.Module, batch) -> Loss:
        found = loss(model, batch)
        return found._replace(total=0 * found.total, weight=torch.zeros(()))

    model = learn(tmp_path, loss=empty, steps=2, weight_decay=0.0)
    for p, before in zip(model.parameters(), new_model().parameters(), strict=True):
        assert torch.equal(p, before)
    for line in lines(tmp_path):
        assert line["loss"] == line["grad_norm"] == 0 and "skipped" not in line


# ---- Steps that are not finite -----------------------------------------------------------------------------


def not_a_number(bad: set[int]):
    """Batches whose input is NaN at the steps `bad`."""

    def batch(step: int) -> list:
        (x, y), *_ = batch_at(step)
        return [(x * float("nan") if step in bad else x, y)]

    return batch


def infinite_gradient(bad: set[int]):
    """Batches whose third tensor says that the loss is to be finite and its gradient not."""

    def batch(step: int) -> list:
        return [(*batch_at(step)[0], torch.tensor(step in bad))]

    def its_loss(model: nn.Module, batch) -> Loss:
        x, y, is_bad = batch
        found = loss(model, (x, y))
        root = (0 * model[2].weight.sum()).sqrt()  # 0, with the gradient 0 * inf
        return found._replace(total=found.total + root) if is_bad else found

    return batch, its_loss


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, muon, kind, capsys):
    saved = []
    save = checkpoint.save_training

    def record(path, modules, optimizers, meta):
        save(path, modules, optimizers, meta)
        tensors, meta = checkpoint.load_state(path)
        saved.append(({name: t.clone() for name, t in tensors.items()}, meta))

    monkeypatch.setattr(checkpoint, "save_training", record)
    batches, its_loss = not_a_number({3, 5}), loss
    if kind == "gradient":
        batches, its_loss = infinite_gradient({3, 5})
    learn(tmp_path, batches, its_loss, muon=muon, eval_every=6)
    for step in range(1, 16):
        before, after = saved[step - 1][0], saved[step][0]
        assert after.keys() == before.keys() and any("momentum" in name for name in after) == muon
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if step in (3, 5) else not any(same), step
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(16))
    assert {line["step"]: line["skipped"] for line in written if "skipped" in line} == {3: 1, 5: 2}
    assert all((line["grad_norm"] is None) == (line["step"] in (3, 5)) for line in written)
    assert all((line["loss"] is None) == (kind == "loss" and line["step"] in (3, 5)) for line in written)
    assert saved[-1][1] == {"step": 16, "bf16": False, "skipped": 2, "skipped_in_a_row": 0}
    assert "step 6: loss" in (shown := capsys.readouterr().out + capsys.readouterr().err) or shown == ""
    assert not shown or "2 step(s) skipped" in shown


def test_ten_in_a_row_end_the_run_with_one_line_and_the_last_good_state_stays(tmp_path):
    for _ in range(2):  # the same command again: the same line
        with pytest.raises(ValueError, match="10 steps in a row, up to step 13") as caught:
            learn(tmp_path, *infinite_gradient(set(range(4, 16))), save_every=3)
        message = str(caught.value)
        assert "learning rate is too high" in message and "lower lr" in message
        assert "\n" not in message and len(message) < 300
        tensors, meta = state(tmp_path)
        assert all(t.isfinite().all() for t in tensors.values())
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "short", lambda step: stop(step, 4), save_every=4)
    good, _ = state(tmp_path / "short")
    for name, tensor in good.items():
        assert torch.equal(tensor, tensors[name]), name  # those after step 3, the last that was good


def stop(step: int, at: int) -> list:
    """Batches until the power goes off."""
    if step == at:
        raise KeyboardInterrupt
    return batch_at(step)


def test_nine_in_a_row_do_not(tmp_path):
    model = learn(tmp_path, not_a_number({*range(9), *range(10, 16)}))
    assert state(tmp_path)[1] | {"bf16": False} == {
        "step": 16,
        "bf16": False,
        "skipped": 15,
        "skipped_in_a_row": 6,
    }
    assert not torch.equal(model[0].weight, new_model()[0].weight)  # step 9 was good


def test_a_resumed_run_counts_on(tmp_path):
    def batches(step: int) -> list:
        if step == 7 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        return not_a_number(set(range(1, 11)))(step)

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, batches)
    assert state(tmp_path)[1]["skipped_in_a_row"] == 6
    with pytest.raises(ValueError, match="10 steps in a row, up to step 10"):
        learn(tmp_path, batches)


def test_the_likely_cause_is_named(tmp_path):
    with pytest.raises(ValueError, match="the sound of this step is not finite"):
        learn(tmp_path / "sound", not_a_number(set(range(16))))
    model = new_model()
    model[0].weight.data[2, 1] = float("nan")
    with pytest.raises(ValueError, match="the weights that it began with are not finite"):
        learn(tmp_path / "weights", model=model)


# ---- Training states ---------------------------------------------------------------------------------------


def test_a_damaged_state_falls_back_to_the_one_before_and_ends_the_same(tmp_path, capsys):
    whole = learn(tmp_path / "whole", save_every=3)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, lambda step: stop(step, 7), save_every=3)
    file = tmp_path / "state/state.safetensors"
    data = bytearray(file.read_bytes())
    data[-30] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    again = learn(tmp_path, save_every=3)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{file}: damaged") and said.endswith(
        "going on from the state before it, of step 3"
    )
    assert len(said) < 300 + len(str(file))
    for a, b in zip(whole.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(tmp_path / "whole")]


def test_a_state_beyond_the_last_step_is_refused(tmp_path):
    learn(tmp_path)
    with pytest.raises(ValueError, match="step is 16, not a whole number of 0 to 9; delete"):
        learn(tmp_path, steps=9)


# ---- bfloat16 where it is faster ---------------------------------------------------------------------------


@pytest.fixture
def formats(monkeypatch) -> list[torch.dtype]:
    """A machine with instructions for bfloat16; of each product of the model, its format."""
    found = []
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    linear = nn.functional.linear

    def spy(*arguments):
        y = linear(*arguments)
        found.append(y.dtype)
        return y

    monkeypatch.setattr(nn.functional, "linear", spy)
    return found


@pytest.mark.parametrize("seconds, chosen", [((1.0, 0.5), True), ((1.0, 1.34), False), ((1.0, 0.99), False)])
def test_the_faster_format_is_used_and_a_resumed_run_goes_on_in_it(
    tmp_path, monkeypatch, formats, capsys, seconds, chosen
):
    monkeypatch.setattr(precision, "measure", lambda model, loss: seconds)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, lambda step: stop(step, 5), bf16=True, save_every=2)
    dtype = torch.bfloat16 if chosen else torch.float32
    said = capsys.readouterr().out
    assert f"{seconds[1]:.2f} x float32's time: {str(dtype).split('.')[1]}" in said
    assert set(formats) == {dtype} and state(tmp_path)[1]["bf16"] is chosen

    formats.clear()  # another machine, which would choose the other
    monkeypatch.setattr(precision, "measure", None)
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    learn(tmp_path, bf16=True, save_every=2)
    assert set(formats) == {dtype} and state(tmp_path)[1]["bf16"] is chosen
    assert ("goes on in bfloat16" in capsys.readouterr().out) == chosen


def test_a_cpu_without_such_instructions_measures_nothing(tmp_path, monkeypatch, formats):
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    monkeypatch.setattr(precision, "measure", None)
    learn(tmp_path, bf16=True)
    assert set(formats) == {torch.float32} and state(tmp_path)[1]["bf16"] is False


def test_neither_is_measured_where_it_is_not_wanted_or_on_a_gpu(monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    monkeypatch.setattr(precision, "measure", None)
    for wanted, kind, chosen in ((False, "cpu", False), (True, "cuda", True), (False, "cuda", False)):
        choice = precision.choose_bf16("x", wanted, torch.device(kind), {}, None, None, None)
        assert choice is chosen, (wanted, kind)
    assert precision.choose_bf16("x", True, torch.device("mps"), {}, None, None, None) is False


def test_measuring_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: True)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    seen = []

    def its_loss(batch, bf16: bool):
        seen.append(bf16)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(batch).float().square().sum()

    def batch():
        torch.manual_seed(7)
        return torch.randn(8, 4)

    choice = precision.choose_bf16("x", True, torch.device("cpu"), {}, model, batch, its_loss)
    assert type(choice) is bool and seen[:2] == [False, True] and len(seen) % 2 == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---- Memory, processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(1 << 55),  # torch's own refusal
        lambda: bytearray(1 << 62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: (_ for _ in ()).throw(RuntimeError("MPS backend out of memory (allocated: 1 GB)")),
    ],
)
def test_refused_memory_is_one_line_with_advice_and_the_bar_is_closed(tmp_path, ask):
    def hungry(model, batch):
        ask()

    with pytest.raises(ValueError) as caught:
        learn(tmp_path, loss=hungry, batch_size=6)
    message = str(caught.value)
    assert message.startswith("not enough memory") and "lower batch_size (now 6)" in message
    assert "raise accumulate (now 1)" in message and "\n" not in message and len(message) < 300
    assert not list(tqdm._instances)  # nothing is drawn after the line


def test_other_errors_are_not_taken_for_refused_memory():
    with pytest.raises(RuntimeError, match="a bug"), told_of_memory("advice"):
        raise RuntimeError("a bug")


def fails(step: int) -> list:
    raise ValueError("wav/3.wav: damaged")


needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")


@needs_fork
@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_found_in_a_worker_process_is_the_same_line(tmp_path, workers):
    with pytest.raises(ValueError) as caught:
        learn(tmp_path, fails, workers=workers)
    assert str(caught.value) == "wav/3.wav: damaged" and not list(tqdm._instances)


@needs_fork
def test_workers_prepare_the_same_batches(tmp_path):
    alone, helped = learn(tmp_path / "0"), learn(tmp_path / "2", workers=2)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), helped.parameters()))


@needs_fork
def test_a_thread_is_one_batch_ahead_and_ends_with_its_reader():
    made = []
    threads = threading.active_count()
    batches = read_ahead(made.append(i) or i for i in range(5))
    assert next(batches) == 0
    assert next(batches) == 1
    batches.close()  # as when a step raises
    assert made in ([0, 1], [0, 1, 2]), "the third was asked for when the second was handed out"
    assert threading.active_count() == threads
    assert list(read_ahead(iter([]))) == [] and list(read_ahead(range(3))) == [0, 1, 2]


def test_what_the_thread_raises_reaches_the_step_that_waits():
    def fail():
        yield 1
        raise MemoryError("of the thread")

    batches = read_ahead(fail())
    assert next(batches) == 1
    with pytest.raises(MemoryError, match="of the thread"):
        next(batches)


def test_too_little_shared_memory_is_told_and_no_endless_wait(tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    run = Run(tmp_path, tmp_path, 0, torch.device("cpu"))
    object.__setattr__(run, "workers", 1)  # that it was large enough for one number has been checked
    with pytest.raises(ValueError, match="No space left on device; use --workers 0") as caught:
        optimize(run, "name", tmp_path, new_model(), loss, batch_at, Optimization(steps=2, bf16=False))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_workers_that_cannot_be_are_refused_before_anything_begins(tmp_path, monkeypatch):
    def no_memory(self):
        raise RuntimeError("unable to open shared memory object </torch_1> in read-write mode: No such file")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", no_memory)
        with pytest.raises(ValueError, match="no shared memory .* use --workers 0"):
            Run(tmp_path, tmp_path, 0, torch.device("cpu"), 2)
        Run(tmp_path, tmp_path, 0, torch.device("cpu"), 0)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="cannot fork processes; use --workers 0"):
        Run(tmp_path, tmp_path, 0, torch.device("cpu"), 2)


def test_a_batch_that_ranks_cannot_divide_is_told_by_its_key():
    with pytest.raises(ValueError, match=r"stage1.batch_size is 4: .* 3 process\(es\) x stage1.accumulate 2"):
        check_ranks("stage1", Optimization(batch_size=4, accumulate=2), 3)
    check_ranks("stage1", Optimization(batch_size=4, accumulate=2), 2)
    check_ranks("normalizer", Optimization(steps=0, batch_size=1), 8)  # it does not run
