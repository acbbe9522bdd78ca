"""Unstructured sparse linear: the slow truth, small nasty calls, and the shapes of real layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.sparse import BYTES_DENSITY, TAGS, compress_sparse, expand_sparse, sparse_linear
from ..packing import SPARSE_LAYOUTS, SparseWeight, sparse_padding
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Workload


def dense_weight(weight: SparseWeight) -> Tensor:
    """What the stored values stand for, ``[n, k]`` float64."""
    w = expand_sparse(weight).double()
    return w if weight.scales is None else w * weight.scales.double()[:, None]


def stored_of(weight: SparseWeight) -> Tensor:
    """Where elements are stored, ``[n, k]`` bool."""
    ones = torch.ones(weight.values.numel())
    return expand_sparse(replace(weight, values=ones, scales=None)) != 0


def sparse_linear_reference(
    x: Tensor, weight: SparseWeight, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """``x @ w.T + bias + add`` in float64, over stored elements only."""
    w = dense_weight(weight)
    if x.isfinite().all():
        y = x.double() @ w.T
    else:
        y = torch.where(stored_of(weight), x.double()[..., None, :] * w, 0.0).sum(dim=-1)
    if bias is not None:
        y = y + bias.double()
    if add is not None:
        y = y + add.double()
    return y


def product_tolerance(
    x: Tensor, w: Tensor, expected: Tensor, operands: tuple[Tensor | None, ...], terms: int
) -> Tensor:
    """Rounding of an fp32 sum of up to ``terms`` products, then of the result.

    Each of the sum's roundings, and a scale, bias and add, is at most one unit of
    ``sum_k |x||w|``; a result is rounded once to its dtype. An x that is not finite makes no
    bound: what it reaches must be equal.
    """
    magnitude = torch.where(x.isfinite(), x.double().abs(), 0.0) @ w.abs().T
    extra = sum(t.double().abs() for t in operands if t is not None)
    inner = (terms + 4) * EPS[torch.float32] * (magnitude + extra) + terms * TINY[torch.float32]
    return inner + EPS[x.dtype] * (expected.abs() + inner) + TINY[x.dtype] * EPS[x.dtype]


def linear_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    x, weight = sample.args[:2]
    operands = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    w = dense_weight(weight)
    return (product_tolerance(x, w, expected[0], operands, weight.k),)


def make_sparse_weight(
    n: int,
    k: int,
    density: float,
    dtype: torch.dtype,
    seed: int = 0,
    scaled: bool = False,
    layout: str | None = None,
) -> SparseWeight:
    """Random elements of a normal (or int8) matrix."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        weight = torch.randn(n, k, generator=generator).to(dtype)
    mask = torch.rand(n, k, generator=generator) < density
    scales = torch.rand(n, generator=generator) + 0.5 if scaled else None
    return compress_sparse(weight, mask, scales, layout)


# (m, n, k, density): 1s, primes, one less and one more than each tile, empty and full.
SHAPES = (
    (1, 1, 1, 1.0),
    (1, 33, 130, 0.5),
    (2, 16, 64, 0.0),
    (3, 31, 63, 1.0),
    (7, 17, 129, 0.25),
    (16, 40, 257, 0.1),
    (17, 65, 200, 0.5),
    (33, 15, 300, 0.02),
    (64, 48, 65, 0.75),
    (130, 50, 100, 0.3),
    (193, 20, 127, 0.5),
)
_VALUES = ((torch.float32, False), (torch.bfloat16, False), (torch.int8, True))


def _linear_samples() -> Iterator[Sample]:
    for layout in SPARSE_LAYOUTS:
        for sample in _layout_samples(layout):
            yield replace(sample, name=f"{layout.partition('_')[0]}-{sample.name}")


def _layout_samples(layout: str) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)
    for i, (m, n, k, density) in enumerate(SHAPES):
        for j, (values, scaled) in enumerate(_VALUES):
            dtype = list(EPS)[(i + j) % 3]
            weight = make_sparse_weight(n, k, density, values, scaled=scaled, layout=layout)
            x = torch.randn(m, k, generator=generator).to(dtype)
            name = f"{m}x{n}x{k}-{density}-{str(values)[6:]}-{str(dtype)[6:]}"
            yield Sample(name, (x, weight))
    weight = make_sparse_weight(48, 100, 0.5, torch.float32, scaled=True, layout=layout)
    x = torch.randn(2, 3, 100, generator=generator)
    bias = torch.randn(48, generator=generator)
    add = torch.randn(2, 3, 48, generator=generator)
    yield Sample("bias-add", (x, weight), {"bias": bias, "add": add})
    many = torch.randn(40, 100, generator=generator)
    wide = torch.randn(40, 48, generator=generator)
    yield Sample("bias-add-many", (many, weight), {"bias": bias, "add": wide})
    yield Sample("no-rows", (x[:0], weight))
    yield Sample("vector", (x[0, 0], weight))
    yield Sample("strided", (torch.randn(100, 5, generator=generator).T, weight))
    yield Sample("large", (x * 1e30, weight))
    bad = torch.randn(20, 100, generator=generator)
    bad[0, 3], bad[1, 7], bad[18, 50] = float("inf"), float("nan"), -float("inf")
    yield Sample("not-finite-few", (bad[:2], weight))
    yield Sample("not-finite-many", (bad, weight))


def pattern_rejects(weight: SparseWeight) -> Iterator[tuple[str, SparseWeight, str, bool]]:
    """(name, broken weight, message, whether only its values are wrong)."""

    def broken(**changes: Any) -> SparseWeight:
        return replace(weight, **changes)

    low, high = weight.offsets.clone(), weight.offsets.clone()
    low[1, 0], high[2, -1] = -1, weight.nnz + 1
    outside = f"offsets must be in 0 .. {weight.nnz} (nnz), got one outside"
    yield "offset below", broken(offsets=low), outside, True
    yield "offset above", broken(offsets=high), outside, True
    blocks = weight.offsets.shape[1]
    want = [5, blocks, 16] if weight.index.dim() == 3 else [weight.index.numel() + 64 * blocks]
    shape = f"index must have shape {want}, got {list(weight.index.shape)}"
    yield "n", broken(n=80), shape, False
    index = "index must be int64" if weight.index.dim() == 3 else "index must be uint8"
    yield "index", broken(index=weight.index.int()), f"{index}, got int32", False
    offsets = f"offsets must have shape [3, {blocks}]"
    yield "offsets", broken(offsets=weight.offsets[:2]), offsets, False
    padding = sparse_padding(weight.layout)
    few = broken(values=weight.values[: padding - 1])
    yield "values", few, f"values must be [nnz + {padding}]", False
    yield "values dtype", broken(values=weight.values.half()), "values must be float32", False


def _linear_rejects() -> Iterator[Reject]:
    x = torch.randn(2, 100)
    for layout in SPARSE_LAYOUTS:
        weight = make_sparse_weight(48, 100, 0.5, torch.float32, layout=layout)
        for name, broken, message, of_values in pattern_rejects(weight):
            kind = layout.partition("_")[0]
            yield Reject(f"{kind} {name}", (x, broken), {}, message, of_values)
    scales = replace(weight, scales=torch.ones(47))
    yield Reject("scales", (x, scales), {}, "scales must have shape [48], got [47]")
    yield Reject("dtype", (x.double(), weight), {}, "x must be float32, bfloat16 or float16")
    yield Reject("k", (x[:, :99], weight), {}, "last dimension k = 100 (from weight), got [2, 99]")
    yield Reject("bias", (x, weight), {"bias": torch.ones(47)}, "bias must have shape [48]")
    yield Reject("add", (x, weight), {"add": x}, "add must have shape [2, 48], got [2, 100]")


def pattern_numbers(w: SparseWeight) -> tuple[int, int, int]:
    return (w.layout_id, w.n, w.k)


def _raw_linear(sample: Sample) -> tuple[Any, ...]:
    x, w = sample.args[:2]
    terms = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    return (x, w.index, w.offsets, w.values, w.scales, *terms, *pattern_numbers(w))


def round_trip(weight: Tensor, mask: Tensor | None = None, layout: str | None = None) -> Tensor:
    """``expand_sparse(compress_sparse(...))``, whose reference keeps what the mask says."""
    return expand_sparse(compress_sparse(weight, mask, layout=layout))


def _round_trip_reference(
    weight: Tensor, mask: Tensor | None = None, layout: str | None = None
) -> Tensor:
    return weight if mask is None else weight * mask


def _round_trip_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)
    for n, k in ((1, 1), (16, 64), (17, 65), (33, 200), (20, 520)):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            weight = (3 * torch.randn(n, k, generator=generator)).to(dtype)
            mask = torch.rand(n, k, generator=generator) < 0.5
            for layout in SPARSE_LAYOUTS:
                name = f"{layout.partition('_')[0]}-{n}x{k}-{str(dtype)[6:]}"
                yield Sample(name, (weight * mask,), {"layout": layout})
                yield Sample(f"{name}-mask", (weight, mask), {"layout": layout})
    yield Sample("strided", (weight.T, mask.T))
    yield Sample("nothing", (torch.zeros(5, 70),))


def _round_trip_rejects() -> Iterator[Reject]:
    weight = torch.ones(4, 32)
    yield Reject("dtype", (weight.half(), None), {}, "weight must be float32, bfloat16 or int8")
    yield Reject("rank", (weight[0], None), {}, "weight must be [n, k], got [32]")
    yield Reject("empty", (weight[:0], None), {}, "at least one row and one column")
    yield Reject("mask", (weight, weight), {}, "mask must be bool, got float32")
    yield Reject("mask shape", (weight, weight[:, :5] > 0), {}, "mask must have shape [4, 32]")


def _raw_round_trip(sample: Sample) -> tuple[Any, ...]:
    weight, mask = (*sample.args, None)[:2]
    layout = sample.kwargs.get("layout", SPARSE_LAYOUTS[0])
    nnz = int(torch.count_nonzero(weight if mask is None else mask))
    return (weight, mask, nnz, TAGS.index(layout))


@lru_cache(maxsize=1)
def _master(n: int, k: int, density: float, values: str) -> SparseWeight:
    return make_sparse_weight(n, k, density, getattr(torch, values), scaled=values == "int8")


def _workload(params: Mapping[str, Any]) -> Workload:
    def make() -> Sample:
        weight = _master(params["n"], params["k"], params["density"], params["format"])
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(params["m"], params["k"], generator=generator)
        args = (x.to(getattr(torch, params["dtype"])), weight.in_huge_pages())
        return Sample("workload", args)

    return Workload(params, make)


def _linear_workloads() -> Iterator[Workload]:
    for values in ("float32", "bfloat16", "int8"):
        for m in (1, 16, 128, 512):
            # The densities above a half only where the curve against dense is wanted.
            for density in (0.5, 0.25, 0.1, 0.05, *((0.75, 0.9) if values == "float32" else ())):
                params = {"m": m, "n": 4096, "k": 4096, "density": density, "format": values}
                yield _workload({**params, "dtype": "float32"})


def _linear_cost(params: Mapping[str, Any]) -> Cost:
    m, n, k = params["m"], params["n"], params["k"]
    stored = round(n * k * params["density"])
    # An index and offsets of 4 bytes a block.
    few = params["density"] <= BYTES_DENSITY
    index = stored + n * k * 36 // 4096 if few else n * k // 8 + n * k // 256
    weight = stored * getattr(torch, params["format"]).itemsize + index
    moved = weight + m * (n + k) * getattr(torch, params["dtype"]).itemsize
    return Cost(moved, 2 * m * stored, "fp32")


CASES = (
    OpCase(
        "sparse_linear",
        sparse_linear,
        sparse_linear_reference,
        linear_tolerance,
        raw=_raw_linear,
        samples=lambda: list(_linear_samples()),
        rejects=lambda: list(_linear_rejects()),
        workloads=tuple(_linear_workloads()),
        cost=_linear_cost,
    ),
    OpCase(
        "compress_sparse",
        round_trip,
        _round_trip_reference,
        lambda sample, expected: (0.0,),
        raw=_raw_round_trip,
        samples=lambda: list(_round_trip_samples()),
        rejects=lambda: list(_round_trip_rejects()),
    ),
)
