"""Muon: momentum for matrices whose every update is made orthogonal, so that all directions are learned equally fast.

    optimizer = Muon(matrices, lr=3e-3)          embeddings, the output layer, norms and biases stay with AdamW

The gradients of a weight matrix are nearly of low rank: a few directions learn and the rest waits. Muon replaces the
averaged gradient G = U S V^T by U V^T, found without an SVD by five Newton-Schulz steps, a few small matrix products.
At the size of configs/tiny.toml it learns more from fewer tokens (LOG.md); the paper used AdamW, the default.

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv:2502.16982 (the scale
0.2 sqrt(max(m, n)): updates as large as AdamW's, so that learning rates carry over).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(G: Tensor, steps: int = 5) -> Tensor:
    """(B, m, n) -> about U V^T of each G = U S V^T: its singular values come to lie between 0.7 and 1.2.

    X <- a X + b (X X^T) X + c (X X^T)^2 X acts on every singular value as the polynomial a s + b s^3 + c s^5, whose
    repetition drives all of (0, 1] towards 1; the coefficients are Jordan's, chosen steep at 0."""
    X = G.mT if G.shape[1] > G.shape[2] else G  # X X^T is then the smaller of the two squares
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if G.shape[1] > G.shape[2] else X


class Muon(torch.optim.Optimizer):
    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), "matrices only"

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov: where the average is going
                updates.setdefault(p.shape, []).append((p, ahead))
            for (m, n), pairs in updates.items():  # all matrices of one shape at once
                scale = 0.2 * math.sqrt(max(m, n))
                for (p, _), O in zip(pairs, orthogonal(torch.stack([ahead for _, ahead in pairs]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(O, alpha=-group["lr"] * scale)
