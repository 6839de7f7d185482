"""bfloat16 or float32: what this machine multiplies faster, measured on a stage's own model and batch.

    bf16 = choose_bf16("stage2", section.bf16, device, meta, model, batch, loss)    when a stage starts

GPUs are always faster in bfloat16. A CPU may have instructions for it and lose more by converting than it
gains by multiplying, depending on the shapes: an Intel Xeon with AVX512-BF16 trained configs/tiny.toml 1.34
times slower in bfloat16. So a CPU tries both, for about a second. A CPU without such instructions computes
them in software, always slower, and measures nothing.

The answer is kept in the training state: an interrupted run goes on in the format that it began with, on
another machine too, and the losses stay the same.
"""

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from run import all_reduce_sum, rank

ROUNDS = 5  # at most so many times each; fewer, if they take longer than
SECONDS = 1.0
WORTH = 0.95  # of float32's time: differences below that are noise, and float32 is more exact


def choose_bf16(
    title: str,
    wanted: bool,
    device: torch.device,
    meta: dict,
    model: nn.Module,
    batch: Callable[[], object],
    loss: Callable[[object, bool], Tensor],
) -> bool:
    """Whether the stage `title` multiplies in bfloat16, the same on all ranks.

    meta: of its training state, {} if it begins; batch() -> a batch; loss(batch, bf16) -> that of `model`."""
    kept = meta.get("bf16")
    if isinstance(kept, bool):
        if kept and device.type == "cpu" and not has_bf16() and rank() == 0:
            tqdm.write(f"{title} goes on in bfloat16, as it began; this machine is slower at it")
        return kept
    if device.type != "cpu" or not wanted:
        return wanted and device.type == "cuda"
    seconds = (1.0, float("inf"))
    if has_bf16() and not any(p.is_meta for p in model.parameters()):
        with torch.random.fork_rng(devices=[]):
            found = batch()
            seconds = measure(model, lambda bf16: loss(found, bf16))
    float32, bfloat16 = all_reduce_sum(torch.tensor(seconds)).tolist()
    faster = bfloat16 < WORTH * float32
    if bfloat16 < float("inf") and rank() == 0:
        chosen = "bfloat16" if faster else "float32"
        tqdm.write(f"{title}: a step in bfloat16 takes {bfloat16 / float32:.2f} x float32's time: {chosen}")
    return faster


def has_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def measure(model: nn.Module, loss: Callable[[bool], Tensor]) -> tuple[float, float]:
    """Seconds that loss(bf16) and its gradients take in float32 and in bfloat16, the least of some rounds.

    The weights of `model` and their gradients are not touched, its buffers put back."""
    weights = [p for p in model.parameters() if p.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    least = {False: float("inf"), True: float("inf")}
    began = time.perf_counter()
    for number in range(1 + ROUNDS):
        for bf16 in least:
            start = time.perf_counter()
            torch.autograd.grad(loss(bf16), weights, allow_unused=True)
            if number > 0:  # the first round is slow: memory is asked for, kernels are made
                least[bf16] = min(least[bf16], time.perf_counter() - start)
        if number > 0 and time.perf_counter() - began > SECONDS:
            break
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return least[False], least[True]
