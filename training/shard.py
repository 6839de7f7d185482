"""A model on many processes: whole on each of them (DDP), or divided among them (FSDP2).

    objective = distribute("stage1", objective, section, device, bf16)

DDP keeps weights, gradients and moments on every device, 20 bytes a weight, and exchanges gradients once a
step. FSDP2 keeps 1/N of each matrix's rows, of its gradient and of its moments on each of N devices: a block
is gathered just before it is computed, forward and backward, and its gradient is summed and divided at once.
What is outside of the blocks (embedding, last norm, output layer) is one more group, which stays gathered
from the first layer to the last gradient; tied embeddings are then in one group, too.

    rank 0       rank 1                              rank 0 and 1, one block at a time
    rows 0-50    rows 51-100     -- all-gather -->   rows 0-100  --> forward or backward
    rows 0-50    rows 51-100     <-- reduce-scatter of the gradients

A process of its own has plain tensors, and none of this.

References: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023, arXiv:2304.11277 (FSDP); Chen
et al. 2016, arXiv:1604.06174 (activations computed again); Korthikanti et al. 2022, arXiv:2205.05198
(some of them).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama import Int8Linear
from run import all_reduce_sum, autocast, world_size


@dataclass
class Sharding:
    """How a stage uses the devices. None of it changes what is learned, but for rounding; but for
    `state_dtype`."""

    # of several processes: "ddp", each has the whole model; "fsdp", each a part of it; "auto": whole where
    # it takes less than half of a device's memory
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    # activations that are computed again for the gradient: none of them; all of a block but its input; all
    # but the results of attention and matrix products
    checkpointing: Literal["none", "block", "selective"] = "none"
    compile: bool = False  # each block by torch.compile, on a GPU; not of a base in int8
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and moments


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of which a model has many alike: what its lists called `layers` hold."""
    stacks = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "layers"]
    return [block for stack in stacks if isinstance(stack, nn.ModuleList) for block in stack]


def int8_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, Int8Linear)]


def distribute(
    name: str,
    objective: nn.Module,
    section: Sharding,
    device: torch.device,
    bf16: bool,
    fill: Callable[[], None] | None = None,
) -> nn.Module:
    """`objective` (a module that computes the loss, its model inside) as `section` wants it on this process.

    bf16: matrix products are in bfloat16; a divided model is then gathered in it, and its frozen weights,
    which need no more, are kept in it. fill() gives a model that was on meta its numbers, when each process
    has memory for its part of it. ValueError if it does not fit."""
    sharded = is_sharded(name, objective, section, device)
    in_int8 = {p for layer in int8_layers(objective) for p in layer.parameters()}
    for p in objective.parameters():
        halved = section.state_dtype == "bfloat16" or sharded and bf16 and not p.requires_grad
        if halved and p not in in_int8:
            p.data = p.data.bfloat16()
    for block in blocks(objective):
        if section.checkpointing != "none":
            block.forward = computed_again(block.forward, section.checkpointing)
        if section.compile and device.type == "cuda" and not int8_layers(block):  # inductor of 2.11 fails
            block.forward = torch.compile(block.forward)
    if sharded:
        return divided(objective, device, bf16, fill)
    if world_size() == 1:
        return objective
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, devices)


def divided(
    objective: nn.Module, device: torch.device, bf16: bool, fill: Callable[[], None] | None
) -> nn.Module:
    """FSDP2: one group for each block, one for the rest; and one for each matrix in int8, whose bytes are
    gathered as they are. Master weights keep their format; gradients are summed in float32."""
    from torch.distributed.device_mesh import init_device_mesh  # here: importing them takes 0.65 s
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs are not cast: autocast does what needs it, and recordings and RoPE's angles stay as they are.
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (world_size(),))
    settings = {"mesh": mesh, "mp_policy": policy}
    for layer in int8_layers(objective):
        fully_shard(layer, mesh=mesh)
    for block in blocks(objective):
        fully_shard(block, **settings)
    fully_shard(objective, **settings)
    if any(p.is_meta for p in objective.parameters()):
        names: dict[nn.Parameter, list[str]] = {}
        for name, p in objective.named_parameters(remove_duplicate=False):
            names.setdefault(p, []).append(name)
        objective.to_empty(device=device)
        for first, *others in names.values():  # tied again
            for module, _, leaf in (name.rpartition(".") for name in others):
                setattr(objective.get_submodule(module), leaf, objective.get_parameter(first))
        fill()
    return objective


# ---- Which of the two --------------------------------------------------------------------------------------


def is_sharded(name: str, model: nn.Module, section: Sharding, device: torch.device) -> bool:
    """Whether the model, real or on meta, is to be divided among the processes of this run. ValueError if it
    does not fit, or this torch cannot divide it. section: with `accumulate` and `bf16`, as
    training/loop.py's."""
    found = is_to_divide(name, model, section, world_size(), memory(device), device.type == "cuda")
    # FSDP2 until 2.11 makes parameters that need a gradient, if only for a moment; bytes cannot have one.
    if found and int8_layers(model) and version_of_torch() < (2, 12):
        raise ValueError(
            f"{name}: a base in int8 is divided by torch 2.12 or newer, and this is {torch.__version__}; "
            f'take lora.int8 = false, or {name}.sharding = "ddp" if the base fits whole'
        )
    return found


def version_of_torch() -> tuple[int, int]:
    """(major, minor)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def is_to_divide(
    name: str, model: nn.Module, section: Sharding, ranks: int, room: int, on_gpu: bool = True
) -> bool:
    """Whether a model is to be divided among `ranks` processes with `room` bytes each. ValueError if it does
    not fit, whole or divided: activations come on top."""
    size = 2 if section.state_dtype == "bfloat16" else 4
    frozen, trained, copy = 0, 0, 0  # copy: of all of the model, as it is gathered
    for p in model.parameters():
        trained += p.numel() * size * p.requires_grad
        frozen += p.numel() * min(size, p.element_size()) * (not p.requires_grad)
        copy += p.numel() * min(2 if section.bf16 and on_gpu else size, p.element_size())
    state = frozen + 4 * trained  # weights, gradients, AdamW's two averages
    whole = state + trained * (ranks > 1)  # the buffers in which DDP exchanges gradients
    waiting = 4 * trained // size * (section.accumulate > 1)  # see gradients_exchanged
    sharded = ranks > 1 and (section.sharding == "fsdp" or section.sharding == "auto" and 2 * whole > room)
    reading = (state - trained) / ranks + copy  # without gradients, but with all of the model: see gathered
    needed = max(state / ranks + waiting, reading) if sharded else whole
    if needed <= room:
        return sharded
    left = 0.8 * room - max(waiting, copy)  # for what is divided
    advice = [f"take {math.ceil(state / left)} processes or more, each with memory of its own"] * (left > 0)
    if sharded and waiting:
        advice = [*advice, "set accumulate = 1"]
    elif ranks > 1 and not sharded:
        more = f" and {advice[0]}" if left > 0 and ranks < state / left else ""
        advice = [f'set {name}.sharding = "fsdp"{more}']
    advice.append('state_dtype = "bfloat16"' if size == 4 else "a smaller model")
    needed, room = needed / 2**30, room / 2**30
    raise ValueError(
        f"{name}: weights, gradients and moments take {needed:.3g} GiB on each of {ranks} process(es), "
        f"which has {room:.3g}; {', or '.join(advice)}"
    )


def memory(device: torch.device) -> int:
    """Bytes that a process may fill: all of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        bytes_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not say
        return 2**63
    return bytes_here // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---- Activations that are computed again -------------------------------------------------------------------


def computed_again(forward, which: str):
    """`forward`, which keeps only its input for the gradient, or also what took longest to compute."""
    options = {"use_reentrant": False}  # dropout draws the same numbers again
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    return partial(checkpoint, forward, **options)


KEPT = ("mm", "addmm", "bmm", "baddbmm", "convolution", "scaled_dot_product", "varlen_attn", "flex_attention")


def keep_products(context, operation, *args, **kwargs) -> CheckpointPolicy:
    name = operation.__name__.partition(".")[0]
    long = any(name == kept or "_attn" in kept and kept in name or "attention" in name for kept in KEPT)
    return CheckpointPolicy.MUST_SAVE if long else CheckpointPolicy.PREFER_RECOMPUTE


# ---- A step ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradients_exchanged(objective: nn.Module, now: bool) -> Iterator[None]:
    """Ranks exchange gradients in the backward pass of a step's last micro-batch alone. Until then each keeps
    those of the whole model, divided or not."""
    if is_divided(objective):
        objective.set_requires_gradient_sync(now)
        objective.set_is_last_backward(now)
    waits = isinstance(objective, DistributedDataParallel) and not now
    with objective.no_sync() if waits else contextlib.nullcontext():
        yield


def is_divided(x: nn.Module | Tensor) -> bool:
    """Of a module that FSDP2 has divided (an FSDPModule), or of one of its weights (a DTensor)."""
    return hasattr(x, "set_requires_gradient_sync" if isinstance(x, nn.Module) else "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process has; all of a tensor that is not divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients, of all ranks' parts together. A scalar of float32: in bfloat16 the norm of a
    whole model would be known to 0.4 %."""
    parameters = [p for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([local(p.grad) for p in parameters], 2, torch.float32)
    norm = torch.stack(norms).norm()
    if any(map(is_divided, parameters)):
        norm = all_reduce_sum(norm.square()).sqrt()
    return norm


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float):
    """Multiplies all gradients by `factor`. For a tensor in another format than theirs torch would start one
    kernel for each parameter: 3 % of a step (7B in bfloat16, H200)."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)


def not_compiled(section: Sharding, device: torch.device) -> contextlib.AbstractContextManager:
    """Context manager for what is no step of training: blocks run as they are written. Each way to call them
    would be compiled, and after eight dynamo compiles none any more, steps included."""
    if section.compile and device.type == "cuda":
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


@contextlib.contextmanager
def gathered(objective: nn.Module, device: torch.device, bf16: bool) -> Iterator[None]:
    """Inside, all ranks have the whole model, and may call it in other ways than for its loss: `generate`
    would otherwise gather it again for every token."""
    if not is_divided(objective):
        yield
        return
    groups = [m for m in objective.modules() if is_divided(m)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    with autocast(device, bf16):
        yield
    for group in groups:
        group.set_reshard_after_forward(group is not objective, recurse=False)
        group.reshard()
