"""Attention over pages against the formula on what the pages hold, every format and tier."""

from __future__ import annotations

import numpy as np
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "paged_attention"
DENSE = (16, "token", 0)
FORMATS = [
    (bits, axis, size) for bits in (8, 4, 3, 2) for axis, size in (("channel", 32), ("token", 64))
]
PAGE = 64
# What the digits that bf16 numbers become round by, where the largest is 1.
ROUNDING = {16: 0.0, 8: 0.5 / 32639, 4: 8.5 / 30464, 3: 0.5 / 32639, 2: 40 / 24320}


def _digit_error(x, axis: str, products: str, bits: int, dtype: str, largest: float) -> float:
    """Of sums of x times codes of numbers up to ``largest``, each up to half its group's range from
    the code in the middle. Those with codes in a byte share a digit, and are 0 only together."""
    if dtype != "bfloat16" or axis != products:
        return 0.0
    share = 8 // bits if bits in (4, 2) else 1
    in_bytes = np.pad(abs(x), ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, share, 4)
    count = share * (in_bytes.max(2) > 0).sum((1, 2)).max()
    return count * ROUNDING[bits] * abs(x).max() * 1.01 * largest


def _check(
    entry: Entry, rng, tokens, key_format, value_format, *, dtype="float32", d=64, dv=64,
    queries=2, group=3, selected=(), channels=slice(None),
) -> None:  # fmt: skip
    """``channels``: of q that are not 0."""
    q, keys, values = (
        rng.standard_normal(shape) for shape in ((queries, group, d), (tokens, d), (tokens, dv))
    )
    q[..., np.delete(np.arange(d), channels)] = 0
    q, keys, values = (floats.store(x, dtype) for x in (q, keys, values))
    scale = d**-0.5
    y, lse, k, v = _kernels.paged_attention(
        entry.name, q, keys, values, key_format, value_format, scale, list(selected)
    )
    q, k, v = floats.load(q), k.astype(np.float64), v.astype(np.float64)
    places = np.arange(tokens)
    sees = np.repeat(places <= (tokens - queries + np.arange(queries))[:, None], group, 0)
    if selected:
        # The newest tokens always count: of those in pages on both sides the last 32 that begin.
        waiting = [
            0 if bits == 16 else most if axis == "token" else tokens - (tokens - most) // 32 * 32
            for (bits, axis, _), most in ((key_format, 3), (value_format, 40))
        ]
        newest = min(tokens - queries + 1, tokens - max(waiting)) // 32 * 32
        sees &= np.isin(places // PAGE, selected) | (places >= newest)
    products = scale * q.reshape(-1, d) @ k.T
    scores = np.where(sees, products, -np.inf)
    want_lse = np.logaddexp.reduce(scores, axis=1)
    weights = np.exp(scores - want_lse[:, None])
    want, reach = weights @ v, weights @ abs(v)
    # Codes and minima are summed apart: a number of a group is the difference of two up to 3 times
    # as large as the largest. Sums of d and of `tokens` such pairs, and 8 steps beside them.
    size = scale * abs(q).sum(-1).max() * 3 * abs(k).max()
    score = 2.0**-24 * (2 * d + 8) * size
    score += scale * _digit_error(
        q.reshape(-1, d), key_format[1], "channel", key_format[0], dtype, abs(k).max()
    )
    error = 2 * score * reach + 2.0**-24 * (2 * tokens + 16) * 3 * abs(v).max()
    error += _digit_error(weights, value_format[1], "token", value_format[0], dtype, abs(v).max())
    y = y.reshape(want.shape)
    assert (abs(y - want) <= floats.rounding(want, error, dtype)).all()
    lse = lse.reshape(-1)
    assert (abs(lse - want_lse) <= score + 2.0**-21 * (1 + abs(want_lse)) + tokens * 2.0**-24).all()


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize("tokens", [2, 33, 129, 700])
def test_dense_pages(entry: Entry, rng, dtype: str, tokens: int) -> None:
    _check(entry, rng, tokens, DENSE, DENSE, dtype=dtype)
    _check(entry, rng, tokens, DENSE, DENSE, dtype=dtype, d=80, dv=33, queries=1, group=1)


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize("keys", FORMATS, ids=str)
@pytest.mark.parametrize("values", [DENSE, FORMATS[2], FORMATS[7]], ids=str)
def test_codes(entry: Entry, rng, dtype: str, keys, values) -> None:
    _check(entry, rng, 300, keys, values, dtype=dtype)


@pytest.mark.parametrize("values", FORMATS, ids=str)
def test_codes_of_values(entry: Entry, rng, values) -> None:
    _check(entry, rng, 300, DENSE, values, d=96, dv=128, queries=8, group=1)


@pytest.mark.parametrize("keys", [DENSE, *FORMATS[2:4]], ids=str)
def test_selected_pages(entry: Entry, rng, keys) -> None:
    _check(entry, rng, 500, keys, DENSE, selected=[0, 3, 4])
    _check(entry, rng, 500, keys, FORMATS[3], selected=[1])


@pytest.mark.parametrize("keys", FORMATS[::2], ids=str)
def test_few_channels_of_queries(entry: Entry, rng, keys) -> None:
    """Bounds of digits that grow with the number of channels say little about each."""
    for channels in ([0, 4], [1, 13], [6, 11, 2], [10, 14, 63], [40, 44, 32, 36]):
        _check(entry, rng, 300, keys, DENSE, dtype="bfloat16", group=1, channels=channels)
