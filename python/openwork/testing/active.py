"""Column-skipping linear: the slow truth, small nasty calls, and the shapes of real layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.active import active_linear, pack_columns, pack_lowbit_columns, unpack_columns
from ..packing import ColumnWeight, strip_outputs
from .case import EPS, Cost, OpCase, Reject, Sample, Workload
from .sparse import product_tolerance


def _weight(weight: ColumnWeight) -> Tensor:
    """``[n, k]`` float64, with the codes' products not rounded."""
    if weight.scales is None:
        return unpack_columns(weight).double()
    ones = replace(weight, scales=torch.ones_like(weight.scales))
    group = torch.arange(weight.k) // weight.group_size
    return unpack_columns(ones).double() * weight.scales[:, : weight.n].T.double()[:, group]


def active_linear_reference(
    x: Tensor,
    weight: ColumnWeight,
    threshold: float,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """``masked(x) @ w.T + bias + add`` in float64."""
    inactive = x.float().abs() <= torch.tensor(threshold)
    y = torch.where(inactive, 0.0, x.double()) @ _weight(weight).T
    if bias is not None:
        y = y + bias.double()
    if add is not None:
        y = y + add.double()
    return y


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """A code is summed apart from its zero point, so both count in the magnitude."""
    x, weight = sample.args[:2]
    w = _weight(weight).abs()
    if weight.scales is not None:
        group = torch.arange(weight.k) // weight.group_size
        scales = weight.scales[:, : weight.n].T.double()[:, group]
        w = w + 2**weight.bits * scales.abs()
    operands = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    return (product_tolerance(x, w, expected[0], operands, 2 * weight.k),)


def make_column_weight(
    n: int, k: int, kind: str, group_size: int = 0, symmetric: bool = True, seed: int = 0
) -> ColumnWeight:
    """A random weight of float32, bfloat16, or of codes: ``kind`` is "w2", "w3", "w4" or
    "w8"."""
    generator = torch.Generator().manual_seed(seed)
    if not kind.startswith("w"):
        weight = torch.randn(n, k, generator=generator)
        return pack_columns(weight.to(getattr(torch, kind)))
    bits = int(kind[1:])
    groups = -(-k // group_size)
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.rand(n, groups, generator=generator) + 0.5
    zeros = None
    if not symmetric:
        zeros = torch.randint(2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return pack_lowbit_columns(codes, scales, zeros, bits=bits, group_size=group_size)


# (n, k, group_size): 1s, primes, around strips of 16, 64, 128, 160, 256, more than a chunk of 2048.
_SHAPES = (
    (1, 1, 1),
    (15, 37, 16),
    (64, 64, 32),
    (129, 100, 64),
    (161, 40, 32),
    (257, 130, 130),
    (2100, 65, 16),
)
_KINDS = ("float32", "bfloat16", "w2", "w3", "w4", "w8")


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)
    for i, (n, k, group_size) in enumerate(_SHAPES):
        for j, kind in enumerate(_KINDS):
            weight = make_column_weight(n, k, kind, group_size, (i + j) % 2 == 0)
            dtype = list(EPS)[(i + j) % 3]
            x = torch.randn(1 + j % 2, k, generator=generator).to(dtype)
            threshold = (0.0, 0.7)[(i + j) % 2]
            name = f"{n}x{k}-{kind}-g{group_size}-t{threshold}-{str(dtype)[6:]}"
            yield Sample(name, (x, weight, threshold))
    for kind in ("float32", "w4"):
        weight = make_column_weight(48, 100, kind, 32, False)
        x = torch.randn(2, 3, 100, generator=generator)
        bias = torch.randn(48, generator=generator)
        add = torch.randn(2, 3, 48, generator=generator)
        terms = {"bias": bias, "add": add}
        yield Sample(f"bias-add-{kind[0]}", (x, weight, 0.5), terms)
        yield Sample(f"none-active-{kind[0]}", (x, weight, 100.0), terms)
    yield Sample("no-rows", (x[:0], weight, 0.5))
    yield Sample("vector", (x[0, 0], weight, 0.5))
    yield Sample("strided", (torch.randn(100, 2, generator=generator).T, weight, 0.5))
    bad = torch.randn(2, 100, generator=generator)
    bad[0, 5] = float("nan")
    yield Sample("nan", (bad, make_column_weight(48, 100, "float32"), 0.5))


def _rejects() -> Iterator[Reject]:
    floats = make_column_weight(40, 100, "float32")
    codes = make_column_weight(40, 100, "w4", 32, False)
    x = torch.randn(2, 100)
    scales, zeros = codes.scales, codes.zeros
    assert scales is not None
    assert zeros is not None
    yield Reject("threshold", (x, floats, -1.0), {}, "threshold must be at least 0, got -1")
    nan = float("nan")
    yield Reject("nan", (x, floats, nan), {}, "threshold must be at least 0, got nan")
    yield Reject("n", (x, replace(floats, n=49), 0.5), {}, "columns must have shape [100, 64]")
    text = "columns must have shape [100, 1, 64], got [100, 2, 64]"
    two = codes.columns.repeat(1, 2, 1)
    yield Reject("codes", (x, replace(codes, columns=two), 0.5), {}, text)
    half = replace(floats, columns=floats.columns.half())
    yield Reject("floats", (x, half, 0.5), {}, "columns must be float32 or bfloat16, got float16")
    given = replace(floats, scales=scales)
    yield Reject("scales", (x, given, 0.5), {}, "scales and zeros must be None for columns of")
    yield Reject("no scales", (x, replace(codes, scales=None), 0.5), {}, "scales must be a tensor")
    few = replace(codes, scales=scales[:, :40])
    yield Reject("few scales", (x, few, 0.5), {}, "scales must have shape [4, 128], got [4, 40]")
    few = replace(codes, zeros=zeros[:3])
    yield Reject("few zeros", (x, few, 0.5), {}, "zeros must have shape [4, 128], got [3, 128]")
    yield Reject("group", (x, replace(codes, group_size=48), 0.5), {}, "group_size must be 16, 32")
    yield Reject("group k", (x, replace(floats, group_size=32), 0.5), {}, "group_size must be k = ")
    yield Reject("dtype", (x.double(), floats, 0.5), {}, "x must be float32, bfloat16 or float16")
    yield Reject("k", (x[:, :99], floats, 0.5), {}, "last dimension k = 100 (from weight)")
    bias = {"bias": torch.ones(47)}
    yield Reject("bias", (x, floats, 0.5), bias, "bias must have shape [40], got [47]")
    yield Reject("add", (x, floats, 0.5), {"add": x}, "add must have shape [2, 40]")


def _raw(sample: Sample) -> tuple[Any, ...]:
    x, w, threshold = sample.args[:3]
    terms = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    numbers = (w.layout_id, w.n, w.k, w.group_size)
    return (x, w.columns, w.scales, w.zeros, *terms, threshold, *numbers)


def round_trip(codes: Tensor, bits: int) -> Tensor:
    """``unpack_code_columns(pack_code_columns(...))``, whose reference is the identity."""
    columns = torch.ops.openwork.pack_code_columns(codes, bits)
    unpacked: Tensor = torch.ops.openwork.unpack_code_columns(columns, bits, codes.shape[0])
    return unpacked


def _round_trip_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)
    for bits in (2, 3, 4, 8):
        for n, k in ((1, 1), (64, 3), (129, 20), (161, 5), (300, 7)):
            codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
            yield Sample(f"w{bits}-{n}x{k}", (codes, bits))
    yield Sample("strided", (codes.T, bits))


def _round_trip_rejects() -> Iterator[Reject]:
    codes = torch.full((4, 32), 15, dtype=torch.uint8)
    yield Reject("bits", (codes, 5), {}, "bits must be 2, 3, 4 or 8, got 5")
    yield Reject("dtype", (codes.int(), 4), {}, "codes must be uint8, got int32")
    yield Reject("rank", (codes[0], 4), {}, "codes must be [n, k], got [32]")
    yield Reject("empty", (codes[:0], 4), {}, "at least one row and one column")
    text = "codes must be in 0 .. 3 for 2 bits, got 15"
    yield Reject("range", (codes, 2), {}, text, of_values=True)


@lru_cache(maxsize=1)
def _master(n: int, k: int, kind: str, group_size: int) -> ColumnWeight:
    return make_column_weight(n, k, kind, group_size)


def _workload(params: Mapping[str, Any]) -> Workload:
    def make() -> Sample:
        p = params
        weight = _master(p["n"], p["k"], p["format"], p["group_size"])
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(p["m"], p["k"], generator=generator).to(getattr(torch, p["dtype"]))
        threshold = float(x.abs().float().quantile(1.0 - p["density"]))
        return Sample("workload", (x, weight.in_huge_pages(), threshold))

    return Workload(params, make)


def _workloads() -> Iterator[Workload]:
    for kind in ("float32", "bfloat16", "w8", "w4", "w3"):
        for density in (0.5, 0.25):
            shape = {"m": 1, "n": 4096, "k": 4096, "density": density, "format": kind}
            yield _workload({**shape, "group_size": 128, "dtype": "float32"})


def _cost(params: Mapping[str, Any]) -> Cost:
    m, n, k = params["m"], params["n"], params["k"]
    active = round(k * params["density"])
    kind = params["format"]
    if kind.startswith("w"):
        column = -(-n // strip_outputs(int(kind[1:]))) * 64
        scales = n * -(-k // params["group_size"]) * 4
    else:
        column, scales = n * getattr(torch, kind).itemsize, 0
    size = getattr(torch, params["dtype"]).itemsize
    moved = m * (active * column + scales + (n + k) * size)
    return Cost(moved, 2 * m * n * active, "fp32")


CASES = (
    OpCase(
        "active_linear",
        active_linear,
        active_linear_reference,
        _tolerance,
        raw=_raw,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
        workloads=tuple(_workloads()),
        cost=_cost,
    ),
    OpCase(
        "pack_code_columns",
        round_trip,
        lambda codes, bits: codes,
        lambda sample, expected: (0.0,),
        raw=lambda s: s.args,
        samples=lambda: list(_round_trip_samples()),
        rejects=lambda: list(_round_trip_rejects()),
    ),
)
