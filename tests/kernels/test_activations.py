"""Every activations kernel against the formulas of activations.h in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from openwork import _kernels

from . import floats
from .floats import FloatArray
from .tables import Entry

FAMILY = "activations"
U = floats.ROUNDOFF["float32"]

# Around the vector widths 8 and 16, and two of the latter.
WIDTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100)

dtypes = pytest.mark.parametrize("dtype", floats.STORAGE)


def _rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    return floats.store(rng.standard_normal(shape) * 4, dtype)


def _poisoned(shape: tuple[int, ...], dtype: str) -> tuple[npt.NDArray[np.generic], ...]:
    """An output with one more row behind it, and the output alone."""
    whole = floats.poisoned((shape[0] + 1, *shape[1:]), dtype)
    return whole, whole[: shape[0]]


def _check(whole: npt.NDArray[np.generic], want: FloatArray, error: FloatArray, dtype: str) -> None:
    assert (floats.bits_of(whole)[-1] == floats.POISON[dtype]).all(), "wrote past the last row"
    y = floats.load(whole[:-1])
    assert (np.abs(y - want) <= floats.rounding(want, error, dtype)).all()


@dtypes
def test_rms_norm(entry: Entry, rng: np.random.Generator, dtype: str) -> None:
    for d in WIDTHS:
        x, w = _rows(rng, (5, d), dtype), _rows(rng, (d,), dtype)
        for eps in (0.0, 1e-5):
            whole, y = _poisoned((5, d), dtype)
            _kernels.rms_norm(entry.name, x, w, eps, y)
            exact = floats.load(x)
            mean = np.square(exact).mean(1, keepdims=True) + np.float64(np.float32(eps))
            want = exact * floats.load(w) / np.sqrt(mean)
            # Adding d squares costs d roundings at most (no cancellation), the mean two more; the
            # square root halves them. Root, reciprocal and two products: four. One to spare.
            _check(whole, want, ((d + 2) / 2 + 5) * U * np.abs(want), dtype)


def test_rms_norm_of_zeros(entry: Entry) -> None:
    x = np.zeros((2, 17), np.float32)
    whole, y = _poisoned((2, 17), "float32")
    _kernels.rms_norm(entry.name, x, x[0], 1e-6, y)
    assert (y == 0).all()
    assert np.isnan(whole[-1]).all()


# exp_ promises 3e-7 (simd/vec.h); then a sum, a quotient and a product.
SILU_ERROR = 3e-7 + 4 * U
# Below g = -87 the kernel takes -87 for g: off by 87 * e^-87 at most, less than |g| * 2**-125,
# which is less than fp32 keeps of any result near 1e-31 or larger.
SILU_FLOOR = 2.0**-125


def _check_silu(entry: Entry, gate: npt.ArrayLike, up: npt.ArrayLike, dtype: str) -> None:
    x = floats.store(np.concatenate([np.atleast_2d(gate), np.atleast_2d(up)], 1), dtype)
    m, d = x.shape[0], x.shape[1] // 2
    whole, y = _poisoned((m, d), dtype)
    _kernels.silu_mul(entry.name, x, y)
    g, u = floats.load(x)[:, :d], floats.load(x)[:, d:]
    with np.errstate(over="ignore"):
        want = g / (1 + np.exp(-g)) * u
    _check(whole, want, SILU_ERROR * np.abs(want) + SILU_FLOOR * np.abs(g * u), dtype)


@dtypes
def test_silu_mul(entry: Entry, rng: np.random.Generator, dtype: str) -> None:
    for d in WIDTHS:
        _check_silu(entry, *rng.standard_normal((2, 5, d)) * 8, dtype)


@dtypes
def test_silu_mul_of_any_size(entry: Entry, dtype: str) -> None:
    # Dense where e^-g changes its exponent and where the kernel caps it, then out to the largest.
    near = np.linspace(-90, 90, 20001)
    far = np.geomspace(90, 6e4 if dtype == "float16" else 3e38, 501)
    gate = np.concatenate([near, far, -far, [0.0, -0.0]])
    _check_silu(entry, gate, np.ones_like(gate), dtype)


@dtypes
def test_rope(entry: Entry, rng: np.random.Generator, dtype: str) -> None:
    b, t, h = 2, 3, 3
    for half in WIDTHS:
        angle = rng.uniform(0, 6, (t, half))
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        c, s = (v.astype(np.float64)[:, None] for v in (cos, sin))
        # A slice of a fused projection: heads of x lie among others.
        fused = _rows(rng, (b, t, h + 2, 2 * half), dtype)
        for x in (np.ascontiguousarray(fused[:, :, :h]), fused[:, :, 1 : h + 1]):
            for turned in (0, 2, h):
                low, high = floats.load(x)[..., :half], floats.load(x)[..., half:]
                want = np.concatenate([low * c - high * s, high * c + low * s], -1)
                # Two products (or one, and a fused step) and a sum, of these magnitudes.
                size = np.abs([low * c, high * c]) + np.abs([high * s, low * s])
                error = 3 * U * np.concatenate(size, -1)
                want[:, :, turned:] = floats.load(x)[:, :, turned:]
                whole, y = _poisoned((b, t, h, 2 * half), dtype)
                _kernels.rope(entry.name, x, cos, sin, turned, y)
                _check(whole, want, error, dtype)
                copied = floats.bits_of(y)[:, :, turned:]
                assert np.array_equal(copied, floats.bits_of(x)[:, :, turned:])
                # The order of a key-value cache: a head's tokens lie together.
                cache = floats.poisoned((b, h, t + 1, 2 * half), dtype)
                _kernels.rope(entry.name, x, cos, sin, turned, cache[:, :, :t].swapaxes(1, 2))
                bits = floats.bits_of(cache)
                assert np.array_equal(bits[:, :, :t].swapaxes(1, 2), floats.bits_of(y))
                assert (bits[:, :, t] == floats.POISON[dtype]).all()


@dtypes
def test_not_finite_values_stay_where_they_are(entry: Entry, dtype: str) -> None:
    values = np.ones((3, 34), np.float32)
    x = floats.store(values, dtype)
    nan = {"float32": np.float32(np.nan), "float16": np.float16(np.nan), "bfloat16": 0x7FC0}
    x[1, 16] = nan[dtype]
    y = floats.poisoned((3, 34), dtype)
    _kernels.rms_norm(entry.name, x, x[0], 1e-6, y)
    broken = np.isnan(floats.load(y))
    assert broken[1].all()
    assert not broken[[0, 2]].any()
    x[2, 5] = {"bfloat16": 0xFF80}.get(dtype, -np.inf)  # a gate that lets nothing through
    y = floats.poisoned((3, 17), dtype)
    _kernels.silu_mul(entry.name, x, y)
    broken = np.isnan(floats.load(y))
    assert broken[1, 16]
    assert broken.sum() == 1
    assert np.abs(floats.load(y)[2, 5]) <= SILU_FLOOR * 87
