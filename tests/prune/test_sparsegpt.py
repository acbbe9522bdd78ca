"""SparseGPT against a reference in loops, and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openwork.prune import NM, PrunedTensor, Unstructured, magnitude, sparsegpt
from openwork.prune.masks import follows, keep_layer
from openwork.quant import Grid, rtn
from openwork.quant.hessian import output_error

from .weights import correlated_inputs, moment, weight

PATTERNS = [Unstructured(0.5), NM(2, 4), NM(4, 8), NM(2, 4, vector=4), NM(3, 10)]


def _reference(
    w: Tensor, hessian: Tensor, pattern: NM | Unstructured, grid: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Float64, one column and one row at a time; the inverse is formed and then factorised."""
    n, k = w.shape
    q = None
    if grid is not None:
        q = rtn(_reference(w, hessian, pattern)[0].float(), **grid.arguments())
    w, h = w.double().clone(), hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.zeros(n, k, dtype=torch.bool)
    step = pattern.m if isinstance(pattern, NM) else 128
    for j in range(k):
        if j % step == 0:
            end = min(j + step, k)
            cost = (w[:, j:end] / u.diagonal()[j:end]).square()
            if isinstance(pattern, NM):
                for row in range(0, n, pattern.vector):
                    shared = cost[row : row + pattern.vector].sum(0).tolist()
                    best = sorted(range(end - j), key=lambda c, s=shared: -s[c])[: pattern.n]
                    for column in best:
                        keep[row : row + pattern.vector, j + column] = True
            else:
                keep[:, j:end] = keep_layer(cost, pattern.sparsity)
        new = torch.where(keep[:, j], w[:, j], 0)
        if q is not None:
            group = j // q.group_size
            scale, zero = q.scales[:, group].double(), q.zeros[:, group].double()
            code = ((new / scale).round() + zero).clamp(0, 2**q.bits - 1)
            new = (code - zero) * scale
        error = (w[:, j] - new) / u[j, j]
        w[:, j] = new
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return w, keep


def _close(got: Tensor, want: Tensor, w: Tensor) -> None:
    """Within eps times the condition of the damped moment.

    Its eigenvalues add up to k times their mean, and none is below the damping, 1 % of it.
    """
    condition = 101 * w.shape[1]
    atol = 2.0**-24 * condition * float(w.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=atol)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (7, 30), (12, 300)])
def test_equals_the_reference(pattern: NM | Unstructured, shape: tuple[int, int]) -> None:
    w, h = weight(*shape), moment(correlated_inputs(shape[1]))
    pruned = sparsegpt(w, h, pattern)
    expected, keep = _reference(w, h, pattern)
    assert torch.equal(pruned.keep, keep)
    _close(pruned.weight, expected, w)


@pytest.mark.parametrize("group_size", [16, 32, None])
def test_equals_the_reference_on_a_grid(group_size: int | None) -> None:
    w, h = weight(9, 64), moment(correlated_inputs(64))
    grid = Grid(4, group_size)
    pruned = sparsegpt(w, h, NM(2, 4), grid=grid)
    expected, keep = _reference(w, h, NM(2, 4), grid)
    assert torch.equal(pruned.keep, keep)
    # One grid point is scale times code, rounded.
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_unrelated_inputs_give_magnitude_masks_and_no_update(pattern: NM | Unstructured) -> None:
    w = weight(16, 120)  # one block of columns
    pruned = sparsegpt(w, torch.eye(120) * 0.37, pattern)
    assert torch.equal(pruned.keep, magnitude(w, pattern).keep)
    assert torch.equal(pruned.weight, torch.where(pruned.keep, w, 0))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_update_pays(pattern: NM | Unstructured, seed: int) -> None:
    w, h = weight(32, 96, seed), moment(correlated_inputs(96, seed=seed + 7))
    pruned = sparsegpt(w, h, pattern)
    without = PrunedTensor.of(w, pruned.keep).weight
    assert output_error(w, pruned.weight, h) < output_error(w, without, h)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_and_counts_are_exact(pattern: NM | Unstructured) -> None:
    w, h = weight(24, 300), moment(correlated_inputs(300))
    keep = sparsegpt(w, h, pattern).keep
    if isinstance(pattern, NM):
        assert follows(keep, pattern)
    else:
        for block in keep.split(128, dim=1):
            assert int((~block).sum()) == round(pattern.sparsity * block.numel())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_rounded_weight_is_on_its_grid_and_removed_ones_stay_zero(
    bits: int, symmetric: bool
) -> None:
    w, h = weight(16, 96), moment(correlated_inputs(96))
    pruned = sparsegpt(w, h, NM(2, 4), grid=Grid(bits, 32, symmetric))
    assert pruned.quantized is not None
    assert torch.equal(pruned.quantized.dequantize(), pruned.weight)
    assert not pruned.weight[~pruned.keep].any()
    assert follows(pruned.weight != 0, NM(2, 4))
    assert (pruned.quantized.zeros is None) == symmetric


@pytest.mark.parametrize("seed", range(3))
def test_rounding_with_pruning_beats_rounding_after_it(seed: int) -> None:
    w, h = weight(64, 256, seed), moment(correlated_inputs(256, seed=seed + 7))
    grid = Grid(3, 32)
    joint = sparsegpt(w, h, NM(2, 4), grid=grid).weight
    after = rtn(sparsegpt(w, h, NM(2, 4)).weight, **grid.arguments()).dequantize()
    assert output_error(w, joint, h) < output_error(w, after, h)


def test_without_pruning_the_weight_stays() -> None:
    w, h = weight(8, 40), moment(correlated_inputs(40))
    assert torch.equal(sparsegpt(w, h, Unstructured(0.0)).weight, w)


def test_a_dead_input_costs_nothing() -> None:
    x = correlated_inputs(16)
    x[:, 3] = 0
    w = weight(5, 16)
    pruned = sparsegpt(w, moment(x), NM(2, 4))
    assert not pruned.weight[:, 3].any()
    assert pruned.weight.isfinite().all()


def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    w, h = weight(48, 260), moment(correlated_inputs(260))
    pruned = sparsegpt(w, h, NM(2, 4))
    torch.set_num_threads(1)
    assert torch.equal(sparsegpt(w, h, NM(2, 4)).keep, pruned.keep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(5)}, r"sparsegpt: hessian must be \[k, k\] = \[8, 8\]"),
        ({"hessian": -torch.eye(8)}, "sparsegpt: hessian must be positive semi-definite"),
        ({"weight": torch.full((2, 8), torch.inf)}, "sparsegpt: weight must be finite"),
        ({"damping": 0.0}, "sparsegpt: damping must be above 0, got 0.0"),
        ({"grid": Grid(5, 16)}, "sparsegpt: bits must be one of 2, 3, 4, 8, got 5"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.ones(2, 8), "hessian": torch.eye(8), "pattern": NM(2, 4)}
    with pytest.raises(ValueError, match=message):
        sparsegpt(**arguments | change)  # type: ignore[arg-type]
