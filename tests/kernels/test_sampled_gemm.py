"""Every sampled_gemm kernel: the gradient of a dense weight, restricted to the support."""

from __future__ import annotations

import numpy as np
import pytest

import openwork
from openwork import _kernels
from openwork.packing import SPARSE_LAYOUTS

from .tables import Entry

FAMILY = "sampled_gemm"

ROWS = (1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 129, 300)


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_equals_the_dense_gradient_on_the_support(
    entry: Entry, rng: np.random.Generator, layout: str
) -> None:
    number = openwork.layouts().index(layout)
    for m in ROWS:
        for n, k, density in ((1, 1, 1.0), (17, 65, 0.5), (33, 130, 0.1), (18, 270, 0.2)):
            g = rng.standard_normal((m, n)).astype(np.float32)
            x = rng.standard_normal((m, k)).astype(np.float32)
            keep = (rng.random((n, k)) < density).astype(np.uint8)
            grad = _kernels.sampled_gemm(entry.name, g, x, keep, number)
            want = (g.astype(np.float64).T @ x.astype(np.float64)) * keep
            size = np.abs(g.astype(np.float64)).T @ np.abs(x.astype(np.float64))
            assert (np.abs(grad - want) <= (m + 4) * 2.0**-24 * size).all(), (m, n, k)
            assert (grad[keep == 0] == 0).all()
