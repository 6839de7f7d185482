"""The one training loop, of HuBERT, its normalizer, the text model and stages 1 to 3 (the vocoder has two).

    optimize(run, "stage1", folder, model, loss, batch_at, section, probe)

A step is the same everywhere: fetch the micro-batches of this step, add up their gradients, clip, update.
What differs between stages comes in from outside: the model, its loss, its batches, what is shown of it now
and then.

A step's random numbers depend on (seed, stage, step, rank) and its batch is a function of the step, so
weights, optimizer state and step number are all that a killed run needs to continue with the same losses to
the last bit.

The loss of a step is the sum over all its targets divided by their number (or by the sum of their weights),
over micro-batches and ranks. A mean of means would let the targets of a short micro-batch count for more; so
one process, accumulation and many processes learn the same, but for rounding (and dropout, which each rank
draws for itself).

A step whose loss or gradient is not finite changes nothing; it is counted, and ten in a row end the run.

References: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101; schedule and betas as LLaMA, arXiv:2302.13971
§2.3.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Amount, BatchSize, Count, Share, Whole, leave_end_to_parent, told_to_end
from run import Metrics, Run, all_reduce_sum, autocast, cosine, progress, rank, world_size
from training import shard, states
from training.meters import Meters
from training.muon import Muon
from training.precision import choose_bf16


@dataclass
class Optimization(shard.Sharding):
    """Settings of the loop. Batch size, peak rate: Table 3; steps: §5.1; warm-up: ours; else LLaMA's."""

    steps: Whole = 2100
    batch_size: BatchSize = 1536  # documents (or crops) a step, over all ranks and micro-batches
    accumulate: Count = 1  # micro-batches a step
    lr: Amount = 2e-4  # peak learning rate
    warmup: Whole = 60  # steps
    floor: Share = 0.1  # the last learning rate, as a fraction of `lr`
    weight_decay: Amount = 0.1  # on matrices only
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Amount = 1.0  # largest norm of the gradient
    muon: bool = False  # Muon (training/muon.py) instead of AdamW for the matrices of the layers
    bf16: bool = True  # matrix products in bfloat16 where that is faster; weights and updates stay float32
    eval_every: Count = 200  # steps
    save_every: Count = 200  # steps
    keep: Count = 2  # saved states of a divided model


# keys that may differ when an interrupted stage is resumed
MAY_CHANGE = {"eval_every", "save_every", "keep", "sharding", "checkpointing", "compile"}


def no_probe() -> tuple[dict[str, float], str]:
    """The default probe: nothing is evaluated while a stage trains."""
    return {}, ""


def optimize(
    run: Run,
    name: str,
    folder: Path,
    model: nn.Module,
    loss: Callable,
    batch_at: Callable,
    section: Optimization,
    probe: Callable[[], tuple[dict[str, float], str]] = no_probe,
    fill: Callable[[nn.Module], None] | None = None,
):
    """Trains `model` for section.steps steps, or for the rest of them if `folder` holds the state of a
    killed run.

    name: of the metrics file and of the progress bar
    loss(model, micro_batch) -> Loss
    batch_at(step) -> list of micro-batches, each a tuple of tensors
    probe() -> ({metric on held-out data: value}, a sample of the output), every section.eval_every steps
    fill(model): gives a model its weights that is on meta, because it is to be divided (shard.is_sharded)
    """
    device = run.device
    folder.mkdir(parents=True, exist_ok=True)
    meta = states.meta(folder)

    def loss_in(batch: list[Tensor], bf16: bool) -> Tensor:
        with autocast(device, bf16):
            return loss(model, batch).total

    advice = f"{name}: {smaller_steps(section)}"
    with told_of_memory(advice):
        bf16 = section.steps > 0 and choose_bf16(
            name,
            section.bf16,
            device,
            meta,
            model.train(),
            batch=lambda: batch_at(0)[0],
            loss=loss_in,
        )
        objective = Objective(model, loss).train()
        objective = shard.distribute(name, objective, section, device, bf16, fill and partial(fill, model))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(trained, section, device)
    meta = states.load(folder, trained, optimizers, section.steps)
    first = meta.get("step", 0)
    metrics = Metrics(run.metrics / f"{name}.jsonl", first, run.tensorboard)
    meters = Meters(device, model)
    skipped = SkippedSteps(name, meta)
    steps = torch.utils.data.DataLoader(
        Steps(batch_at, first, section.steps),
        batch_size=None,
        num_workers=run.workers,
        multiprocessing_context="fork" if run.workers else None,
        worker_init_fn=lambda worker: leave_end_to_parent(),
        pin_memory=device.type == "cuda",  # the copies to it wait for nothing
    )
    batches = steps if run.workers or device.type == "cuda" else read_ahead(steps)

    with progress(section.steps, first, name) as bar, told_of_memory(advice), told_to_end() as is_told:
        for step, micro_batches in enumerate(meters.waiting(batches), first):
            if isinstance(micro_batches, Exception):
                raise micro_batches
            torch.manual_seed(zlib.crc32(f"{run.seed} {name} {step} {rank()}".encode()))
            lr = cosine(step, section.warmup, section.steps, section.lr, section.floor)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr

            # ---- gradients: of the sum of all losses first, then divided by the sum of all weights
            losses = []
            for i, batch in enumerate(micro_batches):
                batch = [t.to(device, non_blocking=True) for t in batch]
                last = i + 1 == len(micro_batches)
                with shard.gradients_exchanged(objective, last), autocast(device, bf16):
                    found = objective(batch)
                    found.total.backward()
                losses.append(found)
            sums, counts = sum_losses(losses, is_told())
            scale = world_size() / counts[0].clamp(min=1e-9)  # data parallelism has averaged over the ranks
            norm = scale * shard.gradient_norm(trained.values())
            averages = sums / counts.clamp(min=1e-9)
            found = torch.cat([averages, sums[-1:], counts[-1:], scale[None], norm[None]])
            *averages, tokens, told, scale, norm = found.tolist()  # the one wait of a step for the device
            numbers = dict(zip(["loss", *losses[0].metrics], averages))

            # ---- update
            weights = map(shard.local, trained.values())
            is_good = skipped.is_good(step, (numbers["loss"], norm), lr, weights, batch)
            if is_good:
                clipped = min(1.0, section.clip / (norm + 1e-6))
                shard.scale_gradients(trained.values(), scale * clipped)
            with autocast(device, bf16):  # Muon's matrix products
                for optimizer in optimizers.values():
                    if is_good:
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

            # ---- report, probe, save
            cost = meters.read(tokens, numbers.get("length"))
            bar.update()
            shown = f"loss {numbers['loss']:.3f}, {cost['tokens_per_s']:,.0f} tokens/s{skipped.shown}"
            bar.set_postfix_str(shown, refresh=False)
            if (step + 1) % section.eval_every == 0 or step + 1 == section.steps:
                model.eval()
                with shard.gathered(objective, device, bf16), shard.not_compiled(section, device):
                    held_out, sample = probe()
                model.train()
                numbers |= held_out
                shown = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
                if rank() == 0:
                    bar.write(f"{name}, step {step + 1}: {shown}{skipped.shown}{sample}")
                meters.begin()
            if not is_good:
                numbers["skipped"] = skipped.total
            metrics.write(step=step, lr=lr, grad_norm=norm, **cost, **numbers)
            if (step + 1) % section.save_every == 0 or told:
                meta = {"step": step + 1, "bf16": bf16} | skipped.meta
                states.save(folder, trained, optimizers, meta, section.keep)
            if told:
                states.end_after(step + 1)
    states.wait()
    model.eval()


class Loss(NamedTuple):
    """Of one micro-batch. Everything is a tensor of one number on the model's device, so that nothing waits
    for it."""

    total: Tensor  # the sum over targets of weight x loss
    weight: Tensor  # the sum of the targets' weights
    tokens: Tensor  # tokens or frames that the model has read
    metrics: dict[str, tuple[Tensor, Tensor]]  # further averages: (sum, count)


def sum_losses(losses: list[Loss], is_told: bool) -> tuple[Tensor, Tensor]:
    """(sums, counts) over a step's micro-batches and ranks: of the loss, of each metric, and of the tokens,
    whose count is not 0 if any rank has been told to end: so all end after the same step."""
    rows = []
    for loss in losses:
        pairs = [
            (loss.total, loss.weight),
            *loss.metrics.values(),
            (loss.tokens, torch.full_like(loss.tokens, is_told)),
        ]
        rows.append(torch.stack([torch.stack([x.detach().float() for x in pair]) for pair in pairs]))
    return all_reduce_sum(sum(rows)).unbind(1)


class Objective(nn.Module):
    """A model together with its loss, so that data parallelism sees one forward pass."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch):
        return self.loss(self.model, batch)


class Steps(torch.utils.data.Dataset):
    """Batches indexed by training step, so that DataLoader workers can prefetch them while a GPU computes."""

    def __init__(self, batch_at: Callable, first: int, last: int):
        self.batch_at = batch_at
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, i: int):
        try:
            micro_batches = self.batch_at(self.first + i)
        except (ValueError, OSError) as problem:  # a process of its own would add its traceback to the line
            return problem
        if torch.utils.data.get_worker_info():
            try:
                for tensor in (tensor for batch in micro_batches for tensor in batch):
                    tensor.share_memory_()  # here, where it can be told, and not on its way
            except RuntimeError as problem:
                what = " ".join(str(problem).split())[:120]
                return ValueError(
                    f"{what}; use --workers 0, or make /dev/shm larger (docker run --shm-size 2g)"
                )
        return micro_batches


def read_ahead(batches: Iterable) -> Iterator:
    """The same batches; a thread prepares the next one while a step computes, if there is a core for it."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def make_optimizers(
    trained: dict[str, nn.Parameter], section: Optimization, device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and with section.muon also Muon for the matrices of the layers. Each parameter belongs to
    one."""
    # One row a symbol: no linear map, not for Muon.
    tables = ("embed_tokens.weight", "lm_head.weight", "output_projection.weight", "label_embs")
    matrices = [p for p in trained.values() if p.ndim >= 2]
    vectors = [p for p in trained.values() if p.ndim < 2]
    inner = []
    if section.muon:
        inner = [p for name, p in sorted(trained.items()) if p.ndim == 2 and not name.endswith(tables)]
        mine = set(inner)
        matrices = [p for p in matrices if p not in mine]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = device.type != "mps"
    optimizers = {"adamw": torch.optim.AdamW(groups, section.lr, tuple(section.betas), fused=fused)}
    if inner:
        optimizers["muon"] = Muon(inner, section.lr, weight_decay=section.weight_decay)
    return optimizers


# ---- What may go wrong in a step ---------------------------------------------------------------------------


MOST_IN_A_ROW = 10


class SkippedSteps:
    """Counts the steps whose loss or gradient was not finite. Every rank has the same sums, so all decide
    alike."""

    def __init__(self, name: str, meta: dict):
        """meta: of the training state that the run goes on from."""
        self.name = name
        counts = [meta.get(key) for key in ("skipped", "skipped_in_a_row")]
        self.total, self.in_a_row = (n if type(n) is int and n >= 0 else 0 for n in counts)

    @property
    def meta(self) -> dict[str, int]:
        return {"skipped": self.total, "skipped_in_a_row": self.in_a_row}

    @property
    def shown(self) -> str:
        return f", {self.total} step(s) skipped: not finite" if self.total else ""

    def is_good(
        self, step: int, numbers: Iterable[float], lr: float, weights: Iterable[Tensor], batch: Iterable
    ) -> bool:
        """Whether a step may change the weights: its losses and gradient norms are `numbers`. ValueError if
        it is the last of too many in a row that may not."""
        if all(math.isfinite(number) for number in numbers):
            self.in_a_row = 0
            return True
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < MOST_IN_A_ROW:
            return False
        if not all(weight.isfinite().all() for weight in weights):
            cause = "the weights that it began with are not finite: make the stage before it anew"
        elif not all(x.isfinite().all() for x in batch if isinstance(x, Tensor) and x.is_floating_point()):
            cause = "the sound of this step is not finite: look for a damaged recording"
        else:
            cause = f"most likely the learning rate is too high (here {lr:.2g}): lower lr and begin it anew"
        raise ValueError(
            f"{self.name}: no finite loss and gradient in {self.in_a_row} steps in a row, up to step {step}; "
            f"{cause}. The weights before them are kept"
        )


@contextlib.contextmanager
def told_of_memory(advice: str) -> Iterator[None]:
    """Refused memory becomes one line with advice; so does a process of --workers that has been killed."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        what = " ".join(str(problem).split())[:120]
        refused = ("not enough memory", "out of memory", "allocate memory")
        if isinstance(problem, MemoryError) or any(words in str(problem) for words in refused):
            raise ValueError(f"not enough memory ({what}); {advice}") from None
        if what.startswith("DataLoader worker"):
            raise ValueError(f"{what}; take fewer --workers, or 0") from None
        raise


def smaller_steps(section: Optimization) -> str:
    """Advice: which keys to change."""
    lower = [key for key in ("batch_size", "max_len", "frames") if hasattr(section, key)]
    now = [f"{key} (now {getattr(section, key)})" for key in lower]
    advice = [f"raise accumulate (now {section.accumulate})"]
    if section.batch_size <= section.accumulate * world_size():
        advice = []  # a micro-batch is one document
    if section.checkpointing != "block" and hasattr(section, "max_len"):
        advice.append('set checkpointing = "block"')
    if section.sharding == "ddp" and world_size() > 1:
        advice.append('set sharding = "fsdp"')
    return ", or ".join([*advice, f"lower {' or '.join(now)}"])


def check_ranks(name: str, section: Optimization, ranks: int):
    """ValueError, before anything is trained, if a step of this section cannot be divided among so many
    processes."""
    pieces = ranks * section.accumulate
    if section.steps and section.batch_size < pieces:
        raise ValueError(
            f"{name}.batch_size is {section.batch_size}: less than one for each of {ranks} process(es) x "
            f"{name}.accumulate {section.accumulate}; make it at least {pieces}, or take fewer processes"
        )
    if section.steps and section.sharding == "fsdp" and ranks == 1:
        raise ValueError(
            f'{name}.sharding is "fsdp", but one process has nobody to divide a model with; start several, '
            'torchrun --nproc_per_node 2 train.py ..., or take "auto"'
        )
