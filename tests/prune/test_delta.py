"""DARE: expectation, identity, counts."""

from __future__ import annotations

import pytest
import torch

from openwork.nn import SparseLinear, SumLinear
from openwork.ops import compress_sparse
from openwork.prune import dare

from .weights import model, rounding, tokens, weight


def test_without_dropping_it_is_the_difference() -> None:
    base, tuned = weight(7, 9), weight(7, 9, seed=1)
    delta = dare(base, tuned, 0.0, seed=0)
    assert torch.equal(delta.weight, tuned - base)
    assert delta.sparsity == 0


@pytest.mark.parametrize("drop", [0.5, 0.9])
def test_the_expectation_is_the_difference(drop: float) -> None:
    base, tuned = weight(4, 6), weight(4, 6, seed=1)
    count = 4000
    mean = sum(dare(base, tuned, drop, seed=seed).weight for seed in range(count)) / count
    difference = (tuned - base).abs()
    # The standard deviation of the mean is |D| sqrt(p / (1 - p) / count); six of them.
    bound = 6 * difference * (drop / (1 - drop) / count) ** 0.5
    assert bool(((mean - (tuned - base)).abs() <= bound).all())


def test_kept_values_are_scaled_and_the_share_is_met() -> None:
    base, tuned = weight(200, 300), weight(200, 300, seed=1)
    delta = dare(base, tuned, 0.75, seed=3)
    assert delta.sparsity == pytest.approx(0.75, abs=0.01)
    expected = (tuned - base)[delta.keep] * 4
    assert torch.equal(delta.weight[delta.keep], expected)


def test_the_seed_decides() -> None:
    base, tuned = weight(20, 30), weight(20, 30, seed=1)
    masks = [dare(base, tuned, 0.5, seed=seed).keep for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("drop", [0.0, 0.75])
def test_a_model_runs_on_its_base_and_sparse_differences(drop: float) -> None:
    base, tuned, expected = model(), model(seed=1), model()
    for seed, (name, parent, attribute) in enumerate(list(base.linears())):
        linear = getattr(parent, attribute)
        delta = dare(linear.weight, tuned.get_submodule(name).weight, drop, seed=seed)
        sparse = SparseLinear(compress_sparse(delta.weight, delta.keep))
        setattr(parent, attribute, SumLinear([linear, sparse]))
        expected.get_submodule(name).weight.add_(delta.weight)
    # One more sum for each linear, of as many terms.
    bound = 2 * rounding(expected) * float(expected(tokens()).abs().max())
    torch.testing.assert_close(base(tokens()), expected(tokens()), rtol=0, atol=bound)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="dare: drop must be at least 0 and below 1, got 1.0"):
        dare(torch.ones(1, 1), torch.ones(1, 1), 1.0, seed=0)
    with pytest.raises(ValueError, match=r"got \[1, 1\] and \[1, 2\]"):
        dare(torch.ones(1, 1), torch.ones(1, 2), 0.5, seed=0)
