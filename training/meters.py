"""Meters of a training step: throughput, data wait, utilization (MFU), peak memory.

    meters = Meters(device, model)
    for batch in meters.waiting(batches):
        ...
        numbers |= meters.read(tokens, length)

Of the FLOPs that a language model needs (6 N + 12 L d T a token) the utilization is the part of what a GPU
could do in that time, by its maker's number for dense products in bfloat16: activations that are computed
again do not count as work.

References: Kaplan et al. 2020, arXiv:2001.08361 (FLOPs); Chowdhery et al. 2022, arXiv:2204.02311 appendix B
(model FLOPs utilization).
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

import lora
from llama import Llama
from run import world_size

GIB = 2**30
COSTS = ("tokens_per_s", "tokens_per_s_each", "wait", "peak_gib", "mfu")  # what `Meters.read` finds

# ---- What a GPU can do -------------------------------------------------------------------------------------


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


def gpu_of(name: str) -> Gpu | None:
    """The row of GPUS for what a driver calls a GPU, as "NVIDIA A100-SXM4-80GB"; None: it is not there."""
    words = set(name.upper().replace("-", " ").split())
    found = [row for key, row in GPUS.items() if set(key.upper().split("-")) <= words]
    return found[-1] if found else None  # H100-PCIe is further down than H100


# ---- What a model needs ------------------------------------------------------------------------------------


def matrices(model: Llama) -> int:
    """Weights that multiply: not the embedding, which is looked up, nor the norms. Adapters do not count."""
    c = model.config
    attention = 2 * c.dim * c.dim + 2 * c.dim * c.n_kv_heads * c.head_dim
    return c.n_layers * (attention + 3 * c.dim * c.hidden_dim) + c.dim * c.vocab_size


def flops(model: Llama, length: float) -> float:
    """Of a training step, for each token of documents of `length` tokens."""
    adapters = sum(p.numel() for p in lora.parameters(model))
    attention = 12 * model.config.n_layers * model.config.dim * length
    return (4 if adapters else 6) * matrices(model) + 6 * adapters + attention


# ---- What a step cost --------------------------------------------------------------------------------------


class Meters:
    """Meters of this process; token counts are sums over all processes."""

    def __init__(self, device: torch.device, model: nn.Module):
        self.device = device
        is_cuda = device.type == "cuda"
        self.gpu = gpu_of(torch.cuda.get_device_name(device)) if is_cuda else None
        self.model = model if isinstance(model, Llama) else None
        self.waited = 0.0
        self.begin()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def waiting(self, batches: Iterable) -> Iterator:
        """Yields the batches and records the wait for each."""
        batches = iter(batches)
        self.begin()
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited = time.perf_counter() - began
            yield batch

    def begin(self):
        """Restarts the clock: time before this call, of an evaluation for example, does not count."""
        self.began = time.perf_counter()

    def read(self, tokens: float, length: float | None = None) -> dict[str, float]:
        """Of the step since `begin`: tokens (or frames) a second, on all processes and on each; the share of
        its time that it waited for data; the most memory since training began, in GiB. With `length`, the
        average length of the document that a token is in, and on a GPU that is known: mfu."""
        now = time.perf_counter()
        seconds = max(now - self.began, 1e-9)
        speed = tokens / seconds
        each = speed / world_size()
        found = {"tokens_per_s": speed, "tokens_per_s_each": each, "wait": min(1.0, self.waited / seconds)}
        if peak := peak_memory(self.device):
            found["peak_gib"] = peak / GIB
        if self.gpu and self.model and length:
            found["mfu"] = flops(self.model, length) * each / self.gpu.flops
        self.begin()
        return found


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process had at once: of a GPU, or resident; 0: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
