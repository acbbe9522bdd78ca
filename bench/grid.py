"""A plain min/max grid for competitors that take codes rather than floats.

    w ~ scale * (code - zero)
    asymmetric: scale = (max - min) / (2**bits - 1),   zero = round(-min / scale)
    symmetric:  scale = max|w| / 2**(bits - 1),        zero = 2**(bits - 1)

The benchmark keeps its own, so that an error in the library cannot hide in a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.problem import uniform_weight

# A group of zeros has no scale; any positive one represents it exactly.
TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Grid:
    """``codes`` [n, k] uint8, ``scales`` [n, groups] float32, ``zeros`` [n, groups] uint8."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]


def quantize(
    weight: NDArray[np.float32], *, bits: int, group_size: int, symmetric: bool = False
) -> Grid:
    """Round ``weight`` [n, k] to its groups' grids; ``group_size`` must divide k."""
    n, k = weight.shape
    if k % group_size:
        raise ValueError(f"quantize: group_size must divide k = {k}, got {group_size}")
    levels = 2**bits - 1
    grouped = weight.reshape(n, k // group_size, group_size)
    if symmetric:
        scales = np.abs(grouped).max(axis=-1) / 2 ** (bits - 1)
        zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    else:
        low = np.minimum(grouped.min(axis=-1), 0)
        scales = (np.maximum(grouped.max(axis=-1), 0) - low) / levels
        zeros = np.clip(np.rint(-low / np.maximum(scales, TINY)), 0, levels).astype(np.uint8)
    scales = np.maximum(scales, TINY).astype(np.float32)
    codes = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, levels)
    return Grid(codes.astype(np.uint8).reshape(n, k), scales, zeros)


@lru_cache(maxsize=2)
def uniform_grid(n: int, k: int, bits: int, group_size: int, symmetric: bool = False) -> Grid:
    """:func:`quantize` of :func:`bench.problem.uniform_weight`, cached."""
    weight = uniform_weight(n, k)
    return quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)
