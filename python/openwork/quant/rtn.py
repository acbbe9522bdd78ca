"""Round to nearest: the grid of a group from its range, with no data.

For one row of one group with smallest and largest weights ``lo <= 0 <= hi`` (the range always
contains 0, so that zero stays exactly zero)::

    asymmetric   s = (hi - lo) / (2**bits - 1)           z = round(-lo / s)
    symmetric    s = 2 * max(-lo, hi) / (2**bits - 1)    z = 2**(bits - 1)

``s`` is rounded to the stored dtype first; ``z`` and the codes then come from the rounded value, so
what is stored is what was optimised. A group of zeros takes the range (-1, +1).

The optional range search shrinks ``lo`` and ``hi`` together by factors 1.00, 0.99, ..., 0.21 and
keeps the one with the least ``sum |w - Q(w)|**2.4`` (range and exponent as in the reference code of
GPTQ, Frantar et al. 2022, arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.quant.grid import (
    SCALE_DTYPES,
    QuantizedTensor,
    check_weight,
    expand_groups,
    group_count,
    resolve_group_size,
    round_to_grid,
    row_chunks,
    split_groups,
    symmetric_zero,
)

_SEARCH_STEPS = 80
_SEARCH_POWER = 2.4


@torch.no_grad()
def rtn(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = False,
    search: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Quantize a weight by rounding to nearest: ``Q(w) = s * (clamp(round(w / s) + z) - z)``.

    Args:
        weight: ``[n, k]`` floating point, finite.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: 16, 32, 64, 128, or None for the whole row.
        symmetric: fix the zero point to ``2**(bits - 1)`` instead of fitting it to the range.
        search: shrink each range to the least ``|error|**2.4`` (80 times the work).
        scale_dtype: float16, bfloat16 or float32.

    Returns:
        The codes, scales and zeros; ``weight`` is unchanged. Without ``search``,
        ``|w - Q(w)| <= s / 2`` wherever ``w`` is within ``s / 2`` of the grid's range, which the
        rounding of ``s`` to ``scale_dtype`` may leave short of ``hi`` by ``2**bits - 1`` half ulps.

    Raises:
        ValueError: an unsupported format, a weight that is not a finite matrix, or one whose scales
            overflow ``scale_dtype``.

    Example:
        >>> q = rtn(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2, group_size=None)
        >>> q.codes.tolist(), q.scales.tolist(), q.zeros.tolist()
        ([[0, 1, 3]], [[1.0]], [[1]])
    """
    check_weight("rtn", weight)
    n, k = weight.shape
    size = resolve_group_size("rtn", bits, group_size, k)
    scales, zeros = find_grid(
        "rtn",
        weight,
        bits=bits,
        group_size=size,
        symmetric=symmetric,
        search=search,
        scale_dtype=scale_dtype,
    )
    codes = torch.empty(n, k, dtype=torch.uint8)
    for rows in row_chunks(n, k):
        codes[rows] = round_to_grid(
            weight[rows].float(),
            expand_groups(scales[rows], k, size),
            expand_groups(zeros[rows], k, size),
            bits,
        )
    return QuantizedTensor(
        codes=codes,
        scales=scales.to(scale_dtype),
        zeros=None if symmetric else zeros.to(torch.uint8),
        bits=bits,
        group_size=size,
    )


def find_grid(
    where: str,
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros of every group of ``weight [n, k]``, in any floating-point dtype.

    Returns:
        ``(scales, zeros)``, both ``[n, groups]`` float32; the scales are exactly representable in
        ``scale_dtype`` and the zeros whole numbers in ``0 .. 2**bits - 1``.

    Raises:
        ValueError: ``scale_dtype`` is no scale dtype, or cannot hold a scale.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{where}: scale_dtype must be float16, bfloat16 or float32, got {scale_dtype}"
        )
    n, k = weight.shape
    scales = torch.empty(n, group_count(k, group_size))
    zeros = torch.empty_like(scales)
    for rows in row_chunks(n, k):
        groups = split_groups(weight[rows].float(), group_size)
        low = groups.amin(dim=2).clamp_(max=0)
        high = groups.amax(dim=2).clamp_(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = high == low
        low[empty] = -1
        high[empty] = 1
        scales[rows], zeros[rows] = _grid_of_range(low, high, bits, symmetric, scale_dtype)
        if not bool(torch.isfinite(scales[rows]).all()):
            raise ValueError(
                f"{where}: weight has a group of range {float((high - low).max()):.3g}, whose "
                f"scale overflows {scale_dtype}; use bfloat16 or float32 scales"
            )
        if search:
            scales[rows], zeros[rows] = _search_range(
                groups, low, high, bits, symmetric, scale_dtype
            )
    return scales, zeros


def _grid_of_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for ranges ``low <= 0 <= high``; float32, shape of ``low``."""
    scales = ((high - low) / (2**bits - 1)).to(scale_dtype)
    # A tiny range must not round to scale 0. Float16 goes down to its smallest subnormal, which
    # hardware converts at full speed; float32 ones would be lost where denormals are flushed.
    floor = 2.0**-24 if scale_dtype == torch.float16 else torch.finfo(scale_dtype).tiny
    scales = scales.float().clamp_(min=floor)
    if symmetric:
        return scales, torch.full_like(scales, symmetric_zero(bits))
    return scales, torch.div(-low, scales).round_().clamp_(0, 2**bits - 1)


def _search_range(
    groups: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Grid of least ``sum |w - Q(w)|**2.4`` over shrunken ranges, for ``groups [n, g, size]``."""
    best = torch.full_like(low, torch.inf)
    best_scales = torch.empty_like(low)
    best_zeros = torch.empty_like(low)
    for step in range(_SEARCH_STEPS):
        share = 1 - step / 100
        scales, zeros = _grid_of_range(low * share, high * share, bits, symmetric, scale_dtype)
        codes = round_to_grid(groups, scales[..., None], zeros[..., None], bits)
        rounded = codes.sub_(zeros[..., None]).mul_(scales[..., None])
        error = rounded.sub_(groups).abs_().pow_(_SEARCH_POWER).sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros
