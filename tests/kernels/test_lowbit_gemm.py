"""Every lowbit_gemm kernel against the formula, at the edges of tiles, groups and integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from . import floats
from .lowbit_reference import (
    Problem,
    bits_of,
    expected,
    random_problem,
    reads_bf16,
    run,
    with_terms,
)
from .tables import Entry

FAMILY = "lowbit_gemm"
SCALAR = "lowbit_gemm_rows_scalar"

# Around one row, the tile kernels' 6 digit rows, the rows kernels' 4, 8, 12 and 24, and the tile
# kernels' 192 (bf16: 96) rows a pass over the weight.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 24, 25, 63, 64, 65, 95, 96, 97, 191, 192, 193)
# Around a vector of outputs, half a panel, a panel, and the tile kernels' two panels.
OUTPUTS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97)
# Around a unit (16), the padding (32), and a tile of k (bf16: 128, VNNI: 256).
DEPTHS = (1, 2, 15, 16, 17, 31, 32, 33, 48, 100, 127, 128, 129, 256, 272, 576)
GROUP_SIZES = (16, 32, 64, 128)


def _digits(entry: Entry) -> tuple[int, ...]:
    return (0,) if reads_bf16(entry) else (1, 3)


def _problems(
    entry: Entry, rng: np.random.Generator, shapes: Iterator[tuple[int, int, int, int]]
) -> Iterator[Problem]:
    """Problems of the given (m, n, k, group_size), in both symmetries and every digit count."""
    for m, n, k, group_size in shapes:
        for digits in _digits(entry):
            if m * digits > entry.max_m:
                continue
            for symmetric in (True, False):
                yield random_problem(
                    rng,
                    m,
                    n,
                    k,
                    bits=bits_of(entry),
                    group_size=group_size,
                    digits=digits,
                    symmetric=symmetric,
                )


def _check(entry: Entry, p: Problem) -> None:
    """Within the derived bound of the formula, and the very bits of the scalar kernel."""
    y = run(entry.name, p)
    want, bound = expected(p)
    error = np.abs(floats.load(y) - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"shape {p.shape}, group {p.group_size}: y{list(worst)} is {floats.load(y)[worst]}, "
        f"expected {want[worst]} +- {bound[worst]}"
    )
    if not reads_bf16(entry):
        scalar = run(SCALAR, p)
        assert np.array_equal(floats.bits_of(y), floats.bits_of(scalar)), (
            f"shape {p.shape}, group {p.group_size}, {p.y_type}: differs from the scalar kernel"
        )


def test_rows(entry: Entry, rng: np.random.Generator) -> None:
    for p in _problems(entry, rng, ((m, 33, 48, 32) for m in ROWS)):
        _check(entry, p)


def test_outputs(entry: Entry, rng: np.random.Generator) -> None:
    for p in _problems(entry, rng, ((7, n, 48, 16) for n in OUTPUTS)):
        _check(entry, p)


def test_depths_and_groups(entry: Entry, rng: np.random.Generator) -> None:
    shapes = ((7, 33, k, g) for k in DEPTHS for g in {*GROUP_SIZES, k})
    for p in _problems(entry, rng, shapes):
        _check(entry, p)


@pytest.mark.parametrize("scale_type", floats.STORAGE)
@pytest.mark.parametrize("y_type", floats.STORAGE)
def test_types_and_terms(
    entry: Entry, rng: np.random.Generator, scale_type: str, y_type: str
) -> None:
    for m, n, digits in ((1, 33, 1), (3, 17, 3), (7, 65, 1), (8, 47, 3)):
        for symmetric in (True, False):
            p = random_problem(
                rng,
                m,
                n,
                100,
                bits=bits_of(entry),
                group_size=32,
                digits=0 if reads_bf16(entry) else digits,
                symmetric=symmetric,
                scale_type=scale_type,
            )
            full = with_terms(rng, p, y_type)
            for q in (full, replace(full, bias=None), replace(full, add=None)):
                _check(entry, q)


def test_small_integers_are_exact(entry: Entry, rng: np.random.Generator) -> None:
    # Scales are 1, and no partial sum reaches 2**24, so that fp32 holds every one of them: at
    # most 272 * 255 * 127 in one digit place at a time.
    for k, group_size in ((17, 16), (100, 32), (272, 272), (272, 128)):
        for p in _problems(entry, rng, ((m, 33, k, group_size) for m in (1, 5, 7, 13))):
            x = p.x
            weight = p.centered().astype(np.int64)
            if reads_bf16(entry):
                values = rng.integers(-127, 128, x.shape)
                p = replace(p, x=floats.store(values, "bfloat16"))
                places = [(p, values)]
            else:
                ones = np.ones_like(p.x_scales)
                places = []
                for d in range(x.shape[1]):
                    kept = np.zeros_like(x)
                    kept[:, d] = np.maximum(x[:, d], -127)
                    place = 256 ** (x.shape[1] - 1 - d)
                    values = kept[:, d].astype(np.int64) * place
                    places.append((replace(p, x=kept, x_scales=ones), values))
            for q, values in places:
                exact = values @ weight.T
                y = run(entry.name, replace(q, scales=np.ones_like(q.scales)))
                assert np.array_equal(floats.load(y), exact.astype(np.float64))


EXTREMES = {
    "largest": lambda lo, hi, i: np.full_like(i, hi),
    "smallest": lambda lo, hi, i: np.full_like(i, lo),
    "alternating": lambda lo, hi, i: np.where(i % 2 == 0, lo, hi),
    "alternating-fours": lambda lo, hi, i: np.where(i // 4 % 2 == 0, hi, lo),
    "first-only": lambda lo, hi, i: np.where(i == 0, hi, 0),
    "last-only": lambda lo, hi, i: np.where(i == len(i) - 1, lo, 0),
}


# 65536 is the longest group; there 8-bit sums reach 2139095040, just short of 2**31.
@pytest.mark.parametrize("k", [16, 100, 576, 65536])
def test_extreme_integers_do_not_overflow(entry: Entry, k: int) -> None:
    bits = bits_of(entry)
    index = np.arange(k)
    x = np.stack([make(-128, 127, index) for make in EXTREMES.values()]).astype(np.int8)
    codes = np.stack([make(0, (1 << bits) - 1, index) for make in EXTREMES.values()])
    for zero in (None, 0, (1 << bits) - 1):
        p = Problem(
            x[:, None],
            np.ones(len(x), np.float32),
            codes.astype(np.uint8),
            np.ones((len(codes), 1), np.float32),
            None if zero is None else np.full((len(codes), 1), zero, np.uint8),
            bits,
            k,
        )
        if reads_bf16(entry):  # sums floats
            _check(entry, replace(p, x=floats.store(x, "bfloat16"), x_scales=None))
            continue
        # One group and scales of 1: the only rounding is that of the int32 sum to fp32.
        exact = x.astype(np.int64) @ p.centered().astype(np.int64).T
        assert np.array_equal(run(entry.name, p), exact.astype(np.float32))


@pytest.mark.parametrize("spike", [0, 15, 16, 255, 256, 575])
def test_one_column_is_picked_out(entry: Entry, spike: int) -> None:
    """With a single nonzero x, y is that column of the weight: every code is where it belongs."""
    rng = np.random.default_rng(spike)
    for p in _problems(entry, rng, ((m, 65, 576, g) for m in (1, 7) for g in (16, 576))):
        column = p.centered()[:, spike]
        m = p.shape[0]
        p = replace(p, scales=np.ones_like(p.scales))
        if reads_bf16(entry):
            x = np.zeros(p.x.shape)
            x[:, spike] = 1.0
            p = replace(p, x=floats.store(x, "bfloat16"))
        else:
            digits = np.zeros_like(p.x)
            digits[:, -1, spike] = 1
            p = replace(p, x=digits, x_scales=np.ones_like(p.x_scales))
        assert np.array_equal(run(entry.name, p), np.tile(column.astype(np.float32), (m, 1)))


def test_not_finite_scales_reach_only_their_row(entry: Entry, rng: np.random.Generator) -> None:
    for p in _problems(entry, rng, ((m, 33, 48, 16) for m in (3, 8))):
        y = run(entry.name, p)
        x, x_scales = p.x.copy(), None
        if reads_bf16(entry):
            x[1, 20] = 0x7FC0
        else:
            x_scales = p.x_scales.copy()
            x_scales[1, ...] = np.nan
        broken = run(entry.name, replace(p, x=x, x_scales=x_scales))
        assert np.isnan(broken[1]).all()
        others = np.arange(len(y)) != 1
        assert np.array_equal(broken[others], y[others])
