"""Block-sparse linear: the slow truth, small nasty calls, and the shapes of real layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.block_sparse import compress_block_sparse, expand_block_sparse
from ..ops.sparse import sparse_linear
from ..packing import BlockSparseWeight
from .case import EPS, Cost, OpCase, Reject, Sample, Workload
from .sparse import product_tolerance


def _weight(weight: BlockSparseWeight) -> Tensor:
    """``[n, k]`` float64, with its scales."""
    w = expand_block_sparse(weight).double()
    return w if weight.scales is None else w * weight.scales.double()[:, None]


def block_sparse_linear_reference(
    x: Tensor, weight: BlockSparseWeight, bias: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """``x @ (scales * w).T + bias + add`` in float64."""
    y = x.double() @ _weight(weight).T
    if bias is not None:
        y = y + bias.double()
    if add is not None:
        y = y + add.double()
    return y


def _linear_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    x, weight = sample.args[:2]
    operands = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    w = _weight(weight)
    return (product_tolerance(x, w, expected[0], operands, weight.k),)


def make_block_sparse_weight(
    n: int, k: int, block: int, density: float, dtype: torch.dtype, seed: int = 0
) -> BlockSparseWeight:
    """Random blocks of a normal matrix, or of int8 codes with scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = None
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
        scales = torch.rand(n, generator=generator) + 0.5
    else:
        weight = torch.randn(n, k, generator=generator).to(dtype)
    mask = torch.rand(-(-n // block), -(-k // block), generator=generator) < density
    return compress_block_sparse(weight, block, mask, scales)


# (m, n, k, density): 1s, primes, around the tiles of 6 and 14 rows, empty and full.
_SHAPES = (
    (1, 1, 1, 1.0),
    (2, 33, 130, 0.5),
    (3, 64, 64, 0.0),
    (5, 31, 63, 1.0),
    (6, 130, 129, 0.5),
    (9, 200, 257, 0.25),
    (14, 96, 160, 0.5),
    (15, 65, 200, 0.7),
    (43, 70, 100, 0.5),
)


_VALUES = (torch.float32, torch.bfloat16, torch.int8)


def _linear_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)
    for i, (m, n, k, density) in enumerate(_SHAPES):
        for j, block in enumerate((16, 32, 64)):
            values = _VALUES[(i + i // 3 + j) % 3]
            dtype = list(EPS)[(i + j) % 3]
            weight = make_block_sparse_weight(n, k, block, density, values)
            x = torch.randn(m, k, generator=generator).to(dtype)
            name = f"{m}x{n}x{k}-{density}-b{block}-{str(values)[6:]}-{str(dtype)[6:]}"
            yield Sample(name, (x, weight))
    weight = make_block_sparse_weight(48, 100, 32, 0.5, torch.float32)
    x = torch.randn(2, 3, 100, generator=generator)
    bias = torch.randn(48, generator=generator)
    add = torch.randn(2, 3, 48, generator=generator)
    for values in _VALUES:
        typed = make_block_sparse_weight(48, 100, 32, 0.5, values)
        terms = {"bias": bias, "add": add}
        yield Sample(f"bias-add-{str(values)[6:]}", (x, typed), terms)
    yield Sample("no-rows", (x[:0], weight))
    yield Sample("vector", (x[0, 0], weight))
    yield Sample("strided", (torch.randn(100, 5, generator=generator).T, weight))


def _linear_rejects() -> Iterator[Reject]:
    weight = make_block_sparse_weight(48, 100, 32, 0.7, torch.float32)
    x = torch.randn(2, 100)

    def broken(**changes: Any) -> BlockSparseWeight:
        return replace(weight, **changes)

    blocks = weight.indices.numel()
    falls, far = weight.indptr.clone(), weight.indices.clone()
    falls[1] = blocks + 1
    far[-1] = 4
    rises = f"indptr must rise from 0 to {blocks} (blocks), got other values"
    yield Reject("indptr falls", (x, broken(indptr=falls)), {}, rises, of_values=True)
    yield Reject("indptr begins", (x, broken(indptr=falls + 1)), {}, rises, of_values=True)
    inside = "indices must be in 0 .. 3, got one outside"
    yield Reject("index above", (x, broken(indices=far)), {}, inside, of_values=True)
    yield Reject("index below", (x, broken(indices=far - 5)), {}, inside, of_values=True)
    yield Reject("n", (x, broken(n=80)), {}, "indptr must have shape [4], got [3]")
    layout = broken(layout="blocks_n16k16@1")
    yield Reject("layout", (x, layout), {}, "indptr must have shape [4], got [3]")
    few = broken(indices=weight.indices[:-1])
    yield Reject("indices", (x, few), {}, f"values must have shape [{blocks - 1}, 32, 32]")
    half = broken(values=weight.values.half())
    yield Reject("values", (x, half), {}, "values must be float32, bfloat16 or int8, got float16")
    few = broken(scales=torch.ones(47))
    yield Reject("scales", (x, few), {}, "scales must have shape [48], got [47]")
    half = broken(scales=torch.ones(48).half())
    yield Reject("scales dtype", (x, half), {}, "scales must be float32, got float16")
    yield Reject("dtype", (x.double(), weight), {}, "x must be float32, bfloat16 or float16")
    yield Reject("k", (x[:, :99], weight), {}, "last dimension k = 100 (from weight), got [2, 99]")
    yield Reject("bias", (x, weight), {"bias": torch.ones(47)}, "bias must have shape [48]")
    yield Reject("add", (x, weight), {"add": x}, "add must have shape [2, 48], got [2, 100]")


def _raw_linear(sample: Sample) -> tuple[Any, ...]:
    x, w = sample.args[:2]
    terms = (sample.kwargs.get("bias"), sample.kwargs.get("add"))
    return (x, w.indptr, w.indices, w.values, w.scales, *terms, w.layout_id, w.n, w.k)


def round_trip(weight: Tensor, block: int, mask: Tensor | None = None) -> Tensor:
    """``expand_block_sparse(compress_block_sparse(...))``."""
    return expand_block_sparse(compress_block_sparse(weight, block, mask))


def _round_trip_reference(weight: Tensor, block: int, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return weight
    n, k = weight.shape
    each = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return weight * each[:n, :k]


def _round_trip_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)
    for n, k in ((1, 1), (64, 64), (17, 65), (70, 200)):
        for i, block in enumerate((16, 32, 64)):
            weight = (8 * torch.randn(n, k, generator=generator)).to(_VALUES[i])
            mask = torch.rand(-(-n // block), -(-k // block), generator=generator) < 0.5
            yield Sample(f"{n}x{k}-b{block}-mask", (weight, block, mask))
            kept = _round_trip_reference(weight, block, mask)
            yield Sample(f"{n}x{k}-b{block}", (kept, block))
    yield Sample("strided", (weight.T, 16))


def _round_trip_rejects() -> Iterator[Reject]:
    weight, mask = torch.ones(40, 32), torch.ones(2, 1, dtype=torch.bool)
    text = "weight must be float32, bfloat16 or int8, got float16"
    yield Reject("dtype", (weight.half(), 32, mask), {}, text)
    yield Reject("rank", (weight[0], 32, mask), {}, "weight must be [n, k], got [32]")
    yield Reject("block", (weight, 24, mask), {}, "block must be 16, 32 or 64, got 24")
    yield Reject("mask", (weight, 32, mask.int()), {}, "mask must be bool, got int32")
    yield Reject("mask shape", (weight, 32, mask[:1]), {}, "mask must have shape [2, 1]")


def _raw_round_trip(sample: Sample) -> tuple[Any, ...]:
    weight, block, mask = (*sample.args, None)[:3]
    if mask is None:
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight != 0, (0, -k % block, 0, -n % block))
        mask = padded.unfold(0, block, block).unfold(1, block, block).flatten(2).any(2)
    return (weight, mask, block, int(torch.count_nonzero(mask)))


@lru_cache(maxsize=1)
def _master(n: int, k: int, block: int, density: float, values: str) -> BlockSparseWeight:
    return make_block_sparse_weight(n, k, block, density, getattr(torch, values))


def _workload(params: Mapping[str, Any]) -> Workload:
    def make() -> Sample:
        p = params
        weight = _master(p["n"], p["k"], p["block"], p["density"], p["format"])
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(p["m"], p["k"], generator=generator).to(getattr(torch, p["dtype"]))
        return Sample("workload", (x, weight.in_huge_pages()))

    return Workload(params, make)


def _linear_workloads() -> Iterator[Workload]:
    for values in ("float32", "bfloat16", "int8"):
        for m in (1, 16, 128, 512):
            shape = {"m": m, "n": 4096, "k": 4096, "block": 32, "density": 0.25}
            yield _workload({**shape, "format": values, "dtype": "float32"})


def _linear_cost(params: Mapping[str, Any]) -> Cost:
    m, n, k, block = params["m"], params["n"], params["k"], params["block"]
    stored = round(n * k * params["density"])
    size = getattr(torch, params["format"]).itemsize
    weight = stored * size + stored // block**2 * 4
    moved = weight + m * (n + k) * getattr(torch, params["dtype"]).itemsize
    return Cost(moved, 2 * m * stored, "fp32")


CASES = (
    OpCase(
        "block_sparse_linear",
        sparse_linear,
        block_sparse_linear_reference,
        _linear_tolerance,
        raw=_raw_linear,
        samples=lambda: list(_linear_samples()),
        rejects=lambda: list(_linear_rejects()),
        workloads=tuple(_linear_workloads()),
        cost=_linear_cost,
    ),
    OpCase(
        "compress_block_sparse",
        round_trip,
        _round_trip_reference,
        lambda sample, expected: (0.0,),
        raw=_raw_round_trip,
        samples=lambda: list(_round_trip_samples()),
        rejects=lambda: list(_round_trip_rejects()),
    ),
)
