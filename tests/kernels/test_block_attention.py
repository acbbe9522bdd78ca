"""Block attention kernels: edges of tiles and units, lists, and what each query may see."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "block_attention"
TYPES = ("float32", "bfloat16", "float16")
SIZES = ((1, 1), (15, 16), (16, 17), (64, 31), (65, 33), (63, 129), (3, 300))


def _expected(q, k, v, scale, sees):
    """o, log2 of the sum of exponentials, and column sums, in float64."""
    scores = np.where(sees, scale * (q @ k.T), -np.inf)
    lse = np.logaddexp.reduce(scores, axis=1)
    weights = np.exp(scores - np.where(np.isinf(lse), 0, lse)[:, None])
    return weights @ v, lse / np.log(2), weights.sum(0)


def _check(entry: Entry, rng, queries, keys, d, dv, *, causal=True, blocks=None, columns=()):
    dtype = TYPES[entry.key]
    q, k, v = (
        floats.store(rng.standard_normal(shape), dtype)
        for shape in ((queries, d), (keys, d), (keys, dv))
    )
    o = floats.poisoned((queries, dv), dtype)
    sees = np.ones((queries, keys), dtype=bool)
    if causal:
        sees = np.arange(keys) <= (keys - queries + np.arange(queries))[:, None]
    if blocks is not None:
        listed = np.isin(np.arange(keys) // 16, blocks) | np.isin(np.arange(keys), columns)
        sees = sees & listed
    scale = d**-0.5
    lists = None if blocks is None else np.array(blocks, np.int32)
    m, total, scores = _kernels.block_attention(
        entry.name, q, k, v, scale, causal, 16, lists, np.array(columns, np.int32), o
    )
    q, k, v = (floats.load(x).astype(np.float64) for x in (q, k, v))
    want, lse, sums = _expected(q, k, v, scale, sees)
    size = scale * np.linalg.norm(q, axis=1).max() * np.linalg.norm(k, axis=1).max()
    weight = 2.0**-24 * ((d + 8) * size + keys + 13) + (8e-5 if dtype == "bfloat16" else 0)
    rounding = floats.ROUNDOFF[dtype] if dtype == "bfloat16" else 0.0
    reach = _expected(q, k, abs(v), scale, sees)[0]
    inner = (2 * weight + rounding) * reach
    assert (
        abs(floats.load(o) - want) <= inner + floats.ROUNDOFF[dtype] * (abs(want) + inner) + 1e-7
    ).all()
    empty = ~sees.any(1)
    assert (total[empty] == 0).all()
    got = m[~empty] + np.log2(total[~empty].astype(np.float64))
    assert (abs(got - lse[~empty]) <= 2 * weight + 2.0**-21 * (abs(lse[~empty]) + size)).all()
    assert (abs(scores - sums) <= (2 * weight + rounding + 2.0**-24 * queries) * sums + 1e-37).all()


@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_equals_the_formula(entry: Entry, rng, queries: int, keys: int) -> None:
    _check(entry, rng, queries, keys, 64, 16)
    _check(entry, rng, queries, keys, 17, 33, causal=False)


def test_lists(entry: Entry, rng) -> None:
    _check(entry, rng, 70, 200, 32, 32, blocks=[0, 3, 4, 12], columns=[16, 30, 111, 191])
    _check(entry, rng, 20, 200, 32, 32, blocks=[], columns=list(range(1, 200, 3)))
    _check(entry, rng, 20, 200, 32, 32, blocks=[])


def test_more_tiles_of_keys_than_one(entry: Entry, rng) -> None:
    _check(entry, rng, 5, 1100, 16, 16)
