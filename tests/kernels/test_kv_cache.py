"""Pages of keys and values: grids, bounds and scores by the formulas of kernels/kv_cache."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "kv_cache"
FORMATS = [
    (bits, axis, size) for bits in (8, 4, 3, 2) for axis, size in (("channel", 32), ("token", 64))
]
QUERIES = np.ones((2, 40), np.float32)
TOKENS = 128


def _groups(x: np.ndarray, axis: str, size: int) -> np.ndarray:
    """For each number the numbers of its group: [tokens, d, size], the last group of channels
    filled up with its first."""
    tokens, d = np.indices(x.shape)
    if axis == "channel":
        first = tokens // size * size
        return np.stack([x[first + i, d] for i in range(size)], -1)
    first = d // size * size
    inside = [np.where(first + i < x.shape[1], first + i, first) for i in range(size)]
    return np.stack([x[tokens, column] for column in inside], -1)


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize("keys", [True, False])
def test_dense_pages_hold_what_is_written(entry: Entry, rng, dtype: str, keys: bool) -> None:
    x = floats.store(rng.standard_normal((TOKENS, 40)), dtype)
    y, moved, *_ = _kernels.kv_cache(entry.name, x, (16, "token", 0), keys, QUERIES)
    assert (y == floats.load(x)).all()
    assert (moved[:64] == y[64:]).all()


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize(("bits", "axis", "size"), FORMATS)
@pytest.mark.parametrize("keys", [True, False])
def test_codes_are_the_nearest_of_the_grid(
    entry: Entry, rng, dtype: str, bits: int, axis: str, size: int, keys: bool
) -> None:
    stored = floats.store(rng.standard_normal((TOKENS, 96)), dtype)
    y, moved, *_ = _kernels.kv_cache(entry.name, stored, (bits, axis, size), keys, QUERIES[:, :1])
    x = floats.load(stored)
    groups = _groups(x, axis, size)
    low, span = groups.min(-1), np.ptp(groups, -1)
    # The difference is rounded, the quotient too, and the scale up to the type: the next number.
    slack = 2.0**-22 + 2 * floats.ROUNDOFF[dtype]
    scale = span / (2**bits - 1)
    # fma(code, scale, min) rounds once more, to fp32.
    rounding = 2.0**-24 * (abs(low) + span) * 2
    assert (abs(y - x) <= scale * (1 + slack) / 2 + rounding).all()
    codes = (y - low) / scale
    assert (abs(codes - np.rint(codes)) <= 2**bits * slack + rounding / scale).all()
    assert (moved[:64] == y[64:]).all()


def test_equal_numbers_are_exact(entry: Entry) -> None:
    x = np.full((TOKENS, 40), 0.1, np.float32)
    y, *_ = _kernels.kv_cache(entry.name, x, (2, "channel", 64), True, QUERIES)
    assert (y == x).all()


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize("bits", [16, 4])
def test_bounds_and_scores_of_pages(entry: Entry, rng, dtype: str, bits: int) -> None:
    d, queries = 40, 3
    x = floats.store(rng.standard_normal((TOKENS, d)), dtype)
    q = rng.standard_normal((queries, d)).astype(np.float32)
    halves = np.concatenate([q.clip(min=0), q.clip(max=0)])
    y, _, low, high, flat, chunks = _kernels.kv_cache(
        entry.name, x, (bits, "channel", 32), True, halves
    )
    parts = y.astype(np.float64).reshape(-1, 16, d)
    # Bounds are of the type: outward to the next number of it.
    step = 2 * floats.ROUNDOFF[dtype] * abs(parts).max(1) + floats.UNDERFLOW[dtype] * 2
    assert (low <= parts.min(1)).all() and (parts.min(1) - low <= step).all()
    assert (high >= parts.max(1)).all() and (high - parts.max(1) <= step).all()

    def scores(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        return np.maximum(q[:, None] * low, q[:, None] * high).sum(-1, dtype=np.float64)

    low, high = low.astype(np.float64), high.astype(np.float64)
    each = scores(low, high).reshape(queries, 2, -1)
    whole = scores(low.reshape(2, -1, d).min(1), high.reshape(2, -1, d).max(1))
    # Two products of d, and sums over queries.
    size = abs(q).sum(1).max() * abs(parts).max() * 1.01
    assert (abs(flat - whole.sum(0)) <= queries * (2 * d + queries) * 2.0**-24 * size).all()
    assert (abs(chunks - each.max((0, 2))) <= 2 * d * 2.0**-24 * size).all()
