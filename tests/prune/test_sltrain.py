"""Sparse plus low rank: dense gradients on the support, and no dense weight is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openwork.prune import SparseLowRankLinear


def _linear(**options: float) -> SparseLowRankLinear:
    linear = SparseLowRankLinear(11, 7, rank=3, density=0.2, alpha=6.0, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(linear.b)
    return linear


def test_it_multiplies_by_the_sum() -> None:
    linear = _linear()
    expected = linear.scale * (linear.b @ linear.a)
    for place, value in zip(linear.support.tolist(), linear.values, strict=True):
        expected[place // 11, place % 11] += value
    torch.testing.assert_close(linear.dense(), expected.detach())
    x = torch.randn(2, 5, 11)
    torch.testing.assert_close(linear(x), x @ expected.t())
    add = torch.randn(2, 5, 7)
    torch.testing.assert_close(linear(x, add), x @ expected.t() + add)


def test_gradients_are_the_dense_ones_on_the_support() -> None:
    linear = _linear().double()
    x = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 7, dtype=torch.float64)
    ((linear(x) - target) ** 2).sum().backward()
    dense = linear.dense().requires_grad_(True)
    y = x.detach().requires_grad_(True)
    ((y @ dense.t() - target) ** 2).sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(linear.values.grad, dense.grad.flatten()[linear.support])
    torch.testing.assert_close(linear.b.grad, linear.scale * dense.grad @ linear.a.t())
    torch.testing.assert_close(linear.a.grad, linear.scale * linear.b.t() @ dense.grad)


def test_gradcheck() -> None:
    linear = _linear().double()
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, b: Tensor, a: Tensor, values: Tensor) -> Tensor:
        state = {"b": b, "a": a, "values": values}
        return torch.func.functional_call(linear, state, (x,))

    assert torch.autograd.gradcheck(run, (x, linear.b, linear.a, linear.values))


def test_no_dense_weight_is_kept() -> None:
    linear = _linear()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(torch.randn(1, 11))
    assert max(saved) < 7 * 11
    assert sum(p.numel() for p in linear.parameters()) == 3 * (7 + 11) + 15


def test_it_starts_at_the_sparse_term_and_learns() -> None:
    torch.manual_seed(0)
    linear = SparseLowRankLinear(16, 8, rank=4, density=0.25)
    assert int((linear.dense() != 0).sum()) == 32
    target = torch.randn(8, 16)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 16)
        loss = ((linear(x) - x @ target.t()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_the_extremes_of_the_support(density: float) -> None:
    linear = SparseLowRankLinear(5, 3, rank=1, density=density)
    assert len(linear.values) == round(density * 15)
    linear(torch.ones(2, 5)).sum().backward()


def test_the_support_is_saved_and_repeats() -> None:
    first, second = _linear(seed=5), _linear(seed=6)
    assert not torch.equal(first.support, second.support)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dense(), second.dense())


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="SparseLowRankLinear: k, n and rank of at least 1"):
        SparseLowRankLinear(4, 4, rank=0)
    with pytest.raises(ValueError, match="got 4, 4, 1 and 1.5"):
        SparseLowRankLinear(4, 4, rank=1, density=1.5)
