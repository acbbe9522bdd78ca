"""Every nm_gemm kernel against the formula, at the edges of panels, units, blocks and integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest

import openwork
from openwork import _kernels

from . import floats
from .floats import FloatArray
from .tables import Entry

FAMILY = "nm_gemm"
U = floats.ROUNDOFF["float32"]

# All that a kernel of rows takes at once; around a vector of tokens (8, 16) and a panel (64, 128).
ROWS = (*range(1, 18), 31, 63, 64, 65, 127, 128, 129, 145)
# Around a panel of 16 and the 256 outputs whose sums a panel kernel keeps.
OUTPUTS = (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 255, 256, 257)
# Around a block and a unit of 2:4 (64 columns), and its half.
DEPTHS = (1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 100, 128, 300)
PATTERNS = (
    (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (7, 8), (1, 16), (4, 16), (5, 16), (8, 16),
    (15, 16), (1, 32), (9, 32), (31, 32),
)  # fmt: skip
VECTORS = (1, 8, 16, 32)


@dataclass(frozen=True)
class Problem:
    """Operands of one call: x ``[m, k]`` as stored, or int8 codes with ``x_scales``."""

    x: npt.NDArray[np.generic]
    x_scales: npt.NDArray[np.float32] | None
    weight: npt.NDArray[np.generic]
    mask: npt.NDArray[np.bool_]
    scales: npt.NDArray[np.generic] | None
    bits: int
    pattern: tuple[int, int]
    vector: int
    group_size: int
    bias: npt.NDArray[np.generic] | None = None
    add: npt.NDArray[np.generic] | None = None
    y_type: str = "float32"

    def dense(self) -> FloatArray:
        """The weight, ``[n, k]``."""
        if self.scales is None:
            return floats.load(self.weight) * self.mask
        scales = np.repeat(floats.load(self.scales), self.group_size, 1)
        scales = scales[:, : self.weight.shape[1]]
        return scales * (self.weight - float(1 << (self.bits - 1))) * self.mask


def run(kernel: str, p: Problem) -> npt.NDArray[np.generic]:
    y = floats.poisoned((len(p.x), len(p.weight)), p.y_type)
    _kernels.nm_gemm(
        kernel, p.x, p.x_scales, p.weight, p.mask, p.scales, p.bits, *p.pattern, p.vector,
        p.group_size, p.bias, p.add, y,
    )  # fmt: skip
    return y


def reads_int8(entry: Entry) -> bool:
    """``key`` is twice the layout id, plus one for int8 x."""
    return entry.key % 2 == 1


def bits_of(entry: Entry) -> int:
    tag = openwork.layouts()[entry.key // 2]
    return int(tag[2 : tag.index("_")])


def multiplies_pairs(entry: Entry) -> bool:
    """Reads bf16 x only, and of patterns of each row only 2:4."""
    return entry.tier == "avx512bf16"


def takes(
    entry: Entry, m: int, pattern: tuple[int, int], k: int, group_size: int, vector: int
) -> bool:
    """Whether the driver would hand the problem to this kernel's tier."""
    if m > entry.max_m:
        return False
    if multiplies_pairs(entry):
        return vector > 1 or pattern == (2, 4)
    lines_fit = group_size == k or group_size // pattern[1] * pattern[0] % 4 == 0
    anything = entry.tier in ("scalar", "avx2") or not reads_int8(entry)
    return anything or (lines_fit and pattern != (1, 32))


def random_mask(
    rng: np.random.Generator, n: int, k: int, pattern: tuple[int, int], vector: int
) -> npt.NDArray[np.bool_]:
    """Up to N of each M columns, the same for ``vector`` rows."""
    kept, block = pattern
    blocks = -(-k // block)
    rank = rng.random((-(-n // vector), blocks, block)).argsort(-1)
    fewer = rng.integers(0, kept + 1, (*rank.shape[:2], 1))
    limit = np.where(rng.random(fewer.shape) < 0.8, kept, fewer)
    shared = (rank < limit).reshape(len(rank), -1)
    return np.ascontiguousarray(np.repeat(shared, vector, 0)[:n, :k])


def make(
    entry: Entry,
    rng: np.random.Generator,
    m: int,
    n: int,
    k: int,
    *,
    pattern: tuple[int, int] = (2, 4),
    vector: int = 1,
    group_size: int = 32,
    scale_type: str = "float32",
    y_type: str = "float32",
) -> Problem:
    bits = bits_of(entry)
    y_type = "bfloat16" if multiplies_pairs(entry) else y_type
    mask = random_mask(rng, n, k, pattern, vector)
    scales = None
    if bits <= 8:
        weight: npt.NDArray[np.generic] = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
        size = rng.uniform(0.5, 2.0, (n, -(-k // group_size))) * 2.0**-6
        scales = floats.store(size, scale_type)
    else:
        kind = "bfloat16" if bits == 16 else "float32"
        weight = floats.store(rng.standard_normal((n, k)), kind)
        group_size = k
    x_scales = None
    if reads_int8(entry):
        x: npt.NDArray[np.generic] = rng.integers(-127, 128, (m, k)).astype(np.int8)
        x_scales = rng.uniform(0.5, 2.0, m).astype(np.float32)
    else:
        x = floats.store(rng.standard_normal((m, k)), y_type)
    return Problem(
        x, x_scales, weight, mask, scales, bits, pattern, vector, group_size, y_type=y_type
    )


def check(entry: Entry, p: Problem) -> None:
    """Within one rounding for each kept weight, two a group, and less than 8 for the terms."""
    x = p.x.astype(np.float64) if p.x_scales is not None else floats.load(p.x)
    dense = p.dense()
    want, size = x @ dense.T, np.abs(x) @ np.abs(dense).T
    if p.x_scales is not None:
        want, size = (v * p.x_scales[:, None].astype(np.float64) for v in (want, size))
    for term in (p.bias, p.add):
        if term is not None:
            want, size = want + floats.load(term), size + np.abs(floats.load(term))
    kept, block = p.pattern
    k = dense.shape[1]
    roundings = -(-k // block) * kept + 2 * -(-k // p.group_size) + 8
    bound = floats.rounding(want, roundings * U * size, p.y_type)
    y = floats.load(run(entry.name, p))
    error = np.abs(y - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"{p.x.shape} x {dense.shape}, {p.pattern} v{p.vector}, group {p.group_size}: y{worst} is "
        f"{y[worst]}, expected {want[worst]} +- {bound[worst]}"
    )


def test_rows(entry: Entry, rng: np.random.Generator) -> None:
    for m in ROWS:
        for vector in (1, 16) if m <= entry.max_m else ():
            check(entry, make(entry, rng, m, 33, 72, vector=vector))


def test_columns_of_many_tokens(entry: Entry, rng: np.random.Generator) -> None:
    """As many slots as are multiplied at a time, and one more unit."""
    for m in (33, 150):
        for vector in VECTORS if m <= entry.max_m else ():
            check(entry, make(entry, rng, m, 33, 577, vector=vector, group_size=64))


def test_outputs(entry: Entry, rng: np.random.Generator) -> None:
    for n in OUTPUTS:
        for vector in VECTORS:
            check(entry, make(entry, rng, 3, n, 72, vector=vector))


def test_depths_and_patterns(entry: Entry, rng: np.random.Generator) -> None:
    for pattern in PATTERNS:
        vector = 8 if multiplies_pairs(entry) and pattern != (2, 4) else 1
        for k in DEPTHS:
            for group_size in {32, 64, 128, k} if bits_of(entry) <= 8 else {k}:
                if takes(entry, 2, pattern, k, group_size, vector):
                    p = make(
                        entry,
                        rng,
                        2,
                        17,
                        k,
                        pattern=pattern,
                        vector=vector,
                        group_size=group_size,
                    )
                    check(entry, p)


def test_vectors_and_patterns(entry: Entry, rng: np.random.Generator) -> None:
    for pattern in PATTERNS:
        for vector in VECTORS:
            for m in (1, 6, 40):
                if takes(entry, m, pattern, 150, 128, vector):
                    p = make(entry, rng, m, 70, 150, pattern=pattern, vector=vector, group_size=128)
                    check(entry, p)


@pytest.mark.parametrize("scale_type", floats.STORAGE)
@pytest.mark.parametrize("y_type", floats.STORAGE)
def test_types_and_terms(
    entry: Entry, rng: np.random.Generator, scale_type: str, y_type: str
) -> None:
    if multiplies_pairs(entry) and y_type != "bfloat16":
        pytest.skip("reads bf16 only")
    for m, n in ((1, 33), (3, 17), (8, 47), (20, 65)):
        if m > entry.max_m:
            continue
        p = make(entry, rng, m, n, 100, scale_type=scale_type, y_type=y_type)
        bias = floats.store(rng.standard_normal(n), y_type)
        add = floats.store(rng.standard_normal((m, n)), y_type)
        for q in (
            replace(p, bias=bias, add=add),
            replace(p, bias=bias),
            replace(p, add=add),
        ):
            check(entry, q)


def test_each_column_is_where_it_belongs(entry: Entry, rng: np.random.Generator) -> None:
    """With a single nonzero x, y is that column of the weight, exactly."""
    for pattern in PATTERNS:
        vector = 8 if multiplies_pairs(entry) and pattern != (2, 4) else 1
        p = make(entry, rng, 1, 33, 70, pattern=pattern, group_size=64, vector=vector)
        if not takes(entry, 1, pattern, 70, 64, vector):
            continue
        if p.scales is not None:
            p = replace(p, scales=np.ones_like(p.scales))
        if p.x_scales is not None:
            p = replace(p, x_scales=np.ones_like(p.x_scales))
        for column in range(70):
            x = np.zeros_like(p.x)
            x[:, column] = floats.store(1, "bfloat16") if x.dtype == np.uint16 else 1
            y = run(entry.name, replace(p, x=x))
            assert np.array_equal(floats.load(y)[0], p.dense()[:, column])


def _extremes(entry: Entry, k: int) -> Iterator[Problem]:
    bits = bits_of(entry)
    mask = np.ones((17, k), np.bool_)
    mask[:, 3::4] = False
    for code in (0, (1 << bits) - 1):
        for value in (-127, 127):
            yield Problem(
                np.full((2, k), value, np.int8),
                np.ones(2, np.float32),
                np.full((17, k), code, np.uint8),
                mask,
                np.ones((17, 1), np.float32),
                bits,
                (3, 4),
                1,
                k,
            )


# 65536 is the longest group.
@pytest.mark.parametrize("k", [16, 100, 65536])
def test_extreme_integers_do_not_overflow(entry: Entry, k: int) -> None:
    if not reads_int8(entry):
        pytest.skip("sums floats")
    for p in _extremes(entry, k):
        exact = p.x.astype(np.int64) @ p.dense().astype(np.int64).T
        assert np.array_equal(run(entry.name, p), exact.astype(np.float32))


def test_not_finite_rows_reach_only_themselves(entry: Entry, rng: np.random.Generator) -> None:
    for m in (3, 8, 20):
        if m > entry.max_m:
            continue
        p = make(entry, rng, m, 33, 48)
        y = run(entry.name, p)
        if p.x_scales is not None:
            x_scales = p.x_scales.copy()
            x_scales[1] = np.nan
            broken = run(entry.name, replace(p, x_scales=x_scales))
            assert np.isnan(broken[1]).all()
        else:
            x = p.x.copy()
            x[1] = 0x7FC0 if x.dtype == np.uint16 else np.nan
            broken = run(entry.name, replace(p, x=x))
        others = np.arange(m) != 1
        assert np.array_equal(broken[others], y[others])
