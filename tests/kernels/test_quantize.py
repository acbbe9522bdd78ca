"""Every activation encoder, bit for bit, against the formulas of quantize.h in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from openwork import _kernels

from . import floats
from .tables import Entry

FAMILY = "quantize"

# Around the vector widths (8, 16), a unit (16) and the padding (32).
DEPTHS = (1, 7, 8, 9, 15, 16, 17, 31, 33, 48, 100, 272)
# The largest integer of three base-256 digits in -127 .. 127.
LARGEST = 8355711

Codes = npt.NDArray[np.int64]


def expected_int8(x: npt.NDArray[np.generic]) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Digits ``[m, 1, k]`` and scales ``[m]``; each fp32 operation in fp32, as written."""
    with np.errstate(invalid="ignore"):
        values = floats.load(x).astype(np.float32)
        largest = np.abs(values).max(1, initial=0.0)
        finite = np.isfinite(largest)
        small = largest < 2.0**-120
        divisor = np.where(finite & ~small, largest, np.float32(1))
        inverse = (np.float32(127) / divisor).astype(np.float32)
        scales = np.where(small, np.float32(0), largest / np.float32(127))
        codes = np.rint(np.where((finite & ~small)[:, None], values * inverse[:, None], 0))
    return codes.astype(np.int64)[:, None], np.where(finite, scales, np.nan).astype(np.float32)


def expected_fixed(
    x: npt.NDArray[np.generic], group_size: int
) -> tuple[Codes, npt.NDArray[np.float32]]:
    """Digits ``[m, 3, k]`` and scales ``[m, groups]``; float64 holds every step exactly."""
    values = floats.load(x)
    m, k = values.shape
    digits = np.zeros((m, 3, k), np.int64)
    scales = np.zeros((m, -(-k // group_size)), np.float32)
    for g in range(scales.shape[1]):
        group = slice(g * group_size, min((g + 1) * group_size, k))
        for i in range(m):
            largest = np.abs(values[i, group]).max()
            if not np.isfinite(largest):
                scales[i, g] = np.nan
            elif largest >= 2.0**-100:
                # The smallest power of two that leaves at most LARGEST.
                exponent = int(np.frexp(largest / LARGEST)[1])
                if largest <= LARGEST * 2.0 ** (exponent - 1):
                    exponent -= 1
                scales[i, g] = 2.0**exponent
                rest = np.rint(values[i, group] * 2.0**-exponent).astype(np.int64)
                for d in (2, 1):
                    digits[i, d, group] = (rest + 128) % 256 - 128
                    rest = (rest - digits[i, d, group]) // 256
                digits[i, 0, group] = rest
    return digits, scales


def blocked(digits: Codes, k_padded: int, row_block: int, k_block: int) -> npt.NDArray[np.int8]:
    """The digit rows in blocks, zeros after k; the binding's poison in rows past the last."""
    rows = digits.reshape(-1, digits.shape[2])
    blocks = -(-len(rows) // row_block)
    padded = np.zeros((blocks * row_block, k_padded), np.int64)
    padded[: len(rows), : rows.shape[1]] = rows
    padded[len(rows) :] = 0x55
    if row_block == 1:
        return padded.astype(np.int8).ravel()
    units = padded.reshape(blocks, row_block, k_padded // k_block, k_block)
    return units.transpose(0, 2, 1, 3).astype(np.int8).ravel()


def check(
    entry: Entry,
    x: npt.NDArray[np.generic],
    group_size: int,
    digits: int,
    *,
    row_block: int | None = None,
    k_block: int = 16,
    sum_factor: int = 1,
) -> None:
    m, k = x.shape
    # One row a block is row-major and needs no padding: what openwork.quantize_rows asks for.
    k_padded = k if row_block == 1 else -(-k // (2 * k_block)) * 2 * k_block
    row_block = m * digits if row_block is None else row_block
    codes, scales, sums = _kernels.encode_rows(
        entry.name, x, group_size, digits, k_padded, row_block, k_block, sum_factor
    )
    want, want_scales = expected_int8(x) if digits == 1 else expected_fixed(x, group_size)
    where = f"shape {x.shape}, group {group_size}, digits {digits}, block {row_block}, {x.dtype}"
    assert np.array_equal(scales, want_scales, equal_nan=True), where
    assert np.array_equal(codes, blocked(want, k_padded, row_block, k_block)), where
    starts = range(0, k, group_size)
    want_sums = [want[:, :, b : b + group_size].sum(2) * sum_factor for b in starts]
    assert np.array_equal(sums, np.stack(want_sums, 2)), where


@pytest.mark.parametrize("dtype", floats.STORAGE)
@pytest.mark.parametrize("digits", [1, 3])
def test_depths_and_groups(entry: Entry, rng: np.random.Generator, dtype: str, digits: int) -> None:
    for k in DEPTHS:
        for group_size in {16, 32, 64, 128, k}:
            x = rng.standard_normal((3, k)) * np.exp2(rng.integers(-8, 8, (3, 1)))
            check(entry, floats.store(x, dtype), group_size, digits, sum_factor=-8)


@pytest.mark.parametrize("digits", [1, 3])
def test_row_blocks(entry: Entry, rng: np.random.Generator, digits: int) -> None:
    for m in (1, 2, 3, 4, 5, 6, 7, 13):
        for row_block in (1, 6, m * digits):
            x = floats.store(rng.standard_normal((m, 80)), "float32")
            check(entry, x, 32, digits, row_block=row_block)
            if row_block > 1:
                check(entry, x, 32, digits, row_block=row_block, k_block=64)


def _special_rows() -> npt.NDArray[np.float32]:
    """Rows of 48 with one trouble each; all but the first 16 values are ordinary."""
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    heads = [
        [0.0],
        [-0.0],
        [np.nan],
        [-np.nan, np.inf],
        [np.inf],
        [-np.inf, 1.0],
        [tiny],
        [2.0**-121, -(2.0**-121)],
        [2.0**-120, -(2.0**-120), 2.0**-127],
        [np.nextafter(np.float32(2.0**-120), np.float32(0))],
        [2.0**-100, 2.0**-110],
        [np.nextafter(np.float32(2.0**-100), np.float32(0))],
        [huge, -huge, 1.0],
        [65504.0, 2.0**-24],
        # One group's largest at, just below and just above what three digits hold.
        *([v * 2.0**e, 1.0] for e in (-20, 0) for v in (LARGEST - 0.5, LARGEST, LARGEST + 0.5)),
        *([-v, v, v / 2] for v in (LARGEST + 1.0, 2.0**22, 2.0**22 - 0.5, 2.0**23)),
        # Every integer half: ties go to even, on both sides of zero and at every size.
        [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, 62.5, -126.5, 126.5],
        [LARGEST, 0.5, 1.5, 2.5, -0.5, -1.5, 4194302.5, 4194303.5],
        [-LARGEST, 4194304.5, 4194305.5, -4194304.5, -4194305.5, 8355710.5, -8355709.5],
        # Digits at their ends: ..7f, ..80, and carries through both places.
        [LARGEST, 127, 128, 129, -128, -129, 32639, 32640, 32767, 32768, -32896, -32897],
    ]
    rows = np.zeros((len(heads), 48), np.float32)
    for row, head in zip(rows, heads, strict=True):
        row[: len(head)] = head
        row[16:] = np.linspace(-1, 1, 32)
    return rows


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("group_size", [16, 48])
def test_special_values(entry: Entry, digits: int, group_size: int) -> None:
    rows = _special_rows()
    check(entry, rows, group_size, digits)
    # The same where the trouble is alone in its row, last, and in a partial vector.
    for k in (1, 11, 12, 13):
        check(entry, np.ascontiguousarray(rows[:, :k]), k, digits)
    check(entry, np.ascontiguousarray(rows[:, ::-1]), group_size, digits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("digits", [1, 3])
def test_every_sixteen_bit_value(entry: Entry, dtype: str, digits: int) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    check(entry, bits.view(floats.STORAGE[dtype]), 16, digits)


def test_fixed_point_keeps_fp32_accuracy(entry: Entry, rng: np.random.Generator) -> None:
    """The digits rebuild x to within half a step of the smallest scale that fits."""
    x = (rng.standard_normal((50, 64)) * np.exp2(rng.uniform(-60, 60, (50, 1)))).astype(np.float32)
    codes, scales, _ = _kernels.encode_rows(entry.name, x, 16, 3, 64, 1, 16, 1)
    digits = codes.reshape(50, 3, 64).astype(np.float64)
    step = np.repeat(scales, 16, 1).astype(np.float64)
    rebuilt = step * (digits[:, 0] * 65536 + digits[:, 1] * 256 + digits[:, 2])
    assert (np.abs(rebuilt - x) <= step / 2).all()
    # The scale is the smallest power of two, so the largest x is over LARGEST / 2 steps.
    largest = np.repeat(np.abs(x).reshape(50, 4, 16).max(2), 16, 1)
    assert (largest > LARGEST / 2 * step).all()
