"""Selection of masks: exact counts, ties, short blocks, shared columns."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.prune import NM, PrunedTensor, Unstructured
from openwork.prune.masks import follows, keep_layer, keep_nm, keep_rows

SHAPES = [(1, 1), (1, 7), (5, 16), (13, 37), (32, 64)]
PATTERNS = ["1:4", "2:4", "4:8", "3:16", "31:32", "1:2", "8:2:4", "16:1:4", "3:5:9"]


def _scores(n: int, k: int, levels: int = 0) -> Tensor:
    """Random scores; with ``levels``, so few different ones that most are equal."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    scores = torch.rand(n, k, generator=generator)
    return (scores * levels).floor() if levels else scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_counts_are_exact(shape: tuple[int, int], sparsity: float, levels: int) -> None:
    n, k = shape
    scores = _scores(n, k, levels)
    assert int((~keep_layer(scores, sparsity)).sum()) == round(sparsity * n * k)
    assert (~keep_rows(scores, sparsity)).sum(1).tolist() == [round(sparsity * k)] * n


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [0, 2])
def test_what_is_kept_is_highest_and_among_equals_first(
    shape: tuple[int, int], levels: int
) -> None:
    scores = _scores(*shape, levels)
    for sparsity in (0.3, 0.5):
        for keep, values in (
            (keep_layer(scores, sparsity).view(1, -1), scores.view(1, -1)),
            (keep_rows(scores, sparsity), scores),
        ):
            for row, score in zip(keep.tolist(), values.tolist(), strict=True):
                order = sorted(range(len(score)), key=lambda j: (-score[j], j))
                kept = sum(row)
                assert sorted(order[:kept]) == [j for j, k in enumerate(row) if k]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("levels", [0, 2])
def test_blocks_are_exact_and_best(shape: tuple[int, int], text: str, levels: int) -> None:
    pattern = NM.parse(text)
    scores = _scores(*shape, levels)
    keep = keep_nm(scores, pattern)
    assert keep.shape == scores.shape
    assert follows(keep, pattern)
    for r, rows in enumerate(scores.split(pattern.vector)):
        mine = keep[r * pattern.vector : r * pattern.vector + len(rows)]
        shared = rows.sum(0)
        for b, block in enumerate(shared.split(pattern.m)):
            order = sorted(range(len(block)), key=lambda j: (-float(block[j]), j))
            expected = sorted(order[: pattern.n])
            columns = slice(b * pattern.m, b * pattern.m + len(block))
            for row in mine[:, columns]:
                assert row.nonzero()[:, 0].tolist() == expected


def test_follows_refuses_what_it_should() -> None:
    keep = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert follows(keep, NM(2, 4))
    assert not follows(keep, NM(1, 4))
    assert not follows(keep, NM(2, 4, vector=2))
    assert follows(keep[:1].expand(2, 4), NM(2, 4, vector=2))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1))
def test_any_share_of_any_matrix(n: int, k: int, sparsity: float) -> None:
    scores = _scores(n, k, 5)
    assert int((~keep_layer(scores, sparsity)).sum()) == round(sparsity * n * k)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(4, 4), "NM: 1 <= n < m <= 32 and vector in 1 .. 128 expected, got n = 4"),
        (lambda: NM(0, 4), "got n = 0, m = 4 and vector = 1"),
        (lambda: NM(1, 64), "got n = 1, m = 64"),
        (lambda: NM(2, 4, 0), "vector = 0"),
        (lambda: NM.parse("2/4"), "NM: pattern 'N:M' or 'V:N:M' expected, got '2/4'"),
        (lambda: NM.parse("1:2:3:4"), "got '1:2:3:4'"),
        (lambda: NM.parse("-2:4"), "got '-2:4'"),
        (lambda: Unstructured(1.5), "Unstructured: sparsity must be in 0 .. 1, got 1.5"),
        (lambda: Unstructured(float("nan")), "got nan"),
    ],
)
def test_bad_patterns_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("text", PATTERNS)
def test_patterns_read_as_they_print(text: str) -> None:
    assert str(NM.parse(text)) == text


def test_a_pruned_tensor_is_checked() -> None:
    weight, keep = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for bad_weight, bad_keep, message in (
        (weight, keep, "weight must be 0 wherever keep is false"),
        (weight.double(), keep, "float32 and keep bool expected"),
        (weight, keep.float(), "float32 and keep bool expected"),
        (weight, keep[:1], r"keep must have the shape of weight, \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            PrunedTensor(bad_weight, bad_keep)
    assert PrunedTensor.of(weight, ~keep).sparsity == 0
    assert PrunedTensor.of(weight, keep).sparsity == 1


def test_scores_of_every_order_give_every_mask() -> None:
    masks = {
        tuple(keep_nm(torch.tensor([order], dtype=torch.float32), NM(2, 4))[0].tolist())
        for order in itertools.permutations(range(4))
    }
    assert len(masks) == 6
