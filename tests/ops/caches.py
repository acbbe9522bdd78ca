"""Strategies that draw caches: formats, sizes and lists of tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from openwork import KVFormat
from openwork.testing.kv_cache import NUQ3, History
from openwork.testing.kv_policy import kept_tokens
from openwork.testing.kv_reference import ReferenceCache

Draw = st.DrawFn

BITS = st.sampled_from([8, 4, 3, 2])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def _formats(draw: Draw, dtype: torch.dtype, page_size: int, d: int) -> KVFormat:
    if draw(st.integers(0, 4)) == 0:
        return KVFormat(8 * dtype.itemsize)
    bits, window = draw(BITS), draw(st.sampled_from([0, 1, 17, 64]))
    options = {
        "outliers": draw(st.integers(0, min(d, 3))),
        "codebook": NUQ3 if bits == 3 and draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        size = draw(st.sampled_from([g for g in (32, 64, 128) if g <= page_size]))
        step = size * draw(st.integers(1, 2))
        return KVFormat(bits, "channel", size, window=window, step=step, **options)
    size = draw(st.sampled_from([32, 64, 128, d]))
    step = draw(st.integers(1, 9))
    return KVFormat(bits, "token", size, window=window, step=step, **options)


@st.composite
def caches(draw: Draw) -> History:
    dtype = draw(DTYPES)
    d, value_d = draw(st.sampled_from([1, 16, 33])), draw(st.sampled_from([2, 20, 48]))
    page_size = draw(st.sampled_from([32, 64, 128]))
    return History(
        draw(_formats(dtype, page_size, d)),
        draw(_formats(dtype, page_size, value_d)),
        b=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        d=d,
        value_d=value_d,
        max_tokens=384,
        dtype=dtype,
        page_size=page_size,
        drafts=40,
    )


def random_lists(cache: ReferenceCache, rng: np.random.Generator, share: float) -> Tensor:
    return kept_tokens(
        [[np.flatnonzero(rng.random(row.length) < share).tolist() for row in heads]
         for heads in cache.rows]
    )  # fmt: skip
