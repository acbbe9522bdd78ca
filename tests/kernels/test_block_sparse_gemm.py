"""Every block_sparse_gemm kernel against the formula, at the edges of blocks and tiles of rows."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "block_sparse_gemm"

# Around the kernels' pieces of 1, 2, 4, 6, 8 and 14 rows, and more than one tile.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 28, 29, 60)


def _check(
    entry: Entry, rng: np.random.Generator, m: int, n: int, k: int, block: int, dtype: str
) -> None:
    """With bias and add; within (terms + 4) roundings of the sum of magnitudes."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    scales = None
    if dtype == "int8":
        weight = rng.integers(-128, 128, (n, k)).astype(np.int8)
        scales = rng.random(n).astype(np.float32) + np.float32(0.5)
    else:
        weight = floats.store(rng.standard_normal((n, k)), dtype)
    mask = rng.random((-(-n // block), -(-k // block))) < 0.5
    indptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    indices = np.nonzero(mask)[1].astype(np.int32)
    bias = rng.random(n).astype(np.float32)
    add = rng.standard_normal((m, n)).astype(np.float32)
    y = floats.poisoned((m, n), "float32")
    _kernels.block_sparse_gemm(entry.name, x, weight, block, indptr, indices, scales, bias, add, y)
    w = floats.load(weight) if scales is None else weight * scales.astype(np.float64)[:, None]
    w = w * np.kron(mask, np.ones((block, block)))[:n, :k]
    want = x.astype(np.float64) @ w.T + bias + add
    size = np.abs(x.astype(np.float64)) @ np.abs(w).T + np.abs(bias) + np.abs(add)
    assert (np.abs(y - want) <= (k + 4) * 2.0**-24 * size).all(), (m, n, k, block, dtype)


@pytest.mark.parametrize("block", [16, 32, 64])
def test_rows(entry: Entry, rng: np.random.Generator, block: int) -> None:
    for m in ROWS:
        _check(entry, rng, m, 70, 130, block, "float32")


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sizes(entry: Entry, rng: np.random.Generator, block: int, dtype: str) -> None:
    for n in (1, block - 1, block, block + 1, 2 * block + 9):
        for k in (1, block, block + 1, 5 * block):
            for m in (1, 7, 15):
                _check(entry, rng, m, n, k, block, dtype)
