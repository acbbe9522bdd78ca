"""N:M sparse linear: the slow truth, small nasty calls, and the shapes of real layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.nm import compress_nm, expand_nm, nm_linear
from ..ops.nm_mask import nm_mask
from ..packing import NmWeight
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Unit, Workload
from .lowbit import dequantize, quantize_rows_reference

BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
INTS = ("int8", "int4")


def expand_reference(weight: NmWeight) -> Tensor:
    """The weight as ``[n, k]`` float64."""
    dense, scales = expand_nm(weight)
    if scales is None:
        return dense.double()
    return dequantize(dense, scales, None, weight.bits, weight.group_size)


def nm_linear_reference(
    x: Tensor,
    weight: NmWeight,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    compute: str = "float",
) -> Tensor:
    """``x @ expand(weight).T + bias + add`` in float64; int8 rounds x first."""
    w = expand_reference(weight)
    if compute == "int8":
        codes, scales = quantize_rows_reference(x)
        y = (codes.double() @ w.T) * scales.double()[..., None]
    else:
        y = x.double() @ w.T
    for term in (bias, add):
        if term is not None:
            y = y + term.double()
    return y


def nm_linear_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Rounding of the fp32 sums, then of the result.

    A sum of s kept weights is at most s roundings of ``sum |x w|``, in any order; applying a scale
    is one each, combining the parts of a sum and the terms less than 8, and scaling int8 sums two a
    group. int8 codes of x are at most half a step, 1/254 of the largest, above x.
    """
    x, weight = sample.args[:2]
    w = expand_reference(weight).abs()
    size = x.double().abs()
    if sample.kwargs.get("compute") == "int8" and x.numel():
        size = size + size.amax(dim=-1, keepdim=True) / 254
    operands = (*sample.args[2:], sample.kwargs.get("bias"), sample.kwargs.get("add"))
    extra = sum(t.double().abs() for t in operands if t is not None)
    kept, block = weight.pattern
    roundings = -(-weight.k // block) * kept + 2 * weight.groups + 8
    inner = roundings * EPS[torch.float32] * (size @ w.T + extra)
    outer = EPS[x.dtype] * (expected[0].abs() + inner) + TINY[x.dtype] * EPS[x.dtype]
    return (inner + outer,)


def make_weight(
    n: int,
    k: int,
    pattern: tuple[int, int],
    dtype: str,
    *,
    vector: int = 1,
    group_size: int = 128,
    scales: torch.dtype = torch.float16,
    seed: int = 0,
) -> NmWeight:
    """Random values that a random mask keeps; scales are in 0.5 .. 1.5."""
    generator = torch.Generator().manual_seed(seed)
    # One random number for all rows that share an index.
    order = torch.rand(-(-n // vector), k, generator=generator).repeat_interleave(vector, 0)[:n]
    mask = nm_mask(order, pattern)
    if dtype not in INTS:
        weight = torch.randn(n, k, generator=generator).to(getattr(torch, dtype))
        return compress_nm(weight, pattern, mask=mask, vector=vector)
    bits = BITS[dtype]
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
    grid = torch.rand(n, -(-k // group_size), generator=generator) + 0.5
    return compress_nm(
        codes,
        pattern,
        mask=mask,
        vector=vector,
        scales=grid.to(scales),
        bits=bits,
        group_size=group_size,
    )


# (m, n, k): 1s, primes, one less and one more than a panel (16), a unit (64 columns of 2:4), a
# vector and a panel of tokens (8, 16, 64, 128), the sums a kernel keeps (256 outputs).
_SHAPES = (
    (1, 1, 1),
    (1, 17, 37),
    (2, 16, 64),
    (3, 33, 65),
    (5, 47, 129),
    (8, 64, 257),
    (9, 31, 300),
    (17, 257, 130),
    (131, 20, 96),
)
_PATTERNS = ((2, 4), (1, 4), (3, 4), (4, 8), (1, 8), (7, 16), (1, 16), (5, 32), (1, 32), (31, 32))
_VECTORS = (1, 8, 16, 32)


def _linear_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)
    types = tuple(EPS)
    for i, pattern in enumerate(_PATTERNS):
        for j, (m, n, k) in enumerate(_SHAPES):
            # Steps that share no factor walk through all combinations.
            vector = _VECTORS[(i + j) % 4]
            dtype = tuple(BITS)[(i + 3 * j) % 4]
            x_type = types[(i + j) % 3]
            group_size = (32, 64, 128, k)[(2 * i + j) % 4]
            weight = make_weight(
                n, k, pattern, dtype, vector=vector, group_size=group_size, scales=types[j % 3]
            )
            x = torch.randn(m, k, generator=generator).to(x_type)
            for compute in ("float", "int8") if dtype in INTS else ("float",):
                name = (
                    f"{compute}-{pattern[0]}:{pattern[1]}-v{vector}-{dtype}-{m}x{n}x{k}"
                    f"-g{group_size}-{str(x_type)[6:]}"
                )
                yield Sample(name, (x, weight), {"compute": compute})
    for vector in _VECTORS:
        for m in (9, 31, 70, 131):
            weight = make_weight(49, 600, (2, 4), "bfloat16", vector=vector)
            x = torch.randn(m, 600, generator=generator).bfloat16()
            yield Sample(f"bfloat16-v{vector}-{m}-rows", (x, weight))
    for dtype in BITS:
        weight = make_weight(33, 160, (2, 4), dtype, group_size=32)
        for m in (1, 2, 3, 4, 7, 12):
            x = torch.randn(m, 160, generator=generator)
            for compute in ("float", "int8") if dtype in INTS else ("float",):
                yield Sample(f"{compute}-{dtype}-{m}-rows", (x, weight), {"compute": compute})
    weight = make_weight(48, 64, (2, 4), "int4", group_size=32)
    x = torch.randn(2, 3, 64, generator=generator)
    bias = torch.randn(48, generator=generator)
    add = torch.randn(2, 3, 48, generator=generator)
    yield Sample("bias-add", (x, weight), {"bias": bias, "add": add})
    yield Sample("bias-add-int8", (x, weight), {"bias": bias, "add": add, "compute": "int8"})
    many = torch.randn(20, 64, generator=generator)
    yield Sample("add-many-rows", (many, weight), {"add": torch.ones(20, 48)})
    yield Sample("no-rows", (x[:0], weight))
    yield Sample("vector", (x[0, 0], weight))
    yield Sample("strided", (torch.randn(64, 5, generator=generator).T, weight))
    yield Sample("zero-row", (torch.zeros(3, 64), weight), {"compute": "int8"})
    empty = compress_nm(torch.zeros(17, 40), (2, 4))
    yield Sample("nothing-kept", (torch.randn(3, 40, generator=generator), empty))


def _linear_rejects() -> Iterator[Reject]:
    weight = make_weight(48, 64, (2, 4), "int8", group_size=32)
    floats = make_weight(48, 64, (2, 4), "float32")
    scales = torch.ones(2, 2, 16)
    x = torch.randn(2, 64)

    def broken(**changes: Any) -> NmWeight:
        return replace(weight, **changes)

    yield Reject("dtype", (x.double(), weight), {}, "x must be float32, bfloat16 or float16")
    yield Reject("k", (x[:, :63], weight), {}, "last dimension k = 64 (from weight), got [2, 63]")
    yield Reject("bias", (x, weight, torch.ones(47)), {}, "bias must have shape [48], got [47]")
    yield Reject("add", (x, weight, None, x), {}, "add must have shape [2, 48], got [2, 64]")
    yield Reject("n", (x, broken(n=80)), {}, "values must have shape [5, 1, 8, 16, 4]")
    yield Reject("layout", (x, broken(layout="nm4_n16k8@1")), {}, "values must be uint8, got int8")
    yield Reject(
        "pattern", (x, broken(pattern=(3, 7))), {}, "M = 4, 8, 16 or 32 and N = 1 .. M - 1, got 3:7"
    )
    yield Reject("all kept", (x, broken(pattern=(4, 4))), {}, "N = 1 .. M - 1, got 4:4")
    yield Reject("shared", (x, broken(vector=8)), {}, "index must have shape [3, 1, 2, 2, 4]")
    yield Reject("no vector", (x, broken(vector=4)), {}, "vector must be 1, 8, 16 or 32, got 4")
    yield Reject("index", (x, broken(index=weight.index.char())), {}, "index must be uint8")
    yield Reject("scales", (x, broken(scales=scales)), {}, "scales must have shape [3, 2, 16]")
    yield Reject("no scales", (x, broken(scales=None)), {}, "scales must be a tensor for values of")
    yield Reject(
        "scaled floats",
        (x, replace(floats, scales=scales)),
        {},
        "scales must be None for values of 16 and 32 bits",
    )
    yield Reject("group", (x, broken(group_size=48)), {}, "group_size must be 32, 64, 128 or k")
    yield Reject("float group", (x, replace(floats, group_size=32)), {}, "group_size must be k")
    yield Reject(
        "compute", (x, floats), {"compute": "int8"}, "compute must be 0 (float) for values of 16"
    )


def _compress_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)
    for i, pattern in enumerate(_PATTERNS):
        for j, (n, k) in enumerate(((1, 1), (33, 37), (17, 100), (70, 144))):
            vector = _VECTORS[(i + j) % 4]
            dtype = tuple(BITS)[(i + 2 * j) % 4]
            bits = BITS[dtype]
            group_size = (32, 64, 128, k)[(i + j) % 4]
            order = torch.rand(n, k, generator=generator)
            order = order[::vector].repeat_interleave(vector, 0)[:n]
            mask = nm_mask(order, pattern)
            name = f"{pattern[0]}:{pattern[1]}-v{vector}-{dtype}-{n}x{k}"
            common = {"pattern": pattern, "vector": vector}
            if dtype not in INTS:
                weight = torch.randn(n, k, generator=generator).to(getattr(torch, dtype))
                yield Sample(name, (weight,), {**common, "mask": mask})
                yield Sample(f"{name}-zeros", (weight * mask,), common)
                continue
            codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
            grid = torch.rand(n, -(-k // group_size), generator=generator).half()
            options = {**common, "scales": grid, "bits": bits, "group_size": group_size}
            yield Sample(name, (codes,), {**options, "mask": mask})
            zeroed = torch.where(mask, codes, 2 ** (bits - 1))
            yield Sample(f"{name}-zeros", (zeroed,), options)
    yield Sample("strided", (torch.eye(8)[:, ::2].T,), {"pattern": (1, 4)})


def _compress_rejects() -> Iterator[Reject]:
    weight = torch.zeros(20, 32)
    codes = torch.full((20, 32), 8, dtype=torch.uint8)
    ints = {"scales": torch.ones(20, 1), "bits": 4, "group_size": 32}
    yield Reject("dtype", (weight.double(),), {}, "weight must be float32, got float64")
    yield Reject("codes", (codes,), {}, "weight must be float32, got uint8")
    yield Reject("bits", (codes,), {**ints, "bits": 5}, "bits must be 4, 8, 16 or 32, got 5")
    yield Reject("rank", (weight[0],), {}, "weight must be [n, k], got [32]")
    yield Reject("empty", (weight[:0],), {}, "at least one row and one column")
    yield Reject("pattern", (weight, (2, 6)), {}, "M = 4, 8, 16 or 32 and N = 1 .. M - 1, got 2:6")
    yield Reject("vector", (weight,), {"vector": 2}, "vector must be 1, 8, 16 or 32, got 2")
    yield Reject("mask", (weight,), {"mask": weight}, "mask must be bool, got float32")
    mask = torch.zeros(20, 32, dtype=torch.bool)
    yield Reject("mask shape", (weight,), {"mask": mask[:1]}, "mask must have shape [20, 32]")
    yield Reject("no scales", (codes,), {"bits": 4}, "scales must be a tensor")
    yield Reject("group", (codes,), {**ints, "group_size": 16}, "group_size must be 32, 64, 128")
    yield Reject("scales", (weight,), {"scales": ints["scales"]}, "scales must be None for values")
    dense = weight.clone()
    dense[5, 8:11] = 1.0
    yield Reject(
        "dense",
        (dense,),
        {},
        "weight must have nonzeros in at most 2 of each 4 columns, got 3 in columns 8 .. 11 of "
        "output 5; pass a mask",
        of_values=True,
    )
    wide = mask.clone()
    wide[16, 0] = wide[17, 1] = wide[18, 2] = True
    yield Reject(
        "not shared",
        (weight,),
        {"mask": wide, "vector": 16},
        "mask must keep at most 2 of each 4 columns, got 3 in columns 0 .. 3 of outputs 16 .. 19",
        of_values=True,
    )


def round_trip(weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``expand_nm(compress_nm(...))``, whose reference is the masked weight."""
    return expand_nm(compress_nm(weight, *args, **kwargs))


def round_trip_reference(
    weight: Tensor,
    *_: Any,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    bits: int | None = None,
    **__: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the mask keeps, and zeros (the zero point of codes)."""
    zero = 0.0 if bits is None else 2 ** (bits - 1)
    return weight if mask is None else torch.where(mask, weight, zero).to(weight.dtype), scales


def _raw_linear(sample: Sample) -> tuple[Any, ...]:
    x, w = sample.args[:2]
    bias, add = (*sample.args[2:], None, None)[:2]
    return (
        x,
        w.values,
        w.index,
        w.scales,
        sample.kwargs.get("bias", bias),
        sample.kwargs.get("add", add),
        w.layout_id,
        w.n,
        w.k,
        *w.pattern,
        w.vector,
        w.group_size,
        {"float": 0, "int8": 1}[sample.kwargs.get("compute", "float")],
    )


def _raw_compress(sample: Sample) -> tuple[Any, ...]:
    weight = sample.args[0]
    options = sample.kwargs
    kept, block = options.get("pattern", (*sample.args[1:], (2, 4))[0])
    bits = options.get("bits") or {torch.bfloat16: 16}.get(weight.dtype, 32)
    group_size = options.get("group_size") or weight.shape[-1]
    vector = options.get("vector", 1)
    tensors = (weight, options.get("mask"), options.get("scales"))
    return (*tensors, kept, block, vector, bits, group_size)


@lru_cache(maxsize=1)
def _master(n: int, k: int, pattern: str, vector: int, dtype: str) -> NmWeight:
    kept, block = map(int, pattern.split(":"))
    return make_weight(n, k, (kept, block), dtype, vector=vector)


def _workload(params: Mapping[str, Any]) -> Workload:
    def make() -> Sample:
        p = params
        weight = _master(p["n"], p["k"], p["pattern"], p["vector"], p["dtype"])
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(p["m"], p["k"], generator=generator)
        on_gpu = p.get("device") == "cuda"
        x = x.bfloat16() if p["dtype"] == "bfloat16" or on_gpu else x
        compute = "int8" if p["dtype"] in INTS and not on_gpu else "float"
        return Sample("workload", (x, weight.in_huge_pages()), {"compute": compute})

    return Workload(params, make)


def _linear_workloads() -> Iterator[Workload]:
    for pattern, vector, dtype in (
        ("2:4", 1, "float32"),
        ("2:4", 16, "float32"),
        ("1:4", 1, "float32"),
        ("2:4", 1, "bfloat16"),
        ("2:4", 16, "bfloat16"),
        ("2:4", 1, "int8"),
        ("2:4", 1, "int4"),
        ("2:4", 16, "int4"),
    ):
        for m in (1, 4, 16, 128, 512):
            sizes = {"m": m, "n": 4096, "k": 4096}
            yield _workload({**sizes, "pattern": pattern, "vector": vector, "dtype": dtype})


def _gpu_workloads() -> Iterator[Workload]:
    fixed = {"n": 4096, "k": 4096, "pattern": "2:4", "vector": 1, "device": "cuda"}
    for dtype in ("bfloat16", "int4"):
        for m in (1, 16, 256, 2048):
            yield _workload({"m": m, **fixed, "dtype": dtype})


def _linear_cost(params: Mapping[str, Any]) -> Cost:
    m, n, k, dtype = params["m"], params["n"], params["k"], params["dtype"]
    kept, block = map(int, params["pattern"].split(":"))
    stored = n * k * kept // block
    index = stored * (block.bit_length() - 1) // params["vector"]
    # Scales of 16 bits for 128 columns.
    scales = n * k // 128 * 16 if dtype in INTS else 0
    halves = dtype == "bfloat16" or params.get("device") == "cuda"
    size = 2 if halves else 4
    moved = (stored * BITS[dtype] + index + scales) // 8 + m * (n + k) * size
    unit: Unit = "bf16" if halves else "int8" if dtype in INTS else "fp32"
    return Cost(moved, 2 * m * stored, unit)


CASES = (
    OpCase(
        "nm_linear",
        nm_linear,
        nm_linear_reference,
        nm_linear_tolerance,
        raw=_raw_linear,
        samples=lambda: list(_linear_samples()),
        rejects=lambda: list(_linear_rejects()),
        workloads=tuple(_linear_workloads()),
        gpu_workloads=tuple(_gpu_workloads()),
        cost=_linear_cost,
    ),
    OpCase(
        "compress_nm",
        round_trip,
        round_trip_reference,
        lambda sample, expected: tuple(0.0 for _ in expected),
        raw=_raw_compress,
        samples=lambda: list(_compress_samples()),
        rejects=lambda: list(_compress_rejects()),
    ),
)
