"""training/states.py: states of divided models, from any number of processes to any other; damage, kills."""

import json
import multiprocessing
import os
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


def damaged_newest(out: Path, hurt) -> list:
    """What a run of two says and does that goes on after `hurt` has been done to the newest of its states."""
    on(2, out / "p", learn, out / "run", 0, 6, 2)
    assert sorted(path.name for path in (out / "run/shards").iterdir()) == ["step-4", "step-6"]
    hurt(out / "run/shards/step-6")
    found = on(2, out / "p", learn, out / "run", 4, STEPS)
    return found, [(out / f"p/said{rank}").read_text() for rank in range(2)]


def flip(path: Path, place: int = -30):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "hurt, said",
    [
        (lambda folder: flip(folder / "rank-1-of-2.safetensors"), "rank-1-of-2.safetensors: damaged"),
        (lambda folder: (folder / "rank-0-of-2.safetensors").unlink(), "rank-0-of-2.safetensors: missing"),
        (lambda folder: flip(folder / states.MARK), "mark.json: "),
    ],
)
def test_a_damaged_state_is_told_by_name_and_the_one_before_it_is_taken(tmp_path, hurt, said):
    (losses, _), lines = damaged_newest(tmp_path, hurt)
    whole = on(1, tmp_path / "p", learn, tmp_path / "whole", 0, STEPS)[0]
    assert losses == pytest.approx(whole[4:], abs=1e-5)
    assert lines[0].startswith(f"{tmp_path}/run/shards/step-6/{said}") and lines[0].count("\n") == 1
    assert lines[0].endswith("; going on from the state before it, of step 4\n") and lines[1] == ""
    assert (tmp_path / "run/shards/damaged").exists()


def test_any_number_of_processes_goes_on_from_what_any_other_has_saved(tmp_path):
    whole = on(1, tmp_path / "p", learn, tmp_path / "whole", 0, STEPS)[0]
    losses = []
    for ranks, first, last in ((4, 0, 3), (2, 3, 6), (1, 6, 9), (4, 9, STEPS)):
        found = on(ranks, tmp_path / "p", learn, tmp_path / "run", first, last)
        assert all(other == found[0] for other in found)
        losses += found[0]
    assert losses == pytest.approx(whole, abs=1e-5)


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
