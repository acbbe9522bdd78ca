"""Wanda's masks: rows, norms, invariance."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from openwork.prune import NM, Unstructured, magnitude, wanda
from openwork.prune.masks import follows, keep_rows

from .weights import correlated_inputs, moment, weight

PATTERNS = [Unstructured(0.5), NM(2, 4), NM(4, 8), NM(2, 4, vector=4)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equal_norms_are_row_magnitude(pattern: NM | Unstructured) -> None:
    w = weight(20, 40)
    keep = wanda(w, torch.full((40,), 3.0), pattern).keep
    if isinstance(pattern, NM):
        assert torch.equal(keep, magnitude(w, pattern).keep)
    else:
        assert torch.equal(keep, keep_rows(w.abs(), pattern.sparsity))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_scale_of_the_inputs_changes_nothing(pattern: NM | Unstructured) -> None:
    w, energy = weight(20, 40), moment(correlated_inputs(40)).diagonal()
    # A power of 4, so that scores scale exactly.
    assert torch.equal(wanda(w, energy, pattern).keep, wanda(w, energy * 256, pattern).keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_counts_of_rows_are_exact(sparsity: float) -> None:
    w, energy = weight(9, 37), torch.rand(37)
    pruned = wanda(w, energy, Unstructured(sparsity))
    assert (~pruned.keep).sum(1).tolist() == [round(sparsity * 37)] * 9
    assert torch.equal(pruned.weight[pruned.keep], w[pruned.keep])


def test_what_goes_matters_least_alone() -> None:
    w, x = weight(6, 8), correlated_inputs(8).double()
    pruned = wanda(w, moment(x).diagonal(), NM(4, 8))
    for row in range(6):
        lost = [(w[row, j] * x[:, j]).square().mean() for j in range(8)]
        removed = sorted(range(8), key=lambda j, lost=lost: float(lost[j]))[:4]
        assert sorted(removed) == (~pruned.keep[row]).nonzero()[:, 0].tolist()


def test_a_dead_input_goes_first() -> None:
    energy = torch.ones(8)
    energy[5] = 0
    w = weight(4, 8)
    w[:, 5] = 100
    assert not wanda(w, energy, Unstructured(0.125)).keep[:, 5].any()
    assert follows(wanda(w, energy, NM(2, 4)).keep, NM(2, 4))


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (torch.ones(3), "wanda: energy must be [k] = [4] floating point, got [3] torch.float32"),
        (torch.ones(4, dtype=torch.int64), "got [4] torch.int64"),
        (torch.tensor([1.0, 1.0, -1.0, 1.0]), "wanda: energy must be finite and at least 0"),
        (torch.full((4,), torch.inf), "wanda: energy must be finite"),
    ],
)
def test_bad_input_is_named(energy: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wanda(torch.ones(2, 4), energy, NM(2, 4))
