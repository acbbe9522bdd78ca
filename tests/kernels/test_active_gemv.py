"""Every active_gemv kernel: the masked dense product, in the order of one column at a time."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "active_gemv"

SIZES = ((1, 1), (15, 7), (16, 64), (129, 33), (161, 20), (257, 130), (2200, 40))


def _padded(n: int, strip: int) -> int:
    return -(-n // strip) * strip


def _codes(rng: np.random.Generator, n: int, k: int, bits: int, group: int) -> dict[str, object]:
    groups = -(-k // group)
    shape = (groups, _padded(n, 16 * (32 // bits)))
    return {
        "columns": rng.integers(0, 2**bits, (n, k)).astype(np.uint8),
        "scales": rng.random(shape).astype(np.float32),
        "zeros": rng.integers(0, 2**bits, shape).astype(np.uint8),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 9.0])
def test_floats(entry: Entry, rng: np.random.Generator, dtype: str, threshold: float) -> None:
    for n, k in SIZES:
        x = rng.standard_normal(k).astype(np.float32)
        columns = floats.store(rng.standard_normal((k, _padded(n, 16))), dtype)
        y = floats.poisoned((n,), "float32")
        _kernels.active_gemv(entry.name, x, threshold, columns, 0, k, None, None, y)
        active = np.where(np.abs(x) > threshold, x, 0.0).astype(np.float64)
        w = floats.load(columns)[:, :n]
        bound = (k + 4) * 2.0**-24 * (np.abs(active) @ np.abs(w))
        assert (np.abs(y - active @ w) <= bound).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64])
def test_codes(entry: Entry, rng: np.random.Generator, bits: int, group_size: int) -> None:
    for n, k in SIZES:
        x = rng.standard_normal(k).astype(np.float32)
        p = _codes(rng, n, k, bits, group_size)
        y = floats.poisoned((n,), "float32")
        _kernels.active_gemv(
            entry.name, x, 0.5, p["columns"], bits, group_size, p["scales"], p["zeros"], y
        )
        active = np.where(np.abs(x) > 0.5, x, 0.0).astype(np.float64)
        group = np.arange(k) // group_size
        scales = p["scales"].astype(np.float64)[group, :n]
        centered = p["columns"].T.astype(np.float64) - p["zeros"].astype(np.float64)[group, :n]
        bound = (2 * k + 4) * 2.0**-24 * (np.abs(active) @ (scales * 2.0 ** (bits + 1)))
        assert (np.abs(y - active @ (scales * centered)) <= bound).all()


def test_skipping_keeps_the_order_of_the_dense_product(
    entry: Entry, rng: np.random.Generator
) -> None:
    """At any threshold, the very bits of a threshold of 0 with the other elements set to 0."""
    for n, k in SIZES:
        x = rng.standard_normal(k).astype(np.float32)
        columns = rng.standard_normal((k, _padded(n, 16))).astype(np.float32)
        codes = _codes(rng, n, k, 4, 16)
        for threshold in (0.3, 1.0):
            masked = np.where(np.abs(x) > threshold, x, np.float32(0))
            skipped, dense = floats.poisoned((2, 2, n), "float32")
            for y, args in ((skipped, (x, threshold)), (dense, (masked, 0.0))):
                _kernels.active_gemv(entry.name, *args, columns, 0, k, None, None, y[0])
                _kernels.active_gemv(
                    entry.name, *args, codes["columns"], 4, 16, codes["scales"], codes["zeros"],
                    y[1],
                )  # fmt: skip
            assert np.array_equal(floats.bits_of(skipped), floats.bits_of(dense))


def test_zeros_of_x_change_nothing(entry: Entry, rng: np.random.Generator) -> None:
    """A threshold of 0 skips zeros: the product with them in is the same, in the same order."""
    x = rng.standard_normal(100).astype(np.float32)
    x[::3] = 0.0
    columns = rng.standard_normal((100, 64)).astype(np.float32)
    y, fewer = floats.poisoned((2, 64), "float32")
    _kernels.active_gemv(entry.name, x, 0.0, columns, 0, 100, None, None, y)
    kept = x != 0
    _kernels.active_gemv(
        entry.name, x[kept], 0.0, columns[kept], 0, int(kept.sum()), None, None, fewer
    )
    assert np.array_equal(y, fewer)
