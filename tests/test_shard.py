"""training/shard.py: a model on one process, whole on two, and divided among two and four, learns the same."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import lora
import run
from hubert import HuBERT, HuBERTConfig
from llama import Llama, LlamaConfig, next_token_losses
from training.loop import Loss, Optimization, check_ranks, optimize

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
    return Loss(total, n, torch.tensor(batch[1].numel()), {"accuracy": (correct, n)})


def llama(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(**dict(vocab_size=61, dim=16, n_layers=3, n_heads=2, hidden_dim=24) | changes))


def adapted() -> Llama:
    return lora.apply(llama(), 2, 4.0, ["q_proj", "v_proj"])


def grouped() -> Llama:
    return llama(tie_embeddings=True, n_kv_heads=1)


def hubert() -> HuBERT:
    torch.manual_seed(0)
    sizes = dict(dim=16, n_layers=2, n_heads=2, ffn_dim=24, pos_kernel=4, pos_groups=2, proj_dim=8)
    return HuBERT(HuBERTConfig(conv_dim=[8] * 7, n_classes=7, **sizes))


MODELS = {  # (model, its batch at a step, its loss)
    "llama": (llama, language, language_loss),
    "tied": (grouped, language, language_loss),
    "lora": (adapted, language, language_loss),
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


def learn(out: Path, kind: str, **section) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, weights) after 20 steps."""
    make, batch_at, loss = MODELS[kind]
    model = make()
    settings = dict(steps=STEPS, batch_size=8, lr=3e-3, warmup=2, bf16=False, eval_every=10, save_every=1000)
    settings = Optimization(**settings | section)
    where = run.Run(out, out, 0, torch.device("cpu"))
    optimize(where, "name", out / "state", model, loss, mine(batch_at, settings.accumulate), settings)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()}
    losses = []
    if run.rank() == 0:
        losses = [json.loads(line)["loss"] for line in (out / "metrics/name.jsonl").read_text().splitlines()]
    return losses, weights


def one_of_many(rank: int, ranks: int, out: Path, cases: dict):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", (out / "store").as_uri(), rank=rank, world_size=ranks)
    found = {name: learn(out / name, kind, **section) for name, (kind, section) in cases.items()}
    if rank == 0:
        torch.save(found, out / "found.pt")
    run.destroy()


def learn_together(ranks: int, out: Path, cases: dict) -> dict:
    """{name: learn(...)} of cases {name: (kind, section)}, on so many processes."""
    processes = [CONTEXT.Process(target=one_of_many, args=(rank, ranks, out, cases)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return torch.load(out / "found.pt", weights_only=True)


def distance(one: tuple, other: tuple) -> tuple[float, float]:
    """Between two results of `learn`: (of the losses, of the weights), the largest difference."""
    losses = max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))
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


@pytest.fixture(scope="module")
def alone(one_thread, tmp_path_factory) -> dict:
    """What one process learns."""
    out = tmp_path_factory.mktemp("alone")
    return {name: learn(out / name, kind, **section) for name, (kind, section) in CASES.items()}


@pytest.mark.parametrize("ranks, sharding", [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_many_processes_learn_what_one_learns(alone, tmp_path, ranks, sharding):
    cases = {name: (kind, section | {"sharding": sharding}) for name, (kind, section) in CASES.items()}
    for name, found in learn_together(ranks, tmp_path, cases).items():
        losses, weights = distance(found, alone[name])
        assert losses < 1e-5 and weights < 1e-5, f"{name}: {losses} {weights}"
        assert found[0][-1] < found[0][0], f"{name} has learned"


def test_one_process_has_nobody_to_divide_a_model_with():
    with pytest.raises(ValueError, match='stage1.sharding is "fsdp", but one process'):
        check_ranks("stage1", Optimization(sharding="fsdp"), 1)
    check_ranks("stage1", Optimization(sharding="fsdp"), 2)
