"""The lowbit_gemm formula in float64, with a bound on what fp32 sums may differ from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

import openwork
from openwork import _kernels

from . import floats
from .floats import FloatArray
from .tables import Entry

U = floats.ROUNDOFF["float32"]


@dataclass(frozen=True)
class Problem:
    """Operands of one call, as stored: digits ``[m, digits, k]`` int8, or x ``[m, k]`` bf16."""

    x: npt.NDArray[np.generic]
    x_scales: npt.NDArray[np.float32] | None
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.generic]
    zeros: npt.NDArray[np.uint8] | None
    bits: int
    group_size: int
    bias: npt.NDArray[np.generic] | None = None
    add: npt.NDArray[np.generic] | None = None
    y_type: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[0], *self.codes.shape

    @property
    def groups(self) -> list[slice]:
        k = self.codes.shape[1]
        return [slice(b, min(b + self.group_size, k)) for b in range(0, k, self.group_size)]

    def centered(self) -> FloatArray:
        """``c - z`` for every code."""
        if self.zeros is None:
            return self.codes - float(1 << (self.bits - 1))
        zeros = np.repeat(self.zeros, self.group_size, 1)[:, : self.codes.shape[1]]
        return self.codes - zeros.astype(np.float64)


def bits_of(entry: Entry) -> int:
    """``key`` is twice the layout id, plus one for kernels that read bf16 x."""
    return int(openwork.layouts()[entry.key // 2][1])


def reads_bf16(entry: Entry) -> bool:
    return entry.key % 2 == 1


def run(kernel: str, p: Problem) -> npt.NDArray[np.generic]:
    """The kernel's y; what it leaves unwritten stays poison, as must the row past the last."""
    m, n, _ = p.shape
    y = floats.poisoned((m + 1, n), p.y_type)
    _kernels.lowbit_gemm(
        kernel,
        p.x,
        p.x_scales,
        p.codes,
        p.scales,
        p.zeros,
        p.bits,
        p.group_size,
        p.bias,
        p.add,
        y[:m],
    )
    bits = floats.bits_of(y)
    assert (bits[m] == floats.POISON[p.y_type]).all(), "wrote past the last row"
    assert (bits[:m] != floats.POISON[p.y_type]).all(), "left outputs unwritten"
    return y[:m]


def expected(p: Problem) -> tuple[FloatArray, FloatArray]:
    """y in float64 (integer sums exact: below 2**53) and how far a kernel's y may be from it.

    A kernel rounds: each digit's int32 sum to fp32 (1), two steps that join the digits (2), one fma
    for each group, the product with the row's scale (1), bias (1) and add (1). Every rounding is at
    most U times the magnitudes added up so far; one more U covers the second-order terms. bf16
    kernels sum floats instead: one rounding a product within a group, in place of the first three.
    """
    m, n, _ = p.shape
    weight = p.centered()
    scales = floats.load(p.scales)
    total = np.zeros((m, n))
    magnitude = np.zeros((m, n))
    for g, group in enumerate(p.groups):
        w = weight[:, group].T
        scale = scales[:, g]
        if p.x.ndim == 2:
            x = floats.load(p.x)[:, group]
            total += scale * (x @ w)
            magnitude += np.abs(scale) * (np.abs(x) @ np.abs(w))
            continue
        sums = [p.x[:, d, group].astype(np.float64) @ w for d in range(p.x.shape[1])]
        place = [1.0] if len(sums) == 1 else [65536.0, 256.0, 1.0]
        x_scale = 1.0 if len(sums) == 1 else p.x_scales[:, g : g + 1].astype(np.float64)
        total += scale * x_scale * sum(v * s for v, s in zip(place, sums, strict=True))
        absolute = sum(v * np.abs(s) for v, s in zip(place, sums, strict=True))
        magnitude += np.abs(scale) * x_scale * absolute
    if p.x_scales is not None and p.x_scales.ndim == 1:
        total *= p.x_scales[:, None].astype(np.float64)
        magnitude *= p.x_scales[:, None].astype(np.float64)
    for term in (p.bias, p.add):
        if term is not None:
            total += floats.load(term)
            magnitude += np.abs(floats.load(term))
    roundings = len(p.groups) + 7 + (p.group_size if p.x.ndim == 2 else 0)
    return total, floats.rounding(total, roundings * U * magnitude, p.y_type)


def random_problem(
    rng: np.random.Generator,
    m: int,
    n: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    digits: int,
    symmetric: bool,
    scale_type: str = "float32",
) -> Problem:
    """Any digits, codes, zero points; ``digits = 0`` is bf16 x."""
    groups = -(-k // group_size)
    codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    zeros = None if symmetric else rng.integers(0, 1 << bits, (n, groups)).astype(np.uint8)
    scales = floats.store(rng.uniform(0.5, 2.0, (n, groups)) * 2.0**-6, scale_type)
    x_scales: npt.NDArray[np.float32] | None
    if digits == 0:
        x: npt.NDArray[np.generic] = floats.store(rng.standard_normal((m, k)), "bfloat16")
        x_scales = None
    else:
        x = rng.integers(-128, 128, (m, digits, k)).astype(np.int8)
        # One scale a row, or powers of two: what the encoders make.
        powers = 2.0 ** rng.integers(-24, -16, (m, groups))
        x_scales = (rng.uniform(0.5, 2.0, m) if digits == 1 else powers).astype(np.float32)
    return Problem(x, x_scales, codes, scales, zeros, bits, group_size)


def with_terms(rng: np.random.Generator, p: Problem, y_type: str) -> Problem:
    """The same problem with a bias, an added term, and y of another type."""
    m, n, _ = p.shape
    return replace(
        p,
        y_type=y_type,
        bias=floats.store(rng.standard_normal(n), y_type),
        add=floats.store(rng.standard_normal((m, n)), y_type),
    )
