"""What a training run would need, before anything is started: parameters, memory, tokens, FLOPs, hours.

    python train.py configs/paper-13b.toml --plan --gpus 96 --gpu A100-80GB

Models are built on torch's meta device, as shapes without numbers, so this takes a second, no memory and no
weights. It is arithmetic about the language model; HuBERT and the vocoder are small beside it and left out.

    FLOPs a token = 6 N + 12 L d T      N matrices' weights, L layers of width d, documents of T tokens:
                                        2 N forward, 4 N backward; a frozen matrix has 2 N of these less

Memory is counted for the worst moment of a step, on documents of full length, without dropout. The count is
what training allocates on a CPU (tests/test_plan.py measures it); on GPUs it was not measured.

References: Kaplan et al. 2020, arXiv:2001.08361 (FLOPs); Rajbhandari et al. 2020, arXiv:1910.02054 (shards).
"""

from argparse import Namespace
from collections import Counter
from typing import NamedTuple

import torch

import lora
from config import Parser
from llama import Llama, LlamaConfig
from llama_formats import read_config
from training import foreign_units
from training.before import LANGUAGE
from training.loop import check_ranks


class Gpu(NamedTuple):
    flops: float  # a second: dense products in bfloat16, as its maker states them
    memory: int  # GiB


GPUS = {
    "A100-40GB": Gpu(312e12, 40),
    "A100-80GB": Gpu(312e12, 80),
    "H100": Gpu(989e12, 80),
    "H100-PCIe": Gpu(756e12, 80),
    "H100-NVL": Gpu(835e12, 94),
    "H200": Gpu(989e12, 140),
    "RTX-4090": Gpu(165e12, 24),
}
GIB = 2**30
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
    path = foreign_units.llama_folder(config.pretrained) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there to plan with; add a section [llama] with the model's shape")
    shape = read_config(LlamaConfig, path)
    if not foreign_units.has_foreign_units(config.pretrained):  # else it has grown already
        shape.vocab_size += new
    return shape


def build(config, stage: str) -> Llama:
    with torch.device("meta"):
        model = Llama(shape_of(config, stage))
        if stage == "stage3":
            lora.apply(model, config.lora.r, config.lora.alpha, config.lora.targets)
    return model


PARTS = {"embed_tokens": "embedding", "lm_head": "output layer", "lora_": "adapters"}
PARTS |= {"self_attn": "attention", "mlp": "feed-forward", "norm": "norms"}


def parts(model: Llama) -> Counter:
    """How many parameters each part has."""
    found = Counter()
    for name, p in model.named_parameters():
        found[next(part for word, part in PARTS.items() if word in name)] += p.numel()
    return found


def trained(model: Llama) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matrices(model: Llama) -> int:
    """Weights that multiply: not the embedding, which is looked up, nor the norms. Adapters do not count."""
    c = model.config
    attention = 2 * c.dim * c.dim + 2 * c.dim * c.n_kv_heads * c.head_dim
    return c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.dim * c.vocab_size


def flops(model: Llama, length: int) -> int:
    """Of a training step, for each token of documents of `length` tokens."""
    adapters = sum(p.numel() for p in lora.parameters(model))
    attention = 12 * model.config.n_layers * model.config.dim * length
    return (4 if adapters else 6) * matrices(model) + 6 * adapters + attention


# ---- Memory ------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on each GPU."""

    weights: int  # float32
    gradients: int  # float32; on several GPUs also the buffers in which they are exchanged
    optimizer: int  # AdamW: two averages in float32; Muon: one
    copies: int  # of the matrices in bfloat16
    activations: int  # what each layer keeps for its gradient
    logits: int  # of all tokens: three tables of float32, when the backward pass begins
    peak: int  # at the worst moment: the parts are not all there at once

    def fits(self, card: Gpu) -> bool:
        return self.peak + ROOM <= card.memory * GIB


def memory(
    model: Llama, section, gpus: int, fused: bool = True, sharded: bool = False, recomputed: bool = False
) -> Memory:
    """section: batch_size, accumulate, max_len, muon, bf16. fused: attention as on GPUs, without scores.

    As training/loop.py works today, data parallel; `sharded` and `recomputed` are what it would be with
    everything divided among the GPUs, and with activations computed again in the backward pass."""
    c = model.config
    tokens = -(-section.batch_size // (gpus * section.accumulate)) * section.max_len
    weights = 4 * parts(model).total()
    gradients = 4 * trained(model)
    buffers = gradients * (gpus > 1)
    copies = 2 * matrices(model) * section.bf16

    inner = Counter()  # parameters that Muon trains, by shape
    for name, p in model.named_parameters():
        if section.muon and p.requires_grad and p.ndim == 2 and "layers." in name:
            inner[p.shape] += p.numel()
    optimizer = 2 * gradients - 4 * inner.total()
    # Muon's step: the averages of all matrices, and six tables of those of one shape.
    updating = 4 * inner.total() + 24 * max(inner.values(), default=0)

    layer = tokens * kept_in_layer(model, section, fused)
    activations = c.n_layers * layer + tokens * 12 * c.dim  # and of the last norm
    if recomputed:
        activations = layer + tokens * 4 * c.dim * (c.n_layers + 3)
    logits = 12 * tokens * c.vocab_size
    if sharded and gpus > 1:
        block = (matrices(model) - c.dim * c.vocab_size) // c.n_layers
        weights, gradients = weights // gpus, gradients // gpus
        optimizer, updating = optimizer // gpus, updating // gpus
        # gathered: two blocks and both tables; and a block's gradients before they are divided
        copies = 2 * (2 * block + 2 * c.dim * c.vocab_size)
        buffers = 4 * block if trained(model) > block else 0
    begun = copies + activations + logits + gradients * (section.accumulate > 1)  # the backward pass begins
    peak = weights + optimizer + buffers + max(begun, copies + gradients, gradients + updating)
    return Memory(weights, gradients + buffers, optimizer, copies, activations, logits, peak)


def kept_in_layer(model: Llama, section, fused: bool) -> int:
    """Bytes that a layer keeps of each token for its gradient: inputs of what is trained, factors of
    products. The residual stream stays in float32, matrix products are in bfloat16 (4 and 2 bytes)."""
    c = model.config
    size = 2 if section.bf16 else 4
    adapters = lora.adapters(model.model.layers[0])
    reads = {name.partition(".")[2]: m.r * size for name, m in adapters.items()}
    if not adapters:  # frozen layers need not keep their input; those that learn, and adapters, do
        reads = dict.fromkeys("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(), 0)

    def inputs(*names: str) -> int:
        """Of layers that read the same normalized states: float32 is shared, each makes its own bfloat16."""
        count = sum(name in reads for name in names)
        return c.dim * (2 * count if section.bf16 else 4 * min(count, 1))

    norms = 2 * (4 * c.dim + 4) + (0 if adapters else 2 * 4 * c.dim)  # x, 1 / rms; normalized x
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
        today = memory(model, section, gpus)
        lines.append(row(name, today, card))
        if gpus > 1:
            lines.append(row("  sharded *", memory(model, section, gpus, sharded=True), card))
        recomputed = memory(model, section, gpus, sharded=True, recomputed=True)
        lines.append(row("  and recomputed *" if gpus > 1 else "  recomputed *", recomputed, card))
        found = ", ".join(other for other in GPUS if today.fits(GPUS[other]))
        able.append(f"{name:8}fits today on {gpus} of: {found or 'no GPU of this table'}")
    lines += ["", "Today every GPU holds the whole model. * is not written yet: only estimated."]
    return "\n".join([*lines, "", *able])


def row(title: str, found: Memory, card: Gpu) -> str:
    numbers = "".join(f"{part / GIB:>12.2f}" for part in found)
    return f"{title:20}{numbers}  {'fits' if found.fits(card) else 'does not fit'}"
