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
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.shard import is_divided, local


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
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                gradient, average = local(p.grad), local(self.state[p]["momentum"])
                average.lerp_(gradient, 1 - momentum)
                ahead = gradient.lerp(average, momentum)  # Nesterov: where the average is going
                by_shape.setdefault(p.shape, []).append((p, ahead))
            for (m, n), pairs in by_shape.items():  # all matrices of one shape at once
                parts = [ahead for _, ahead in pairs]
                if is_divided(pairs[0][0]):
                    updates = by_owners(parts, m, pairs[0][0].device_mesh.get_group())
                else:
                    updates = orthogonal(torch.stack(parts))
                scale = 0.2 * math.sqrt(max(m, n))
                for (p, _), update in zip(pairs, updates):
                    local(p).mul_(1 - lr * group["weight_decay"])
                    local(p).add_(update, alpha=-lr * scale)


# ---- Matrices that are divided among ranks -----------------------------------------------------------------

AT_ONCE = 4  # matrices that a rank has whole at a time: seven tables of this size


def by_owners(parts: list[Tensor], m: int, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """`orthogonal` of matrices of m rows, of each of which this rank has some: its rows of the results.

    The first matrix belongs to rank 0, the second to rank 1, and so on in turn. One exchange brings every
    matrix to its owner, one brings the results back, for AT_ONCE matrices of each owner:

        rank 0   rows 0-1 of A, B, C, D    -->   all of A, C   --> orthogonal -->   rows 0-1 of A, B, C, D
        rank 1   rows 2-3 of A, B, C, D    -->   all of B, D   --> orthogonal -->   rows 2-3 of A, B, C, D"""
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    rows = [len(some) for some in torch.arange(m).chunk(ranks)]  # of a matrix, that each rank has
    rows += [0] * (ranks - len(rows))
    for first in range(0, len(parts), AT_ONCE * ranks):
        some = parts[first : first + AT_ONCE * ranks]
        n = some[0].shape[1]
        owned = [len(some[owner::ranks]) for owner in range(ranks)]
        sent = torch.cat([part.flatten() for owner in range(ranks) for part in some[owner::ranks]])
        sizes = [count * rows[me] * n for count in owned]  # of what goes to each owner
        whole = [owned[me] * count * n for count in rows]  # of what comes from each rank
        found = exchange(sent, sizes, whole, group)
        if owned[me]:
            pieces = [piece.view(owned[me], count, n) for piece, count in zip(found.split(whole), rows)]
            G = orthogonal(torch.cat(pieces, 1)).to(found.dtype)  # (owned, m, n)
            found = torch.cat([piece.flatten() for piece in G.split(rows, 1)])
        back = exchange(found, whole, sizes, group)
        by_owner = [piece.view(count, rows[me], n) for piece, count in zip(back.split(sizes), owned)]
        yield from (by_owner[i % ranks][i // ranks] for i in range(len(some)))


def exchange(sent: Tensor, sizes: list[int], theirs: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends sizes[r] numbers to each rank r, and receives theirs[r] from it."""
    received = sent.new_empty(sum(theirs))
    dist.all_to_all_single(received, sent, theirs, sizes, group)
    return received
