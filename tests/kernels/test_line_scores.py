"""Line scores by their formula, every tier and type."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "line_scores"
TYPES = ("float32", "bfloat16", "float16")
SIZES = ((1, 1, 4), (5, 9, 4), (70, 70, 64), (66, 300, 65), (300, 130, 1000))


@pytest.mark.parametrize(("queries", "keys", "probes"), SIZES)
@pytest.mark.parametrize("d", [8, 33, 64])
def test_equals_the_formula(entry: Entry, rng, queries: int, keys: int, probes: int, d: int):
    dtype = TYPES[entry.key]
    q, k = (floats.store(rng.standard_normal((n, d)), dtype) for n in (queries, keys))
    scale = d**-0.5
    columns, diagonals = _kernels.line_scores(entry.name, q, k, probes, scale)
    w = min(probes, queries, keys)
    q, k = floats.load(q)[queries - w :], floats.load(k)
    p = keys - w + np.arange(w)[:, None]
    sees = np.arange(keys) <= p
    scores = np.where(sees, scale * q @ k.T, -np.inf)
    weights = np.exp(scores - np.logaddexp.reduce(scores, axis=1)[:, None])
    lines = np.zeros(keys)
    np.add.at(lines, (p - np.arange(keys))[sees], weights[sees])
    # Scores: sums of d products; the exponential, its sum over keys, and a sum over queries.
    size = scale * (abs(q) @ abs(k.T)).max()
    error = 2.0**-24 * (2 * (d + 8) * size + keys + w + 16)
    assert (abs(columns - weights.sum(0)) <= error * weights.sum(0) + 1e-37).all()
    assert (abs(diagonals - lines) <= error * lines + 1e-37).all()
