"""Means of blocks and the tree search's scores by their formulas, every tier and type."""

from __future__ import annotations

import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "block_scores"


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize(("n", "block"), [(1, 1), (70, 16), (64, 64), (130, 33)])
@pytest.mark.parametrize("d", [1, 17, 64])
def test_means(entry: Entry, rng, dtype: str, n: int, block: int, d: int) -> None:
    x = floats.store(rng.standard_normal((n, d)), dtype)
    means = _kernels.block_means(entry.name, x, block)
    for c, mean in enumerate(means):
        part = floats.load(x)[c * block : (c + 1) * block]
        bound = (len(part) + 2) * 2.0**-24 * abs(part).mean(0)
        assert (abs(mean - part.mean(0)) <= bound).all()


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize(("query_stride", "key_stride"), [(1, 1), (2, 3), (5, 16)])
@pytest.mark.parametrize("d", [1, 17, 64])
@pytest.mark.parametrize("smallest", [False, True])
def test_scores(
    entry: Entry, rng, dtype: str, query_stride: int, key_stride: int, d: int, smallest: bool
) -> None:
    block = 16
    q, k = (floats.store(rng.standard_normal((n, d)), dtype) for n in (37, 5 * block))
    scores = _kernels.block_scores(entry.name, q, k, block, query_stride, key_stride, smallest)
    queries, keys = floats.load(q)[::query_stride], floats.load(k).reshape(5, block, d)
    products = queries @ keys[:, ::key_stride].transpose(0, 2, 1)
    want = (-products if smallest else products).max((1, 2))
    size = (abs(queries) @ abs(keys[:, ::key_stride]).transpose(0, 2, 1)).max((1, 2))
    assert (abs(scores - want) <= (d + 1) * 2.0**-24 * size).all()
