"""Lists of blocks and columns from marks, and the largest scores, key by key."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

BLOCK_M, BLOCK_N = 32, 16


def _expected(queries, keys, blocks, columns, slashes, window, sinks, causal):
    """(blocks, columns) of each row, from the definition."""
    rows = []
    for r in range(-(-queries // BLOCK_M)):
        first = keys - queries + r * BLOCK_M
        p = np.arange(first, min(first + BLOCK_M, keys))[:, None]
        listed, single = [], []
        for c in range(-(-keys // BLOCK_N)):
            j = np.arange(c * BLOCK_N, min((c + 1) * BLOCK_N, keys))
            if causal and j[0] > p[-1]:
                continue
            distance = p - j
            seen = distance >= 0
            marked = blocks[r, c] or j[0] < sinks or columns[j].all()
            marked |= (seen & (distance < window)).any()
            marked |= slashes[distance[seen]].any()
            if marked:
                listed.append(c)
            else:
                single += [int(key) for key in j if columns[key] and (not causal or key <= p[-1])]
        rows.append((listed, single))
    return rows


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (32, 32), (70, 90), (33, 200), (90, 70)])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.3])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (1, 1), (40, 17)])
@pytest.mark.parametrize("causal", [True, False])
def test_lists_what_is_marked(rng, queries, keys, density, window, sinks, causal) -> None:
    shape = (-(-queries // BLOCK_M), -(-keys // BLOCK_N))
    blocks, columns, slashes = (rng.random(s) < density for s in (shape, keys, keys))
    if keys > 48 and density > 0:
        columns[16:32] = True
    marks = (blocks, columns, slashes)
    rows = _kernels.block_index(
        queries, keys, BLOCK_M, BLOCK_N, *(m.astype(np.uint8) for m in marks), window, sinks, causal
    )
    assert rows == _expected(queries, keys, *marks, window, sinks, causal)


def test_absent_marks_are_none() -> None:
    assert _kernels.block_index(40, 40, 32, 16, None, None, None, 1, 1) == [
        ([0, 1], []), ([0, 2], [])
    ]  # fmt: skip


@pytest.mark.parametrize("by_mass", [False, True])
@pytest.mark.parametrize("n", [1, 17, 300])
def test_largest(rng, by_mass: bool, n: int) -> None:
    # Sums of eighths are exact in any order, and ties are many.
    scores = (rng.integers(0, 24, (6, n)) / 8).astype(np.float32)
    total = scores.sum(1) if by_mass else np.full(6, n)
    budgets = np.floor(total * rng.random(6)).astype(np.float32)
    marks = _kernels.largest(scores, budgets, by_mass)
    for row, budget, got in zip(scores, budgets, marks, strict=True):
        best = np.argsort(-row, kind="stable")
        count = int(budget)
        if by_mass:
            count = np.searchsorted(np.cumsum(row[best]), budget) + 1 if budget > 0 else 0
        if (row.sum() if by_mass else n) <= budget:
            count = n
        assert sorted(np.flatnonzero(got)) == sorted(best[:count])
