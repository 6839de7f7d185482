"""Muon: what it promises of an update, and that it learns."""

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 48), (2, 48, 16)])
def test_singular_values_come_close_to_one_and_directions_stay(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S.clamp(min=0.05 * S.max())  # a direction without any gradient stays without
    O = orthogonal(U @ torch.diag_embed(S) @ Vh)
    inside = U.mT @ O @ Vh.mT  # diagonal, if the singular vectors are unchanged
    values = inside.diagonal(dim1=1, dim2=2)
    assert O.shape == G.shape and values.min() > 0.6 and values.max() < 1.25
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-3


def test_all_matrices_of_a_shape_at_once_are_as_one_by_one():
    G = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonal(G), torch.cat([orthogonal(g[None]) for g in G]), atol=1e-5)


def test_an_update_is_as_large_as_adamw_s_and_weights_decay():
    p = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(2)))
    before, p.grad = p.detach().clone(), torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    Muon([p], lr=0.01, weight_decay=0.5).step()
    update = (p - before * (1 - 0.01 * 0.5)) / 0.01
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_it_learns_the_weak_directions_of_a_badly_conditioned_map():
    torch.manual_seed(0)
    x = torch.randn(256, 32) * torch.logspace(0, -1.5, 32)
    target = 0.1 * torch.randn(32, 32)
    layer = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = Muon(layer.parameters(), lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()
    error = (layer.weight - target).square().mean(0) / target.square().mean(0)  # of each input
    assert error[:8].max() < 0.01 and error[-8:].mean() < 0.5  # the last inputs are 20 times fainter


def test_only_matrices_are_accepted():
    with pytest.raises(AssertionError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
