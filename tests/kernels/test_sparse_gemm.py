"""Every sparse_gemm kernel against the formula, at the edges of panels, blocks and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "sparse_gemm"

# Around the pieces of the expanding kernel, and the widths of panels of tokens.
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
# Around a panel, the eight panels that are summed together, and a block.
OUTPUTS = (1, 15, 16, 17, 33, 129, 145)
DEPTHS = (1, 15, 16, 17, 63, 64, 65, 129, 255, 256, 257, 600)
DTYPES = ("float32", "bfloat16", "int8")


def _weight(rng: np.random.Generator, n: int, k: int, dtype: str) -> np.ndarray:
    if dtype == "int8":
        return rng.integers(-128, 128, (n, k)).astype(np.int8)
    return floats.store(rng.standard_normal((n, k)), dtype)


def _check(
    entry: Entry, rng: np.random.Generator, m: int, n: int, k: int, dtype: str, density: float
) -> None:
    """With bias, add and scales; within (terms + 4) roundings of the sum of magnitudes."""
    if m > entry.max_m:
        return
    x = rng.standard_normal((m, k)).astype(np.float32)
    weight = _weight(rng, n, k, dtype)
    keep = (rng.random((n, k)) < density).astype(np.uint8)
    scales, bias = rng.random((2, n)).astype(np.float32)
    add = rng.standard_normal((m, n)).astype(np.float32)
    y = floats.poisoned((m, n), "float32")
    _kernels.sparse_gemm(entry.name, x, weight, keep, scales, bias, add, y)
    w = floats.load(weight) * keep * scales.astype(np.float64)[:, None]
    want = x.astype(np.float64) @ w.T + bias + add
    size = np.abs(x.astype(np.float64)) @ np.abs(w).T + np.abs(bias) + np.abs(add)
    error = np.abs(y - want)
    assert (error <= (k + 4) * 2.0**-24 * size + 2.0**-140).all(), (m, n, k, dtype, density)


def test_rows(entry: Entry, rng: np.random.Generator) -> None:
    for m in ROWS:
        _check(entry, rng, m, 33, 130, "float32", 0.4)


def test_outputs_and_depths(entry: Entry, rng: np.random.Generator) -> None:
    for n in OUTPUTS:
        for k in DEPTHS:
            for m in (1, 7, 20):
                _check(entry, rng, m, n, k, "bfloat16", 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_types_and_densities(
    entry: Entry, rng: np.random.Generator, dtype: str, density: float
) -> None:
    for m in (1, 6, 16, 40):
        _check(entry, rng, m, 40, 300, dtype, density)


@pytest.mark.parametrize("spike", [0, 15, 16, 63, 64, 299])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column_is_picked_out(
    entry: Entry, rng: np.random.Generator, dtype: str, spike: int
) -> None:
    """With a single nonzero x, y is that column of the weight: every value is where it belongs."""
    weight = _weight(rng, 50, 300, dtype)
    keep = (rng.random(weight.shape) < 0.5).astype(np.uint8)
    for m in (1, 3, 16, 50):
        if m > entry.max_m:
            continue
        x = np.zeros((m, 300), np.float32)
        x[:, spike] = 1.0
        y = floats.poisoned((m, 50), "float32")
        _kernels.sparse_gemm(entry.name, x, weight, keep, None, None, None, y)
        column = (floats.load(weight) * keep)[:, spike]
        assert np.array_equal(y, np.tile(column.astype(np.float32), (m, 1)))


def test_small_integers_are_exact(entry: Entry, rng: np.random.Generator) -> None:
    for m in (1, 5, 16, 17, 130):
        if m > entry.max_m:
            continue
        x = rng.integers(-20, 21, (m, 600)).astype(np.float32)
        weight = rng.integers(-128, 128, (40, 600)).astype(np.int8)
        keep = (rng.random(weight.shape) < 0.3).astype(np.uint8)
        y = floats.poisoned((m, 40), "float32")
        _kernels.sparse_gemm(entry.name, x, weight, keep, None, None, None, y)
        # At most 600 * 128 * 20: below 2**24.
        assert np.array_equal(y, x.astype(np.float64) @ (weight.astype(np.float64) * keep).T)


def test_what_is_not_stored_takes_no_part(entry: Entry, rng: np.random.Generator) -> None:
    """An infinity or a NaN of x reaches only rows that store its column."""
    weight = np.ones((40, 100), np.float32)
    keep = (rng.random(weight.shape) < 0.5).astype(np.uint8)
    keep[::2, 7] = 0
    keep[1::2, 7] = 1
    for m in (1, 20):
        if m > entry.max_m:
            continue
        x = np.ones((m, 100), np.float32)
        x[0, 7] = np.nan
        y = floats.poisoned((m, 40), "float32")
        _kernels.sparse_gemm(entry.name, x, weight, keep, None, None, None, y)
        assert np.array_equal(np.isnan(y[0]), np.arange(40) % 2 == 1)
        assert np.isfinite(y[1:]).all()
