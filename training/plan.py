"""What a training run would need, before anything is started: parameters, memory, tokens, FLOPs, hours.

    python train.py configs/paper-13b.toml --plan --gpus 96 --gpu A100-80GB

Models are built on torch's meta device, as shapes without numbers, so this takes a second, no memory and no
weights. It is arithmetic about the language model; HuBERT and the vocoder are small beside it and left out.

    FLOPs a token = 6 N + 12 L d T      N matrices' weights, L layers of width d, documents of T tokens:
                                        2 N forward, 4 N backward; a frozen matrix has 2 N of these less

A stage is planned as its section has it: whole on each GPU or divided (training/shard.py decides, as it will
when the stage begins), its activations kept or computed again, its state in float32 or bfloat16. Memory is
counted for the worst moment of a step, on documents of full length, without dropout. The count is what
training allocates on a CPU (tests/test_plan.py measures it).

References: Kaplan et al. 2020, arXiv:2001.08361 (FLOPs); Rajbhandari et al. 2020, arXiv:1910.02054 (shards).
"""

import dataclasses
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import lora
from config import Parser
from llama import Llama, LlamaConfig, to_int8
from llama_formats import read_config
from training import shard
from training.before import LANGUAGE
from training.loop import check_ranks
from training.meters import GIB, GPUS, Gpu, flops, matrices

ROOM = 2 * GIB  # kept free for CUDA, NCCL and fragmentation: assumed, not measured
MARKERS = 6  # <sosp> <eosp> [Human] [SpeechGPT] <eoh> <eoa>: the vocabulary has them beside pieces and units


def parse_flags(flags: list[str]) -> tuple[Namespace, list[str]]:
    """(what a plan is for, the other flags)."""
    parser = Parser("flags of --plan")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", default="A100-80GB")
    parser.add_argument("--mfu", type=float, default=0.4)  # the share of peak FLOPs that training reaches
    return parser.parse_known_args(flags)


# ---- The model of each stage, as shapes --------------------------------------------------------------------


def shape_of(config, stage: str) -> LlamaConfig:
    """That of [llama], or, where that is missing, of the folder `pretrained`; grown by units and markers
    after stage text (eq. 1)."""
    new = 0 if stage == "text" else config.units.clusters + MARKERS
    if config.llama is not None:
        return LlamaConfig(**vars(config.llama) | {"vocab_size": config.vocab_size + new})
    path = Path(config.pretrained) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there to plan with; add a section [llama] with the model's shape")
    shape = read_config(LlamaConfig, path)
    if not (path.parent / "added_tokens.json").exists():  # else it has grown already
        shape.vocab_size += new
    return shape


def build(config, stage: str) -> Llama:
    with torch.device("meta"):
        model = Llama(shape_of(config, stage))
        if stage == "stage3":
            if config.lora.int8:
                to_int8(model)
            lora.apply(model, config.lora.r, config.lora.alpha, config.lora.targets)
    return model


PARTS = {"embed_tokens": "embedding", "lm_head": "output layer", "lora_": "adapters"}
PARTS |= {"self_attn": "attention", "mlp": "feed-forward", "norm": "norms"}


def parts(model: Llama) -> Counter:
    """How many parameters each part has."""
    found = Counter()
    for name, p in model.named_parameters():
        if not name.endswith("scale"):  # of int8: one for each row
            found[next(part for word, part in PARTS.items() if word in name)] += p.numel()
    return found


def trained(model: Llama) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Memory ------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on each GPU."""

    weights: int
    gradients: int  # and the buffers in which GPUs exchange them
    optimizer: int  # AdamW: two averages; Muon: one
    copies: int  # in bfloat16: of the matrices, or of the blocks that are gathered
    activations: int  # what each layer keeps for its gradient
    logits: int  # of all tokens: three tables of float32, when the backward pass begins
    peak: int  # at the worst moment: the parts are not all there at once


def memory(model: Llama, section, gpus: int, fused: bool = True, divided: bool = False) -> Memory:
    """section: of a stage of the language model. fused: attention as on GPUs, without scores. divided: as
    training/shard.py divides a model among the GPUs."""
    c = model.config
    tokens = -(-section.batch_size // (gpus * section.accumulate)) * section.max_len
    size = 2 if section.state_dtype == "bfloat16" else 4
    is_bf16 = section.bf16 or size == 2
    in_int8 = sum(layer.weight.nbytes for layer in shard.int8_layers(model))
    frozen = sum(p.numel() for p in model.parameters() if p.dtype != torch.int8) - trained(model)
    weights = size * trained(model) + frozen * (2 if divided and is_bf16 else size) + in_int8
    gradients = size * trained(model)
    buffers = gradients * (gpus > 1)
    # of int8 one matrix at a time becomes bfloat16
    copies = 2 * (c.dim * c.vocab_size if in_int8 else matrices(model)) * (is_bf16 and size == 4)

    inner = Counter()  # parameters that Muon trains, by shape
    for name, p in model.named_parameters():
        if section.muon and p.requires_grad and p.ndim == 2 and "layers." in name:
            inner[p.shape] += p.numel()
    optimizer = 2 * gradients - size * inner.total()
    # Muon's step: the averages of all matrices, and six tables of those of one shape.
    updating = size * inner.total() + 24 * max(inner.values(), default=0)

    layer = tokens * kept_in_layer(model, section, fused)
    activations = c.n_layers * layer + tokens * 12 * c.dim  # and of the last norm
    if section.checkpointing != "none":
        kept = tokens * (4 * c.dim + kept_products(model, section) * (section.checkpointing == "selective"))
        activations = layer + c.n_layers * kept + tokens * 12 * c.dim
    logits = 12 * tokens * c.vocab_size
    if divided:
        block = 0 if in_int8 else (matrices(model) - c.dim * c.vocab_size) // c.n_layers
        whole = 4 * trained(model) * (section.accumulate > 1)  # what shard.gradients_exchanged keeps back
        weights, gradients = weights // gpus, gradients // gpus + whole
        optimizer, updating = optimizer // gpus, updating // gpus
        # gathered: two blocks and both tables; and a block's gradients before they are divided
        copies = (2 if is_bf16 else 4) * (2 * block + 2 * c.dim * c.vocab_size)
        copies += 2 * c.dim * c.hidden_dim * (in_int8 > 0)  # two matrices, or one and what it becomes
        buffers = 4 * block if trained(model) > block else 0
    begun = copies + activations + logits + gradients * (section.accumulate > 1)  # the backward pass begins
    ended = copies + gradients + layer * (section.checkpointing != "none")
    peak = weights + optimizer + buffers + max(begun, ended, gradients + updating)
    return Memory(weights, gradients + buffers, optimizer, copies, activations, logits, peak)


def kept_products(model: Llama, section) -> int:
    """Bytes that a layer keeps of each token where checkpointing is "selective": the results of attention and
    of matrix products."""
    c = model.config
    size = 2 if section.bf16 else 4
    made = 4 * c.dim + 2 * c.n_kv_heads * c.head_dim + 2 * c.hidden_dim  # q, result, o, down; k, v; gate, up
    for adapter in lora.adapters(model.model.layers[0]).values():
        made += adapter.r + adapter.lora_B.out_features
    return size * made


def kept_in_layer(model: Llama, section, fused: bool) -> int:
    """Bytes that a layer keeps of each token for its gradient: inputs of what is trained, factors of
    products. The residual stream is as wide as the weights; matrix products are in bfloat16 (2 bytes)."""
    c = model.config
    wide = 2 if section.state_dtype == "bfloat16" else 4
    size = 2 if section.bf16 else wide
    adapters = lora.adapters(model.model.layers[0])
    reads = {name.partition(".")[2]: m.r * size for name, m in adapters.items()}
    if not adapters:  # frozen layers need not keep their input; those that learn, and adapters, do
        reads = dict.fromkeys("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(), 0)

    def inputs(*names: str) -> int:
        """Of layers that read the same normalized states: each makes its own bfloat16 of float32."""
        count = sum(name in reads for name in names)
        return c.dim * (size * count if size < wide else size * min(count, 1))

    norms = 2 * (4 * c.dim + 4) + (0 if adapters else 2 * wide * c.dim)  # x, 1 / rms; normalized x
    heads = (
        size * 2 * (c.dim + c.n_kv_heads * c.head_dim) + 4 * c.n_heads
    )  # q, k, v, the result; logarithms of softmax's sums
    if not fused:
        heads = size * (3 * c.dim + c.n_heads * section.max_len)  # on a CPU: q, k, v and all scores
    heads += inputs("q_proj", "k_proj", "v_proj") + size * c.dim * ("o_proj" in reads)
    mlp = size * c.hidden_dim * (3 + ("down_proj" in reads))  # gate, silu(gate), up; their product
    return norms + heads + inputs("gate_proj", "up_proj") + mlp + sum(reads.values())


# ---- The report --------------------------------------------------------------------------------------------

COLUMNS = "{:8}{:>16}{:>16}{:>13}{:>8}{:>10}{:>10}{:>10}"


def describe(title: str, config, gpus: int, gpu: str, mfu: float) -> str:
    """The plan of a run, as text. ValueError if a step cannot be divided among so many GPUs."""
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu:.40} is unknown; choose one of {', '.join(GPUS)}")
    if not 1 <= gpus <= 100_000 or not 0 < mfu <= 1:
        raise ValueError("--gpus must be 1 to 100000, and --mfu above 0 and at most 1")
    card = GPUS[gpu]
    stages = {}  # name: (section, model)
    for name in LANGUAGE:
        section = getattr(config, name)
        if section.steps and not (name == "text" and config.pretrained):
            check_ranks(name, section, gpus)
            stages[name] = section, build(config, name)
    if not stages:
        raise ValueError("there is nothing to plan: every stage of the language model has 0 steps")
    last = [*stages][-1]
    size = f"{gpus} x {gpu} ({card.flops / 1e12:.0f} TFLOPS, {card.memory} GiB each)"
    lines = [f"{title} on {size}: the language model alone,"]
    lines += ["on documents of full length, which is an upper bound", "", f"parameters in {last}"]
    lines += [f"  {part:14}{count:>16,}" for part, count in parts(stages[last][1]).items()]

    head = COLUMNS.format(*"stage parameters trained tokens/step steps tokens FLOPs hours".split())
    lines += ["", f"{head} at {100 * mfu:.3g} % of peak"]
    for name, (section, model) in stages.items():
        a_step = section.batch_size * section.max_len
        total = a_step * section.steps * flops(model, section.max_len)
        hours = f"{total / (gpus * card.flops * mfu * 3600):.2f}" if section.bf16 else "(float32)"
        counts = [f"{n:,}" for n in (parts(model).total(), trained(model), a_step, section.steps)]
        lines.append(COLUMNS.format(name, *counts, f"{a_step * section.steps:.2e}", f"{total:.2e}", hours))

    lines += ["", f"{'GiB on each GPU':20}" + "".join(f"{part:>12}" for part in Memory._fields)]
    able = []
    for name, (section, model) in stages.items():
        found = place(name, model, section, gpus, card)
        lines.append(row(f"{name}, {found.how}", found))
        if not found.fits:
            lines += remedy(name, model, section, gpus, card)
        cards = [other for other in GPUS if place(name, model, section, gpus, GPUS[other]).fits]
        able.append(f"{name:8}fits on {gpus} of: {', '.join(cards) or 'no GPU of this table'}")
    return "\n".join([*lines, "", *able])


class Place(NamedTuple):
    """How a stage lies on its GPUs."""

    how: str
    memory: Memory
    fits: bool


def place(name: str, model: Llama, section, gpus: int, card: Gpu) -> Place:
    """As training/shard.py decides it when the stage begins."""
    try:
        divided = shard.is_to_divide(name, model, section, gpus, card.memory * GIB)
    except ValueError:  # it is refused
        divided = gpus > 1 and section.sharding != "ddp"
        return Place("divided" if divided else "whole", memory(model, section, gpus, divided=divided), False)
    found = memory(model, section, gpus, divided=divided)
    return Place("divided" if divided else "whole", found, found.peak + ROOM <= card.memory * GIB)


def remedy(name: str, model: Llama, section, gpus: int, card: Gpu) -> list[str]:
    """The row of the first change of the section that makes it fit, if one does."""
    most = section.batch_size // gpus  # one document at a time
    for accumulate in (section.accumulate, *(2**i for i in range(most.bit_length())), most):
        for state_dtype in (section.state_dtype, "bfloat16"):
            for checkpointing in (section.checkpointing, "selective", "block"):
                changes = {"checkpointing": checkpointing, "accumulate": accumulate}
                changes["state_dtype"] = state_dtype
                changed = dataclasses.replace(section, **changes)
                found = place(name, model, changed, gpus, card)
                if found.fits:
                    new = {key: value for key, value in changes.items() if value != getattr(section, key)}
                    flags = " ".join(f"--{name}.{key} {value}" for key, value in new.items())
                    return [row("  and, as below", found), f"    {flags}"]
    return []


def row(title: str, found: Place) -> str:
    numbers = "".join(f"{part / GIB:>12.2f}" for part in found.memory)
    return f"{title:20}{numbers}  {'fits' if found.fits else 'does not fit'}"
