"""Training states: what an interrupted stage needs to go on, saved by all processes of a run together.

    meta = states.meta(folder)                                 {} if there is none
    meta = states.load(folder, trained, optimizers, steps)     the same; trained: {name: parameter}
    states.save(folder, trained, optimizers, {"step": 200})    called by all ranks
    states.wait()                                              until the last one is on disk
    states.remove(folder)                                      of a stage that is finished

Where every process has the whole model, the state is the one file of checkpoint.py, written by rank 0.
"""

from pathlib import Path

import torch
from torch import nn

import checkpoint
from run import rank

Trained = dict[str, nn.Parameter]
Optimizers = dict[str, torch.optim.Optimizer]


def single_file(folder: Path) -> Path:
    """The state of a run whose processes all have the whole model."""
    return Path(folder) / "state.safetensors"


def load(folder: Path, trained: Trained, optimizers: Optimizers, steps: int | None = None) -> dict:
    """Puts back the newest state that is whole, to the last bit, and returns its `meta`; {} if there is none.

    Called by all ranks. A state that is damaged is told, and the one before it is taken; ValueError, one
    line, if none fits or the step is beyond `steps`; nothing is changed then."""
    if not checkpoint.has_training(single_file(folder)):
        return {}
    return checkpoint.load_training(single_file(folder), {"model": trained}, optimizers, steps)


def meta(folder: Path) -> dict:
    """The `meta` of the state that `load` will take if it fits, which may be asked before there are
    optimizers; {} if there is none."""
    return checkpoint.training_meta(single_file(folder))


def save(folder: Path, trained: Trained, optimizers: Optimizers, meta: dict) -> None:
    """Saves the weights and what the optimizers keep of them, and `meta` (JSON types, with a "step"). Called
    by all ranks after the same step."""
    if rank() == 0:
        checkpoint.save_training(single_file(folder), {"model": trained}, optimizers, meta)


def wait() -> None:
    """Returns when the last state is on disk; what went wrong in writing it is raised here. Called by all
    ranks."""


def remove(folder: Path) -> None:
    """Of a stage that is finished; called by rank 0."""
    checkpoint.remove_training(single_file(folder))
