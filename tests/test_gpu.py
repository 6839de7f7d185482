"""What only a GPU runs: NCCL, compiled blocks, kernels for packed rows, rows of zeros at the output layer, a
base in int8. Without one all of it is skipped.

    python -m pytest -o addopts= tests/test_gpu.py      in one process: the tests share the GPU
"""

import copy
import os
import socket

import pytest
import torch
from test_shard import CASES, INT8, MODELS, distance, language_loss, learn, unchanged

import lora
from data import batches
from llama import Llama, LlamaConfig, all_logits, to_int8
from packed import PackedAttention, VarlenAttention, packed_attention, within_documents
from run import autocast
from training import shard
from training.loop import Objective, Optimization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = torch.device("cuda", 0)
BOTH = CASES | INT8


def rows(seed: int, length: int, lengths: tuple[int, ...]) -> batches.Packed:
    """Documents of random tokens of a vocabulary of 61, in rows of `length`."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]
    return batches.pack([(ids, [True] * len(ids)) for ids in documents], length)


LONG = (700, 300, 200, 130, 900, 90, 40, 33, 5)  # three rows of 1,024


# ---- Attention of packed rows ------------------------------------------------------------------------------


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_is_chosen_and_gives_what_the_plain_form_gives(kv_heads):
    docs = rows(0, 1024, LONG).docs.to(GPU)
    torch.manual_seed(0)
    shapes = [(len(docs), heads, docs.shape[1], 64) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    mask = within_documents(docs, inputs[0])
    assert isinstance(mask, VarlenAttention), "torch 2.10 or newer has the kernel"
    exact = [x.detach().double().requires_grad_() for x in inputs]
    inside = (docs >= 0)[:, None, :, None]
    direction = torch.randn(shapes[0], device=GPU)
    for attend, tensors in ((mask.attend, inputs), (lambda *qkv: packed_attention(*qkv, docs), exact)):
        y = attend(*tensors) * inside
        (y * direction).sum().backward()
        tensors.append(y)
    for found, expected in zip(
        [inputs[3], *(x.grad for x in inputs[:3])], [exact[3], *(x.grad for x in exact[:3])], strict=True
    ):
        assert relative(found, expected) < 0.01


@pytest.mark.parametrize(
    "length, dtype, kind",
    [(512, torch.bfloat16, torch.Tensor), (1024, torch.float32, PackedAttention)],
)
def test_short_rows_get_the_matrix_and_float32_gets_groups(length, dtype, kind):
    docs = rows(0, length, (500, 400, 90)).docs.to(GPU)
    assert isinstance(within_documents(docs, torch.zeros(1, device=GPU, dtype=dtype)), kind)


# ---- Blocks, compiled and not, activations kept or not -----------------------------------------------------


def of_two_batches(model: Llama, **section) -> list[torch.Tensor]:
    """Gradients after two batches of different documents."""
    objective = Objective(model, language_loss)
    objective = shard.distribute("x", objective, Optimization(**section), GPU, True)
    for seed, lengths in enumerate((LONG, LONG[1:])):
        batch = rows(seed, 1024, lengths)
        with autocast(GPU):
            objective((batch.ids.to(GPU), batch.mask.to(GPU), batch.docs.to(GPU))).total.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_compiled_blocks_learn_the_same_and_are_compiled_for_all_layers_at_once(checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, dim=256, n_layers=12, n_heads=4, hidden_dim=344)
    model = Llama(config).to(GPU)
    compiled = copy.deepcopy(model)
    expected = of_two_batches(model)
    found = of_two_batches(compiled, compile=True, checkpointing=checkpointing)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 0.05
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    print(checkpointing, graphs, breaks)
    assert graphs <= 2 and not breaks, "the second for another number of documents"


# ---- NCCL, in a group of one -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> dict:
    """What one process learns without a GPU, and before there is a group, which can only have NCCL."""
    out = tmp_path_factory.mktemp("cpu")
    return {name: learn(out / name, kind, section) for name, (kind, section) in BOTH.items()}


@pytest.fixture(scope="module")
def nccl(on_cpu):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.cuda.set_device(GPU)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1, device_id=GPU)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", BOTH)
def test_a_divided_model_learns_on_a_gpu_what_a_whole_one_learns_on_a_cpu(
    case, on_cpu, nccl, tmp_path, monkeypatch
):
    kind, section = BOTH[case]
    whole = learn(tmp_path / "whole", kind, section, device=GPU)
    able = kind != "int8" or shard.version_of_torch() >= (2, 12)
    monkeypatch.setattr(shard, "is_sharded", lambda *arguments: able)
    divided = learn(tmp_path / "divided", kind, section, device=GPU)
    for found in (whole, divided):
        weights = {name: w.cpu() for name, w in found[1].items()}
        losses, far = distance((found[0], weights), on_cpu[case])
        assert losses < 1e-3 and far < 2e-3, "rounding of other kernels, 20 steps of it"
        if kind in ("lora", "int8"):
            unchanged(weights, MODELS[kind][0]())
    losses, far = distance(whole, divided)
    assert losses < 1e-5 and far < 1e-5


# ---- The output layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [61, 64])
def test_rows_of_zeros_change_no_logit_and_no_gradient(rows):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, rows, bias=False, device=GPU, dtype=torch.float64)
    x = torch.randn(5, 32, device=GPU, dtype=torch.float64, requires_grad=True)
    found = [all_logits(head, x), head(x)]
    assert torch.allclose(*found) and found[0].shape == (5, rows)
    direction = torch.randn_like(found[0])
    gradients = [torch.autograd.grad((y * direction).sum(), (x, head.weight)) for y in found]
    assert all(map(torch.allclose, *gradients))


# ---- A base in int8 ----------------------------------------------------------------------------------------


def test_adapters_of_a_base_in_int8_learn_about_what_those_of_bfloat16_learn():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, dim=256, n_layers=4, n_heads=4, hidden_dim=344)
    plain = Llama(config).to(GPU)
    bytes_ = to_int8(copy.deepcopy(plain))
    found = []
    for model in (plain, bytes_):
        torch.manual_seed(1)
        lora.apply(model, 8, 16.0, ["q_proj", "v_proj"])
        for p in lora.parameters(model):
            torch.nn.init.normal_(p, std=0.05)
        before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        found.append(torch.cat([g.flatten() for g in of_two_batches(model)]))
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert relative(found[1], found[0]) < 0.1
