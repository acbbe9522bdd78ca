"""Every decode_attention kernel against the formula of decode_attention.h in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from openwork import _kernels

from . import floats
from .floats import FloatArray
from .tables import Entry

FAMILY = "decode_attention"
U = floats.ROUNDOFF["float32"]

Stored = npt.NDArray[np.generic]

# b, queries, heads, kv_heads, d, n: d around the vector widths 8 and 16 and four vectors of them,
# 1 .. 9 rows a key head (blocks of 4), n around chunks of 128.
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (2, 1, 4, 2, 3, 5),
    (1, 3, 1, 1, 17, 3),
    (2, 2, 6, 3, 7, 127),
    (1, 1, 5, 1, 64, 128),
    (1, 2, 9, 3, 31, 129),
    (1, 7, 2, 2, 9, 130),
    (1, 1, 8, 1, 80, 257),
    (2, 3, 9, 3, 33, 300),
    (1, 130, 1, 1, 4, 131),  # most queries see nothing of the second chunk
)

dtypes = pytest.mark.parametrize("dtype", floats.STORAGE)


def _operands(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str
) -> tuple[Stored, Stored, Stored]:
    """q, keys, values; keys a slice of a longer cache, values with a token's heads together."""
    b, t, h, g, d, n = shape
    q = floats.store(rng.standard_normal((b, t, h, d)) * 2, dtype)
    keys = floats.poisoned((b, g, n + 2, d), dtype)[:, :, :n]
    values = floats.poisoned((b, n, g, d + 3), dtype)[..., :d].swapaxes(1, 2)
    for cache in (keys, values):
        cache[...] = floats.store(rng.standard_normal((b, g, n, d)), dtype)
    return q, keys, values


def _attend(entry: Entry, q: Stored, keys: Stored, values: Stored, scale: float) -> Stored:
    """The kernel's result; what lies behind it must survive."""
    dtype = next(name for name, storage in floats.STORAGE.items() if q.dtype == storage)
    whole = floats.poisoned((q.shape[0] + 1, *q.shape[1:]), dtype)
    _kernels.decode_attention(entry.name, q, keys, values, scale, whole[:-1], None)
    assert (floats.bits_of(whole)[-1] == floats.POISON[dtype]).all(), "wrote past the last row"
    return whole[:-1]


def _check(
    entry: Entry, q: Stored, keys: Stored, values: Stored, dtype: str, scale: float | None = None
) -> None:
    (_, t, h, d), (g, n) = q.shape, keys.shape[1:3]
    scale = float(np.float32(1 / np.sqrt(d) if scale is None else scale))
    y = floats.load(_attend(entry, q, keys, values, scale))
    k, v = (np.repeat(floats.load(cache), h // g, axis=1) for cache in (keys, values))
    seen = np.tri(t, n, n - t, dtype=bool)

    def scores(scale: float, q: FloatArray, k: FloatArray) -> FloatArray:
        return np.where(seen, scale * np.einsum("bthd,bhnd->bhtn", q, k), -np.inf)

    s = scores(scale, floats.load(q), k)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = np.einsum("bhtn,bhnd->bthd", p, v)
    # Of a weight: d + 3 roundings of its score, at most `worst` in size without cancellation; two
    # differences of scores, each up to 2 * worst; two exponentials of 3e-7 (simd/vec.h), 6
    # roundings each. Then one for each key and chunk. The sum of the weights is off by as much;
    # the quotient adds one.
    worst = scores(abs(scale), np.abs(floats.load(q)), np.abs(k)).max()
    roundings = 2 * ((d + 7) * worst + 12 + n + n / 128 + 1) + 1
    error = roundings * U * np.einsum("bhtn,bhnd->bthd", p, np.abs(v))
    assert (np.abs(y - want) <= floats.rounding(want, error, dtype)).all()


@dtypes
def test_decode_attention(entry: Entry, rng: np.random.Generator, dtype: str) -> None:
    for shape in SHAPES:
        _check(entry, *_operands(rng, shape, dtype), dtype)


@dtypes
@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
def test_scale(entry: Entry, rng: np.random.Generator, dtype: str, scale: float) -> None:
    # 0 weighs all keys alike; with 40 one key takes all, and the rest is too small for fp32.
    _check(entry, *_operands(rng, (1, 2, 3, 1, 20, 300), dtype), dtype, scale)


@dtypes
def test_equal_keys_give_the_mean(entry: Entry, dtype: str) -> None:
    # Chunks of 128, 128 and 44 keys with equal scores; values 0 and 1 in turn.
    q, keys = (floats.store(np.ones((1, 1, n, 5)), dtype) for n in (1, 300))
    values = floats.store(np.tile(np.arange(2.0)[:, None], (150, 5))[None, None], dtype)
    y = floats.load(_attend(entry, q, keys, values, 1.0))
    assert (y == 0.5).all()


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_gives_nan(
    entry: Entry, rng: np.random.Generator, dtype: str, value: float
) -> None:
    # Key 130 of 0 .. 131: seen by the last two of three queries, in the second chunk.
    q, keys, values = _operands(rng, (1, 3, 4, 2, 20, 132), dtype)
    bits = {
        "float32": np.float32(value),
        "float16": np.float16(value),
        "bfloat16": np.float32(value).view(np.uint32) >> 16,
    }
    clean = _attend(entry, q, keys, values, 0.2)
    keys[0, 1, 130, 7] = bits[dtype]
    y = _attend(entry, q, keys, values, 0.2)
    assert np.isnan(floats.load(y)[0, 1:, 2:]).all()
    same = floats.bits_of(y) == floats.bits_of(clean)
    assert same[0, 0].all(), "a query that does not see the key"
    assert same[0, :, :2].all(), "the other key head"


@dtypes
def test_a_value_that_is_nan_stays_in_its_dimension(
    entry: Entry, rng: np.random.Generator, dtype: str
) -> None:
    q, keys, values = _operands(rng, (1, 1, 4, 2, 20, 132), dtype)
    clean = _attend(entry, q, keys, values, 0.2)
    values[0, 1, 130, 7] = {"bfloat16": 0x7FC0}.get(dtype, np.nan)
    y = _attend(entry, q, keys, values, 0.2)
    broken = np.isnan(floats.load(y))
    assert broken[0, 0, 2:, 7].all()
    assert broken.sum() == 2
    assert (floats.bits_of(y) == floats.bits_of(clean))[~broken].all()
