"""Magnitude pruning of one matrix and of many under one threshold."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.prune import NM, Unstructured, global_magnitude, magnitude
from openwork.prune.masks import follows

from .weights import weight


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_smallest_of_a_matrix_go(sparsity: float) -> None:
    w = weight(17, 29)
    pruned = magnitude(w, Unstructured(sparsity))
    drop = round(sparsity * w.numel())
    removed, kept = w[~pruned.keep].abs(), w[pruned.keep].abs()
    assert len(removed) == drop
    assert not len(removed) or not len(kept) or removed.max() < kept.min()
    assert torch.equal(pruned.weight, torch.where(pruned.keep, w, 0))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 16), NM(2, 4, vector=8)])
def test_patterns(pattern: NM) -> None:
    w = weight(24, 52)
    pruned = magnitude(w, pattern)
    assert follows(pruned.keep, pattern)
    assert torch.equal(pruned.weight[pruned.keep], w[pruned.keep])


def _counts(weights: dict[str, Tensor], shares: dict[str, float]) -> dict[str, int]:
    counts = {name: shares[name] * w.numel() for name, w in weights.items()}
    return {name: round(count) for name, count in counts.items()}


def _by_sorting(weights: dict[str, Tensor], count: int) -> dict[str, int]:
    sizes = torch.cat([w.flatten().abs() for w in weights.values()])
    owner = [name for name, w in weights.items() for _ in range(w.numel())]
    first = sizes.argsort(stable=True)[:count].tolist()
    return {name: sum(owner[i] == name for i in first) for name in weights}


@given(st.floats(0, 1), st.integers(0, 3), st.integers(0, 100))
def test_one_threshold_equals_a_sort_of_everything(sparsity: float, digits: int, seed: int) -> None:
    # Rounded to few digits, most weights are equal to others.
    weights = {
        name: (weight(*shape, seed=seed + i) * scale).round(decimals=digits)
        for i, (name, shape, scale) in enumerate(
            [("a", (5, 8), 1.0), ("b", (3, 3), 0.2), ("c", (1, 20), 4.0)]
        )
    }
    shares = global_magnitude(weights, sparsity)
    total = sum(w.numel() for w in weights.values())
    counts = _counts(weights, shares)
    assert counts == _by_sorting(weights, round(sparsity * total))
    for name, w in weights.items():
        pruned = magnitude(w, Unstructured(shares[name]))
        assert int((~pruned.keep).sum()) == counts[name]


def test_every_matrix_keeps_its_floor_and_the_total_is_exact() -> None:
    # All of "small" is below the threshold that half of everything would have.
    weights = {"small": weight(40, 10) * 1e-3, "mid": weight(30, 10), "large": weight(50, 10) * 9}
    for floor in (0.0, 0.1, 0.37, 0.5):
        shares = global_magnitude(weights, 0.5, floor=floor)
        counts = _counts(weights, shares)
        assert sum(counts.values()) == 600
        assert all(shares[name] <= 1 - floor + 1e-9 for name in weights)
    assert global_magnitude(weights, 0.5)["small"] == 1.0


def test_zeros_and_extremes_have_their_place() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal
    values = torch.tensor([[0.0, -0.0, 1e-45, tiny, -1.0, 65504.0, -3e38, 1.0]])
    assert global_magnitude({"w": values}, 0.5) == {"w": 0.5}
    keep = magnitude(values, Unstructured(0.5)).keep
    assert keep.tolist() == [[False] * 4 + [True] * 4]


@pytest.mark.parametrize(
    ("sparsity", "floor", "w", "message"),
    [
        (1.5, 0.0, torch.ones(1, 1), "global_magnitude: sparsity in 0 .. 1 and floor in"),
        (0.5, 0.6, torch.ones(1, 1), "got 0.5 and 0.6"),
        (0.5, -0.1, torch.ones(1, 1), "got 0.5 and -0.1"),
        (0.5, 0.0, torch.full((1, 2), torch.nan), "global_magnitude: weight must be finite"),
    ],
)
def test_bad_input_is_named(sparsity: float, floor: float, w: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        global_magnitude({"w": w}, sparsity, floor=floor)


def test_a_weight_that_is_no_matrix_is_named() -> None:
    with pytest.raises(ValueError, match=r"magnitude: weight must be a non-empty \[n, k\]"):
        magnitude(torch.ones(3), NM(2, 4))
