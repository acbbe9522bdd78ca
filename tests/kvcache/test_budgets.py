"""Shares of a budget: sums are exact, floors hold, and ties go to the earlier token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.kvcache import keep_adaptive, keep_even


def scores_of(b: int, g: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties.
    return torch.randint(0, 5, (b, g, n), generator=generator).float()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 12), st.integers(1, 15), st.integers(0))
def test_even_budgets(b: int, g: int, n: int, budget: int, seed: int) -> None:
    scores = scores_of(b, g, n, seed % 1000)
    keep = keep_even(scores, budget)
    for row, kept in zip(scores.view(b * g, n).tolist(), keep.view(b * g, n).tolist(), strict=True):
        ranked = sorted(range(n), key=lambda j: (-row[j], j))
        assert {j for j in range(n) if kept[j]} == set(ranked[:budget])


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 15),
    st.floats(0, 1), st.integers(0),
)  # fmt: skip
def test_adaptive_budgets(b: int, g: int, n: int, budget: int, floor: float, seed: int) -> None:
    scores = scores_of(b, g, n, seed % 1000)
    keep = keep_adaptive(scores, budget, floor)
    budget = min(budget, n)
    assert keep.flatten(1).sum(1).tolist() == [g * budget] * b
    assert keep.sum(-1).min() >= max(1, int(floor * budget))
    own = keep_even(scores, max(1, int(floor * budget)))
    assert keep[own].all()
    # Nothing that is left out scores higher than something kept beyond the floor.
    for s in range(b):
        beyond, out = scores[s][keep[s] & ~own[s]], scores[s][~keep[s]]
        assert not len(beyond) or not len(out) or beyond.min() >= out.max()


def test_limits() -> None:
    scores = scores_of(2, 3, 10)
    assert keep_adaptive(scores, 10).all() and keep_even(scores, 99).all()
    assert torch.equal(keep_adaptive(scores, 4, floor=1.0), keep_even(scores, 4))
    infinite = scores.clone()
    infinite[..., -3:] = torch.inf
    assert keep_adaptive(infinite, 3, floor=0.0)[..., -3:].all()


@pytest.mark.parametrize("keep", [keep_even, keep_adaptive])
def test_refuses(keep: object) -> None:
    assert callable(keep)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        keep(scores_of(1, 1, 4), 0)
    with pytest.raises(ValueError, match=r"\[b, g, n\], got \[4\]"):
        keep(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"floor must be in 0 .. 1, got 2"):
        keep_adaptive(scores_of(1, 1, 4), 1, floor=2)
