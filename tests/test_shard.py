"""training/shard.py: a model on one process, whole on two, divided among two and four: all learn the same."""

import json
import multiprocessing
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import run
from generate import decode_one_token, is_small, prefill
from hubert import HuBERT, HuBERTConfig
from llama import Llama, LlamaConfig, next_token_losses, to_int8
from training import muon, precision, shard
from training.loop import Loss, Objective, Optimization, check_ranks, no_probe, optimize

STEPS = 20
METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")


# ---- Models as small as can be, each with its loss and its batches -----------------------------------------
# A batch is a function of the step; a rank takes its rows of it, as many micro-batches as it is told.


def language(step: int) -> tuple:
    """(ids, mask, docs): rows of two documents, the second padded, targets in a part of the first."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 61, (8, 20), generator=generator)
    docs = torch.zeros(8, 20, dtype=torch.long)
    docs[:, 12:] = 1
    docs[::2, 17:] = -1
    mask = torch.rand(8, 20, generator=generator) < 0.7
    return ids, mask, docs


def language_loss(model: Llama, batch) -> Loss:
    ids, mask, docs = batch
    total, weight = next_token_losses(model, ids, mask & (docs >= 0), None, docs)
    return Loss(total, weight, (docs >= 0).sum(), {})


def speech(step: int) -> tuple:
    generator = torch.Generator().manual_seed(step)
    wav = torch.randn(8, 4000, generator=generator)
    labels = torch.randint(0, 7, (8, 12), generator=generator)
    return wav, labels, torch.rand(8, 12, generator=generator) < 0.5


def masked_loss(model: HuBERT, batch) -> Loss:
    total, n, correct, _ = model.masked_losses(*batch)
    return Loss(total, n, torch.full_like(n, batch[1].numel()), {"accuracy": (correct, n)})


def llama(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**dict(vocab_size=61, dim=16, n_layers=3, n_heads=2, hidden_dim=24) | changes))


def adapted() -> Llama:
    return lora.apply(llama(), 2, 4.0, ["q_proj", "v_proj"])


def adapted_in_int8() -> Llama:
    return lora.apply(to_int8(llama()), 2, 4.0, ["q_proj", "v_proj"])


def grouped() -> Llama:
    return llama(tie_embeddings=True, n_kv_heads=1)


def hubert(**changes) -> HuBERT:
    torch.manual_seed(0)
    sizes = dict(dim=16, n_layers=2, n_heads=2, ffn_dim=24, pos_kernel=4, pos_groups=2, proj_dim=8)
    return HuBERT(HuBERTConfig(conv_dim=[8] * 7, n_classes=7, **sizes | changes))


MODELS = {  # (model, its batch at a step, its loss)
    "llama": (llama, language, language_loss),
    "tied": (grouped, language, language_loss),
    "lora": (adapted, language, language_loss),
    "int8": (adapted_in_int8, language, language_loss),
    "hubert": (hubert, speech, masked_loss),
}


def mine(batch_at, accumulate: int):
    """step -> this rank's micro-batches of it, of unequal sizes if they must be."""

    def at(step: int) -> list[tuple]:
        batch = batch_at(step)
        pieces = torch.arange(len(batch[0])).tensor_split(run.world_size() * accumulate)
        own = pieces[run.rank() :: run.world_size()]
        return [tuple(t[rows] for t in batch) for rows in own]

    return at


Learned = tuple[list[float], dict[str, torch.Tensor]]  # (losses, weights) after 20 steps


def learn(
    out: Path, kind: str, section: dict, model=None, probe=no_probe, fill=None, device="cpu"
) -> Learned:
    make, batch_at, loss = MODELS[kind]
    model = model or make().to(device)
    settings = dict(steps=STEPS, batch_size=8, lr=3e-3, warmup=2, bf16=False, eval_every=10, save_every=1000)
    settings = Optimization(**settings | section)
    where = run.Run(out, out, 0, torch.device(device))
    batches = mine(batch_at, settings.accumulate)
    optimize(where, "name", out / "state", model, loss, batches, settings, probe, fill)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()}
    losses = []
    if run.rank() == 0:
        losses = [json.loads(line)["loss"] for line in (out / "metrics/name.jsonl").read_text().splitlines()]
    return losses, weights


def one_of_many(rank: int, ranks: int, out: Path, jobs: dict):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", (out / "store").as_uri(), rank=rank, world_size=ranks)
    found = {name: job(out / name, *arguments) for name, (job, *arguments) in jobs.items()}
    torch.save(found, out / f"found{rank}.pt")
    run.destroy()


def together(ranks: int, out: Path, jobs: dict) -> list[dict]:
    """What each of so many processes found: {name: job(out / name, ...)} for the jobs {name: (job, ...)}."""
    processes = [CONTEXT.Process(target=one_of_many, args=(rank, ranks, out, jobs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [torch.load(out / f"found{rank}.pt", weights_only=True) for rank in range(ranks)]


def distance(one: tuple, other: tuple) -> tuple[float, float]:
    """Between two results of `learn`: (of the losses, of the weights), the largest difference."""
    losses = max((abs(a - b) for a, b in zip(one[0], other[0], strict=True)), default=0.0)
    assert one[1].keys() == other[1].keys()
    return losses, max((one[1][name] - other[1][name]).abs().max().item() for name in one[1])


# ---- The same on any number of processes -------------------------------------------------------------------

CASES = {
    "llama": ("llama", {}),
    "tied": ("tied", {}),
    "lora": ("lora", {}),
    "hubert": ("hubert", {}),
    "muon": ("llama", {"muon": True}),
    "accumulated": ("llama", {"accumulate": 2}),
    "again": ("llama", {"checkpointing": "block"}),
    "some again": ("llama", {"checkpointing": "selective"}),
}
INT8 = {"int8": ("int8", {}), "int8 again": ("int8", {"checkpointing": "block"})}
IN_INT8 = ["int8"] * (shard.version_of_torch() >= (2, 12))  # kinds that this torch divides
if IN_INT8:
    CASES |= INT8


@pytest.fixture(scope="module")
def alone(one_thread, tmp_path_factory) -> dict:
    """What one process learns."""
    out = tmp_path_factory.mktemp("alone")
    return {name: learn(out / name, kind, section) for name, (kind, section) in CASES.items()}


@pytest.mark.parametrize("ranks, sharding", [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_many_processes_learn_what_one_learns(alone, tmp_path, ranks, sharding):
    jobs = {name: (learn, kind, section | {"sharding": sharding}) for name, (kind, section) in CASES.items()}
    jobs["owners"] = (owners_of_odd_matrices,)
    found = together(ranks, tmp_path, jobs)
    for name in CASES:
        losses, weights = distance(found[0][name], alone[name])
        assert losses < 1e-5 and weights < 1e-5, f"{name}: {losses} {weights}"
        assert found[0][name][0][-1] < found[0][name][0][0], f"{name} has learned"
        for other in found[1:]:
            assert distance(([], other[name][1]), ([], found[0][name][1]))[1] == 0, name
    assert all(rank["owners"] < 1e-5 for rank in found)
    unchanged(found[0]["lora"][1], adapted())
    if IN_INT8:
        unchanged(found[0]["int8"][1], adapted_in_int8())


def unchanged(weights: dict, model: nn.Module):
    """Asserts that all weights are those of `model` to the last bit, but for the adapters, which have
    learned."""
    for name, before in model.named_parameters():
        same = torch.equal(weights[name], before.to(weights[name].dtype))
        assert same != ("lora_" in name), name


def owners_of_odd_matrices(out: Path) -> float:
    """How far muon.by_owners is from `orthogonal`, where some ranks have fewer rows, no row, no matrix."""
    ranks, me = run.world_size(), run.rank()
    torch.manual_seed(1)
    far = 0.0
    for count, m, n in ((1, 7, 3), (5, 5, 8), (11, 3, 4)):
        whole = torch.randn(count, m, n)
        rows = [*torch.arange(m).chunk(ranks), *[torch.arange(0)] * ranks][me]
        updates = muon.by_owners([*whole[:, rows].unbind(0)], m, torch.distributed.group.WORLD)
        for update, expected in zip(updates, muon.orthogonal(whole)[:, rows], strict=True):
            far = max([far, *(update - expected).abs().flatten().tolist()])
    return far


# ---- A model that no process has whole, and one that is read while it learns -------------------------------


def filled(out: Path, kind: str, section: dict) -> Learned:
    """`learn` of a model on meta, whose weights are put where they belong when it has been divided."""
    whole = dict(MODELS[kind][0]().named_parameters())

    @torch.no_grad()
    def fill(model: nn.Module):
        for name, p in model.named_parameters():
            assert p.to_local().numel() < whole[name].numel() or len(whole[name]) == 1
            p.copy_(distribute_tensor(whole[name], p.device_mesh, p.placements))

    with torch.device("meta"):
        model = MODELS[kind][0]()
    return learn(out, kind, section, model, fill=fill)


def read(out: Path, kind: str, section: dict) -> tuple[list[float], list[list[int]]]:
    """(held-out losses, answers) of a model that is asked for them every five steps."""
    model = MODELS[kind][0]()
    answers = []

    @torch.no_grad()
    def probe():
        total, weight, *_ = language_loss(model, language(1000))
        ids = language(1000)[0][:2, :9]
        for _ in range(2):  # the second time, blocks are not gathered before
            cache = model.new_cache(2, 14, torch.tensor([0, 3]))
            with torch.inference_mode():
                assert is_small(model)
                found = [prefill(model, ids, cache).argmax(-1)]
                found += [decode_one_token(model, found[-1], cache).argmax(-1) for _ in range(4)]
            answers.append(torch.stack(found).tolist())
        return {"held_out": (total / weight).item()}, ""

    learn(out, kind, section | {"eval_every": 5}, model, probe)
    lines = [json.loads(line) for line in (out / "metrics/name.jsonl").read_text().splitlines()]
    return [line["held_out"] for line in lines if "held_out" in line], answers


def test_no_process_need_have_the_whole_model_and_all_may_read_it(alone, one_thread, tmp_path):
    sections = {"read": {"sharding": "fsdp"}, "again": {"sharding": "fsdp", "checkpointing": "selective"}}
    jobs = {name: (read, "llama", section) for name, section in sections.items()}
    jobs |= {kind: (filled, kind, {"sharding": "fsdp"}) for kind in ("llama", "tied", "lora", *IN_INT8)}
    found = together(2, tmp_path, jobs)
    losses, answers = read(tmp_path / "alone", "llama", {})
    for name in sections:
        assert found[0][name][1] == found[1][name][1] == answers and len(answers) == 8
        assert found[0][name][0] == pytest.approx(losses, abs=1e-5) and len(losses) == 4
    for kind in ("llama", "tied"):
        assert max(distance(found[0][kind], alone[kind])) < 1e-5
    unchanged(found[0]["lora"][1], adapted())
    if IN_INT8:
        unchanged(found[0]["int8"][1], adapted_in_int8())


# ---- bfloat16 ----------------------------------------------------------------------------------------------


def products_in_bf16(out: Path, kind: str, section: dict) -> Learned:
    """`learn` on a machine that is faster in bfloat16."""
    precision.has_bf16, precision.measure = lambda: True, lambda model, loss: (1.0, 0.5)
    return learn(out, kind, section | {"bf16": True})


def test_products_weights_and_moments_in_bfloat16(alone, one_thread, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", precision.has_bf16)
    monkeypatch.setattr(precision, "measure", precision.measure)
    fsdp = {"sharding": "fsdp"}
    jobs = {
        "llama": (products_in_bf16, "llama", fsdp),
        "lora": (products_in_bf16, "lora", fsdp),
        "state": (learn, "llama", fsdp | {"state_dtype": "bfloat16"}),
    }
    jobs |= {kind: (products_in_bf16, kind, fsdp) for kind in IN_INT8}
    found = together(2, tmp_path, jobs)[0]
    whole = learn(tmp_path / "whole", "llama", {"state_dtype": "bfloat16"})
    for name in jobs:
        losses, _ = distance(found[name], other := alone.get(name, whole))
        assert 0 < losses < 0.02 * other[0][0], name
    assert {w.dtype for w in found["llama"][1].values()} == {torch.float32}
    formats = {"lora_" in name: w.dtype for name, w in found["lora"][1].items()}
    assert formats == {True: torch.float32, False: torch.bfloat16}
    unchanged(found["lora"][1], adapted())
    for kind in IN_INT8:
        layer = {
            name: found[kind][1][f"model.layers.0.mlp.up_proj.{name}"].dtype for name in ("weight", "scale")
        }
        assert layer == {"weight": torch.int8, "scale": torch.float32}
    for weights in (found["state"][1], whole[1]):
        assert {w.dtype for w in weights.values()} == {torch.bfloat16}


# ---- Activations computed again ----------------------------------------------------------------------------


def gradients(kind: str, checkpointing: str) -> list[torch.Tensor]:
    make, batch_at, loss = MODELS[kind]
    torch.manual_seed(5)  # of dropout
    model = make().train()
    section = Optimization(checkpointing=checkpointing)
    objective = shard.distribute("name", Objective(model, loss), section, torch.device("cpu"), False)
    objective(batch_at(0)).total.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["llama", "tied", "lora", "hubert", "dropout"])
def test_activations_computed_again_give_the_same_gradients_to_the_last_bit(kind, monkeypatch, one_thread):
    monkeypatch.setitem(MODELS, "dropout", (lambda: hubert(dropout=0.3), speech, masked_loss))
    kept = gradients(kind, "none")
    for checkpointing in ("block", "selective"):
        again = gradients(kind, checkpointing)
        assert len(kept) == len(again) > 0 and all(map(torch.equal, kept, again))


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_blocks_are_compiled_once_for_all_on_a_gpu(checkpointing, monkeypatch, one_thread):
    """With aot_eager, which traces as inductor does and needs no compiler; the model stays on the CPU."""
    monkeypatch.setattr(shard, "memory", lambda device: 2**40)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = llama(), llama()
    section = Optimization(compile=True, checkpointing=checkpointing)
    for model, device in ((plain, torch.device("cpu")), (compiled, torch.device("cuda"))):
        objective = shard.distribute("x", Objective(model, language_loss), section, device, False)
        objective(language(0)).total.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for one, other in zip(plain.parameters(), compiled.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_what_is_no_step_is_not_compiled(monkeypatch, one_thread):
    monkeypatch.setattr(shard, "memory", lambda device: 2**40)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    section, device = Optimization(compile=True), torch.device("cuda")
    plain, compiled = llama().eval(), llama().eval()
    objective = shard.distribute("x", Objective(compiled, language_loss), section, device, False)
    objective(language(0)).total.backward()
    assert graphs["unique_graphs"] == 1
    ids = language(0)[0]
    with shard.not_compiled(section, device), torch.inference_mode():
        for rows in (1, 3, 8):
            cache = compiled.new_cache(rows, 21)
            found = [compiled(ids[:rows], cache=cache), compiled(ids[:rows, :1], cache=cache)]
        assert torch.allclose(found[0], plain(ids), atol=1e-5)
    assert graphs["unique_graphs"] == 1
    for step in range(3):
        objective(language(step)).total.backward()
    assert graphs["unique_graphs"] == 1


def test_blocks_with_bytes_in_them_are_not_compiled(monkeypatch, one_thread):
    monkeypatch.setattr(shard, "memory", lambda device: 2**40)
    monkeypatch.setattr(torch, "compile", None)
    model = adapted_in_int8()
    objective = Objective(model, language_loss)
    shard.distribute("x", objective, Optimization(compile=True), torch.device("cuda"), False)
    assert objective(language(0)).total.requires_grad


class Made(TorchDispatchMode):
    """Knows all memory that tensors inside have asked for, besides that of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.of_model = {p.untyped_storage()._cdata for p in model.parameters()}
        self.memory: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.forget()
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.of_model:
                    self.memory.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def forget(self):
        self.memory = {key: made for key, made in self.memory.items() if not made[0].expired()}

    def still_there(self) -> int:
        self.forget()
        return sum(size for _, size in self.memory.values())


def kept(n_layers: int, checkpointing: str) -> int:
    """Bytes that are there when the gradients are about to be computed, the worst moment of a step."""
    model = llama(n_layers=n_layers, dim=64, hidden_dim=176)
    section = Optimization(checkpointing=checkpointing)
    objective = shard.distribute("x", Objective(model, language_loss), section, torch.device("cpu"), False)
    with Made(model) as made:
        found = objective(language(0))
    assert found.total.requires_grad
    return made.still_there()


def test_a_layer_keeps_less_when_its_activations_are_computed_again(one_thread):
    layer = {which: (kept(9, which) - kept(3, which)) / 6 for which in ("none", "selective", "block")}
    print(layer)
    assert layer["block"] == 8 * 20 * 64 * 4, "its input alone"
    assert layer["block"] < layer["selective"] < 0.7 * layer["none"]


# ---- Which of the two, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, mib, section, divided",
    [
        (1, 64, {}, False),
        (2, 64, {}, False),
        (2, 39, {}, True),  # whole: 20 MiB, more than half
        (2, 64, {"sharding": "fsdp"}, True),
        (2, 21, {"sharding": "ddp"}, False),
        (2, 10, {"state_dtype": "bfloat16"}, True),
        (2, 9, {}, "take 5 processes or more"),  # divided: 8 MiB, and the whole model while it is read
        (2, 13, {"accumulate": 2}, True),  # and the whole gradient, until the last micro-batch
        (2, 9, {"accumulate": 2}, "take 5 processes or more, .*, or set accumulate = 1, or state"),
        (2, 4, {"accumulate": 2}, "which has 0.00391; set accumulate = 1, or state"),
        (1, 15, {}, "take 2 processes or more"),
        (2, 17, {"sharding": "ddp"}, 'set name.sharding = "fsdp", or state_dtype'),
        (2, 9, {"sharding": "ddp"}, 'set name.sharding = "fsdp" and take 5 processes or more'),
    ],
)
def test_a_model_is_divided_where_it_does_not_fit_well(ranks, mib, section, divided, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(shard, "memory", lambda device: mib * 2**20)
    with torch.device("meta"):
        model = nn.Linear(1024, 1024, bias=False)  # 4 MiB: with gradient and moments 16, as DDP 20
    arguments = "name", model, Optimization(**section), torch.device("cpu")
    if isinstance(divided, bool):
        assert shard.is_sharded(*arguments) is divided
        return
    with pytest.raises(ValueError, match=divided) as caught:
        shard.is_sharded(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("torch_version, refused", [("2.11.0+cu130", True), ("2.12.0", False)])
def test_a_base_in_int8_is_divided_by_new_torch_alone(torch_version, refused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setenv("WORLD_SIZE", "2")
    divide = partial(shard.is_sharded, "stage3", section=Optimization(sharding="fsdp"))
    assert divide(model=adapted(), device=torch.device("cpu"))
    told = pytest.raises(ValueError, match='torch 2.12 or newer.* stage3.sharding = "ddp"')
    with told if refused else nullcontext():
        assert divide(model=adapted_in_int8(), device=torch.device("cpu"))


def test_one_process_has_nobody_to_divide_a_model_with():
    with pytest.raises(ValueError, match='stage1.sharding is "fsdp", but one process'):
        check_ranks("stage1", Optimization(sharding="fsdp"), 1)
    check_ranks("stage1", Optimization(sharding="fsdp"), 2)
