"""GPTQ: round one column at a time and correct the columns that are still free.

Rounding ``W [n, k]`` to ``Q`` costs the output ``tr((W - Q) H (W - Q)^T)`` with ``H = E[x x^T]``.
With ``U`` the upper triangular factor of the inverse, ``H^-1 = U^T U``, the columns are done from
left to right::

    q_j    = Q(w_j)
    e_j    = (w_j - q_j) / U_jj
    w_l   <- w_l - e_j * U_jl            for every l > j

which is the best correction of the later columns for the error made in this one. Corrections are
applied late, all those of a run of columns to the run after it in one matrix product::

    round(columns a .. c):   round(a .. b);   W[b .. c] <- W[b .. c] - E[a .. b] U[a .. b, b .. c];
                             round(b .. c)                    with b in the middle, E the errors

Frantar et al. 2022, arXiv 2210.17323. Different here: grids come from the *stored* (rounded)
scales, the inverse is not formed, and runs are halved down to single columns instead of being cut
into blocks of 128.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from openwork.quant.grid import (
    QuantizedTensor,
    check_weight,
    resolve_group_size,
    round_to_grid,
)
from openwork.quant.hessian import check_hessian, inverse_factor
from openwork.quant.rtn import find_grid


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = False,
    search: bool = False,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Quantize a weight so that its outputs for given inputs change little.

    A column whose input was always 0 (``H_jj = 0``) becomes 0. With ``H`` a multiple of the
    identity the result is that of :func:`rtn`, bit for bit.

    Args:
        weight: ``[n, k]`` floating point, finite.
        hessian: ``[k, k]`` float32 or float64, symmetric positive semi-definite, of any positive
            scale: the second moment of the inputs (:class:`InputSecondMoment`).
        bits, group_size, symmetric, search, scale_dtype: the grid, as in :func:`rtn`.
        act_order: do the columns with the largest ``H_jj`` first, when most columns are still free.
        static_groups: take the grids from ``weight`` itself. Otherwise a group takes its grid when
            its first column is reached, from the corrected weights; groups must then be done in
            order, so ``act_order`` needs static groups unless a group is the whole row.
        damping: share of the mean of the diagonal that is added to it; ten times more as often as
            the factorisation fails.

    Returns:
        The codes, scales and zeros; arguments are unchanged. While it works it holds two float32
        copies of the weight and three float64 copies of the Hessian.

    Raises:
        ValueError: an unsupported format, a weight or Hessian that is not finite or of the wrong
            shape, a Hessian that is not symmetric positive semi-definite.

    Example:
        >>> q = gptq(torch.tensor([[-1.0, 0.0, 2.0]]), torch.eye(3), bits=2, group_size=None)
        >>> q.codes.tolist()
        [[0, 1, 3]]
    """
    check_weight("gptq", weight)
    n, k = weight.shape
    size = resolve_group_size("gptq", bits, group_size, k)
    check_hessian("gptq", hessian, k)
    if act_order and not static_groups and size < k:
        raise ValueError(
            f"gptq: act_order needs static_groups=True for group_size = {size} below k = {k}, "
            "because a stored group is a run of neighbouring columns"
        )
    dead = hessian.diagonal() == 0
    order = torch.arange(k)
    if act_order:
        # Stable, so that equal diagonals keep their order and H = I stays plain rounding.
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor("gptq", hessian, damping, order)
    grid = _ColumnGrids(
        weight.float().masked_fill(dead, 0),
        order=order,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        search=search,
        scale_dtype=scale_dtype,
        static=static_groups or size == k,
    )
    codes = torch.empty(k, n, dtype=torch.uint8)
    _round_run(grid, factor, codes, 0, k)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return QuantizedTensor(
        codes=in_place.t().contiguous(),
        scales=grid.scales.t().to(scale_dtype).contiguous(),
        zeros=None if symmetric else grid.zeros.t().to(torch.uint8).contiguous(),
        bits=bits,
        group_size=size,
    )


class _ColumnGrids:
    """The columns still to be rounded, in working order, and the grid of each.

    Transposed (``columns [k, n]``, ``scales`` and ``zeros`` ``[groups, n]``), because the loop
    works on whole columns of the weight and a row of a tensor is contiguous.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        order: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        search: bool,
        scale_dtype: torch.dtype,
        static: bool,
    ) -> None:
        self.bits = bits
        self.static = static
        self.group_size = group_size
        self.group_of_column = (order // group_size).tolist()
        self._find = partial(
            find_grid,
            "gptq",
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            search=search,
            scale_dtype=scale_dtype,
        )
        self.columns = weight.t()[order].contiguous()
        # Grids that are not static are overwritten when their group is reached.
        scales, zeros = self._find(weight)
        self.scales, self.zeros = scales.t().contiguous(), zeros.t().contiguous()

    def at(self, column: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros ``[n]`` of a column (in working order) that is about to be rounded."""
        group = self.group_of_column[column]
        if not self.static and column % self.group_size == 0:
            members = self.columns[column : column + self.group_size]
            scales, zeros = self._find(members.t())
            self.scales[group], self.zeros[group] = scales[:, 0], zeros[:, 0]
        return self.scales[group], self.zeros[group]


def _round_run(grid: _ColumnGrids, factor: Tensor, codes: Tensor, begin: int, end: int) -> None:
    """Round the columns ``begin .. end``, which earlier columns have been corrected for already.

    Leaves their codes in ``codes`` and their errors ``e_j`` in their place in ``grid.columns``.
    """
    columns = grid.columns
    if end - begin == 1:
        column = columns[begin]
        scales, zeros = grid.at(begin)
        rounded = round_to_grid(column, scales, zeros, grid.bits)
        codes[begin] = rounded
        column.sub_(rounded.sub_(zeros).mul_(scales)).div_(factor[begin, begin])
        return
    half = (end - begin) // 2
    # A group that takes its grid late takes it from columns with every correction applied, so no
    # run may begin inside a group unless it ends there too.
    if half > grid.group_size:
        half -= half % grid.group_size
    elif end - begin > grid.group_size:
        half = grid.group_size
    middle = begin + half
    _round_run(grid, factor, codes, begin, middle)
    columns[middle:end].addmm_(
        factor[begin:middle, middle:end].t(), columns[begin:middle], alpha=-1
    )
    _round_run(grid, factor, codes, middle, end)
