"""training/states.py: states of divided models, from any number of processes to any other; damage, kills."""

import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import checkpoint
import llama
import lora
from training import states

STEPS = 12


def new_model() -> nn.Module:
    """11 rows: over 4 processes 3 + 3 + 3 + 2; 1 row: three of four have none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1))


def learn(folder: Path, first: int, last: int, save_every: int = 0) -> list[float]:
    """The losses of the steps first to last - 1 of one run, resumed at `first` from its state."""
    folder.mkdir(exist_ok=True)
    model = new_model()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = dict(model.named_parameters())
    optimizers = {"adamw": torch.optim.AdamW(trained.values(), 0.01, fused=True)}
    meta = states.load(folder, trained, optimizers, STEPS)
    assert meta.get("step", 0) == first, meta
    losses = []
    for step in range(first, last):
        ids = torch.randint(11, (12,), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(ranks)[states.rank()]
        loss = (model(mine) - mine[:, None] / 11).square().mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        loss = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
        if save_every and (step + 1) % save_every == 0:
            states.save(folder, trained, optimizers, {"step": step + 1})
    if last > first and not save_every:
        states.save(folder, trained, optimizers, {"step": last})
    states.wait()
    return losses


def one_of(rank: int, ranks: int, out: Path, work, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    said = (out / f"said{rank}").open("w")
    os.dup2(said.fileno(), 1)
    if ranks > 1:
        dist.init_process_group("gloo", (out / "store").as_uri(), rank=rank, world_size=ranks)
    try:
        found = work(*arguments)
    except (ValueError, OSError) as problem:
        found = f"{type(problem).__name__}: {problem}"
    (out / f"found{rank}.json").write_text(json.dumps(found))
    if ranks > 1:
        dist.destroy_process_group()


def on(ranks: int, out: Path, work, *arguments) -> list:
    """What `work` gives in each of so many processes."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["training.states", "torch.distributed.fsdp"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    processes = [context.Process(target=one_of, args=(i, ranks, out, work, arguments)) for i in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads((out / f"found{i}.json").read_text()) for i in range(ranks)]


# ---- What may have happened to a state ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """States of two processes after 4 and after 6 steps."""
    out = tmp_path_factory.mktemp("saved")
    on(2, out / "p", learn, out / "run", 0, 6, 2)
    assert sorted(path.name for path in (out / "run/shards").iterdir()) == ["step-4", "step-6"]
    return out / "run"


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip(path: Path, bit: int):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def rewrite(folder: Path, change):
    """The mark of a folder after `change` of its content, with the hash that belongs to it."""
    mark = json.loads((folder / states.MARK).read_text())
    del mark["blake2b"]
    change(mark)
    (folder / states.MARK).write_text(json.dumps(mark | {"blake2b": states.hash_of(mark)}))


def test_two_processes_agree_that_a_state_is_damaged_and_take_the_one_before_it(run, tmp_path):
    file = run / "shards/step-6/rank-1-of-2.safetensors"
    flip(file, 8 * file.stat().st_size - 200)
    (losses, _) = on(2, tmp_path / "p", learn, run, 4, STEPS)
    assert losses == pytest.approx(
        on(1, tmp_path / "p1", learn, tmp_path / "whole", 0, STEPS)[0][4:], abs=1e-5
    )
    said = [(tmp_path / f"p/said{rank}").read_text() for rank in range(2)]
    told = "damaged: its hash does not match; going on from the state before it, of step 4"
    assert said == [f"{file}: {told}\n", ""]
    assert (run / "shards/damaged").exists()


@pytest.mark.parametrize(
    "hurt, said",
    [
        (lambda new: (new / "rank-0-of-2.safetensors").unlink(), "rank-0-of-2.safetensors: missing"),
        (
            lambda new: (new / "rank-1-of-2.safetensors").write_bytes(b""),
            "rank-1-of-2.safetensors: has 0 bytes",
        ),
        (lambda new: (new / states.MARK).write_text("{"), "mark.json: "),
        (
            lambda new: rewrite(new, lambda mark: mark["meta"].update(step=13)),
            "step is 13, not a whole number",
        ),
        (
            lambda new: rewrite(new, lambda mark: mark["meta"].update(step=-1)),
            "step is -1, not a whole number",
        ),
        (
            lambda new: rewrite(new, lambda mark: mark["files"].popitem()),
            "0.weight: 36 of 66 numbers are there",
        ),
        (lambda new: rewrite(new, lambda mark: mark["files"].update({"../x": {}})), "not the name of a part"),
        (lambda new: rewrite(new, lambda mark: mark.update(files=7)), "mark.json: damaged or not"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_state_before_it_is_taken(run, hurt, said, capsys):
    hurt(run / "shards/step-6")
    learn(run, 4, 4)
    told = capsys.readouterr().out
    assert said in told and told.startswith(f"{run}/shards/step-6") and told.count("\n") == 1, told
    assert told.endswith("; going on from the state before it, of step 4\n") and len(told) < 400


def test_any_flipped_bit_is_noticed(run, capsys):
    generator = random.Random(0)
    files = sorted((run / "shards/step-6").iterdir())
    for _ in range(100):
        file = generator.choice(files)
        bit = generator.randrange(8 * file.stat().st_size)
        flip(file, bit)
        learn(run, 4, 4)
        assert file.name in capsys.readouterr().out
        os.rename(run / "shards/damaged", run / "shards/step-6")
        flip(file, bit)
    learn(run, 6, 6)
    assert capsys.readouterr().out == ""


def test_what_a_killed_run_has_left_without_a_mark_counts_for_nothing_and_is_removed(run, capsys):
    (run / "shards/step-6" / states.MARK).unlink()
    learn(run, 4, 4)
    assert capsys.readouterr().out == "" and not (run / "shards/step-6").exists()


def test_a_state_of_another_model_is_refused_and_nothing_is_changed(run):
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = {"adamw": torch.optim.AdamW(model.parameters(), fused=True)}
    with pytest.raises(
        ValueError, match=r"step-6: model.1.weight is \[10, 6\] .*, expected \[12, 6\]"
    ) as caught:
        states.load(run, dict(model.named_parameters()), optimizers)
    message = str(caught.value)
    assert message.endswith(f"; delete {run} to begin anew") and "\n" not in message
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not optimizers["adamw"].state and (run / "shards/step-6").exists()


def test_versions_of_torch(run, capsys, monkeypatch):
    rewrite(run / "shards/step-6", lambda mark: mark.update(torch="1.9.0"))
    learn(run, 6, 6)
    assert f"step-6: saved by torch '1.9.0', goes on with {torch.__version__};" in capsys.readouterr().out
    monkeypatch.setattr(states, "of_all", lambda value: [value, "2.8.0"])
    with pytest.raises(
        ValueError, match="process 1 has torch 2.8.0, process 0 has .*; install the same for all"
    ):
        states.check_versions()


# ---- Weights for others ------------------------------------------------------------------------------------

SIZES = dict(vocab_size=61, dim=16, n_layers=3, n_heads=2, hidden_dim=24)


def new_llama(seed: int, tied: bool) -> llama.Llama:
    torch.manual_seed(seed)
    return llama.Llama(llama.LlamaConfig(**SIZES, tie_embeddings=tied))


def export(folder: Path, ranks: int, tied: bool) -> None:
    """A LLaMA and its adapters, each saved by all ranks together."""
    model, adapted = new_llama(1, tied), lora.apply(new_llama(1, tied), 2, 4.0, ["q_proj"])
    for m in (model, adapted):
        for layer in m.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
        fully_shard(m, mesh=init_device_mesh("cpu", (ranks,)))
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size=4000)
    lora.save(adapted, folder / "lora")


@pytest.mark.parametrize("ranks, tied", [(2, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_what_many_ranks_have_of_a_model_they_save_together_as_hugging_face_does(tmp_path, ranks, tied):
    on(ranks, tmp_path / "p", export, tmp_path, ranks, tied)
    model = new_llama(1, tied)
    weights = dict(model.named_parameters())  # a tied one once
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    index = json.loads((tmp_path / "many" / checkpoint.INDEX).read_text())
    assert index["weight_map"].keys() == weights.keys()
    files = {*index["weight_map"].values()}
    assert (
        files == {path.name for path in (tmp_path / "many").glob("*.safetensors")} and len(files) > 2 * ranks
    )
    assert all((tmp_path / "many" / file).stat().st_size < 4000 + 2000 for file in files)
    for folder in ("one", "many"):
        found = checkpoint.read_tensors(tmp_path / folder)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids)
        assert torch.equal(llama.Llama.from_pretrained(tmp_path / "many")(ids), expected)
        adapted = lora.load(new_llama(1, tied), tmp_path / "lora")
        assert torch.equal(adapted(ids), expected)  # B is 0
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
        assert torch.allclose(theirs.eval()(ids).logits, expected, atol=1e-5)
    model.save_pretrained(tmp_path / "many")  # of one process, over what was there
    assert [path.name for path in (tmp_path / "many").glob("*.safetensors*")] == ["model.safetensors"]
