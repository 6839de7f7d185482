"""Muon: momentum whose update of each matrix is made orthogonal, so that all directions learn equally fast.

    optimizer = Muon(matrices, lr=3e-3)      embeddings, the output layer, norms and biases stay with AdamW

The gradients of a weight matrix are nearly of low rank: a few directions learn fast, the rest slowly. Muon
replaces the averaged gradient G = U S V^T by U V^T, found without an SVD by five Newton-Schulz steps: a few
small matrix products. The paper used AdamW, the default here. At the size of configs/tiny.toml Muon learns
more from fewer tokens (LOG.md).

References: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025, arXiv:2502.16982
(the scale 0.2 sqrt(max(m, n)): updates as large as AdamW's, so that its learning rates fit).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(G: Tensor, steps: int = 5) -> Tensor:
    """G (B, m, n), each U S V^T -> about U V^T: singular values between 0.7 and 1.2.

    X <- a X + b (X X^T) X + c (X X^T)^2 X acts on every singular value s as a s + b s^3 + c s^5, which drives
    all of (0, 1] towards 1 when repeated. The coefficients are Jordan's, chosen steep at 0."""
    tall = G.shape[1] > G.shape[2]
    X = G.mT if tall else G  # X X^T is then the smaller of the two squares
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values now at most 1
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            assert all(p.ndim == 2 for p in group["params"]), "matrices only"

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            lr = group["lr"]
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(average, momentum)  # Nesterov: where the average is going
                by_shape.setdefault(p.shape, []).append((p, ahead))
            for (m, n), pairs in by_shape.items():  # all matrices of one shape at once
                updates = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                scale = 0.2 * math.sqrt(max(m, n))
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * scale)
