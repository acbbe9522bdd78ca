"""SparseGPT: remove weights column by column; the columns that are still free make up for it.

With ``H = E[x x^T]`` and ``U`` the upper triangular factor of its inverse, ``H^-1 = U^T U``, the
columns of ``W [n, k]`` are done from left to right::

    e_j    = (w_j - q_j) / U_jj          q_j = w_j where it is kept, 0 where it is removed
    w_l   <- w_l - e_j * U_jl            for every l > j

Removing ``w_ij`` at its turn costs ``(w_ij / U_jj)^2``, and those squares are the scores. They are
taken from the weights as corrected so far: unstructured, for 128 columns over all rows when their
turn comes; N:M, for each block of M columns when it is reached.

With a grid, ``q_j`` is also rounded to it, and the same correction makes up for both. Every grid
has an exact 0, so removed weights stay removed. Corrections make some kept weights larger than all
weights were, so the ranges of the grid come from a first pass that removes and does not round: with
those of ``W`` itself, rounding after pruning was better than rounding with it.

Frantar, Alistarh 2023, arXiv 2301.00774. Different here: the inverse is not formed
(:func:`~openwork.quant.hessian.inverse_factor`), a block is a multiple of M, and rows that share
their columns (V:N:M) are scored by the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.prune.masks import NM, Pattern, keep_layer, keep_nm
from openwork.prune.pruned import PrunedTensor
from openwork.quant.grid import (
    Grid,
    QuantizedTensor,
    check_weight,
    resolve_group_size,
    round_to_grid,
)
from openwork.quant.hessian import check_hessian, inverse_factor
from openwork.quant.rtn import find_grid

# Columns whose corrections are applied one by one; those after them get all at once, in a product.
_BLOCK = 128


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    grid: Grid | None = None,
) -> PrunedTensor:
    """Remove weights so that the outputs for given inputs change little, and round if asked to.

    A column whose input was always 0 (``H_jj = 0``) becomes 0. With ``H`` a multiple of the
    identity the masks are those of :func:`~openwork.prune.magnitude` on each block of columns, and
    kept weights do not change.

    Args:
        weight: ``[n, k]`` floating point, finite.
        hessian: ``[k, k]`` float32 or float64, symmetric positive semi-definite, of any positive
            scale: the second moment of the inputs (:class:`~openwork.quant.InputSecondMoment`).
        pattern: unstructured zeros are a share of each 128 columns over all rows.
        damping: share of the mean of the diagonal that is added to it; ten times more as often as
            the factorisation fails.
        grid: round the kept weights to this grid, which takes twice the work. None: they stay
            floating point.

    Returns:
        The kept weights, corrected, and with a grid also their codes.

    Raises:
        ValueError: an unsupported grid, a weight or Hessian that is not finite or of the wrong
            shape, a Hessian that is not symmetric positive semi-definite.

    Example:
        >>> p = sparsegpt(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), torch.eye(4), NM(2, 4))
        >>> p.weight.tolist()
        [[0.0, 4.0, 0.0, 3.0]]
    """
    check_weight("sparsegpt", weight)
    k = weight.shape[1]
    check_hessian("sparsegpt", hessian, k)
    weight = weight.float().masked_fill(hessian.diagonal() == 0, 0)
    factor = inverse_factor("sparsegpt", hessian, damping, torch.arange(k))
    pruned = _prune(weight, factor, pattern)
    if grid is None:
        return pruned
    rounding = _Rounding(pruned.weight, grid)
    keep = _prune(weight, factor, pattern, rounding).keep
    quantized = rounding.result()
    return PrunedTensor.of(quantized.dequantize(), keep, quantized)


def _prune(
    weight: Tensor, factor: Tensor, pattern: Pattern, rounding: _Rounding | None = None
) -> PrunedTensor:
    """One pass over all columns."""
    n, k = weight.shape
    # Transposed, because the loop works on whole columns and a row of a tensor is contiguous.
    columns = weight.t().contiguous()
    keep = torch.empty(k, n, dtype=torch.bool)
    step = _BLOCK // pattern.m * pattern.m if isinstance(pattern, NM) else _BLOCK
    for begin in range(0, k, step):
        end = min(begin + step, k)
        errors = _prune_block(columns, keep, factor, begin, end, pattern, rounding)
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return PrunedTensor.of(columns.t().contiguous(), keep.t().contiguous())


def _prune_block(
    columns: Tensor,
    keep: Tensor,
    factor: Tensor,
    begin: int,
    end: int,
    pattern: Pattern,
    rounding: _Rounding | None,
) -> Tensor:
    """Prune the columns ``begin .. end - 1``, which earlier blocks have been corrected for.

    Returns:
        Their errors ``e_j``, ``[end - begin, n]``; the corrections after ``end`` are still to do.
    """
    errors = torch.empty_like(columns[begin:end])
    choice = pattern.m if isinstance(pattern, NM) else end - begin
    for j in range(begin, end):
        if (j - begin) % choice == 0:
            last = min(j + choice, end)
            cost = (columns[j:last] / factor.diagonal()[j:last, None]).square_().t()
            if isinstance(pattern, NM):
                keep[j:last] = keep_nm(cost, pattern).t()
            else:
                keep[j:last] = keep_layer(cost, pattern.sparsity).t()
        column = columns[j]
        new = column * keep[j]
        if rounding is not None:
            new = rounding.round(j, new)
        error = errors[j - begin]
        torch.sub(column, new, out=error).div_(factor[j, j])
        columns[j] = new
        columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
    return errors


class _Rounding:
    """The grids of a weight and the codes found so far."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        n, k = weight.shape
        self._grid = grid
        self._size = resolve_group_size("sparsegpt", grid.bits, grid.group_size, k)
        arguments = grid.arguments() | {"group_size": self._size}
        self._scales, self._zeros = find_grid("sparsegpt", weight, **arguments)
        self._codes = torch.empty(k, n, dtype=torch.uint8)

    def round(self, column: int, values: Tensor) -> Tensor:
        """``values [n]`` of a column on the grid."""
        group = column // self._size
        scales, zeros = self._scales[:, group], self._zeros[:, group]
        codes = round_to_grid(values, scales, zeros, self._grid.bits)
        self._codes[column] = codes
        return codes.sub_(zeros).mul_(scales)

    def result(self) -> QuantizedTensor:
        return QuantizedTensor(
            codes=self._codes.t().contiguous(),
            scales=self._scales.to(self._grid.scale_dtype),
            zeros=None if self._grid.symmetric else self._zeros.to(torch.uint8),
            bits=self._grid.bits,
            group_size=self._size,
        )
