"""Low-bit linear: the slow truth, small nasty calls, and the shapes of real layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..ops.lowbit import lowbit_embedding, lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from ..packing import PackedWeight
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Workload


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, g: int) -> Tensor:
    """``scales * (codes - zeros)``, ``[n, k]`` float64."""
    group = torch.arange(codes.shape[1]) // g
    zero = 2 ** (bits - 1) if zeros is None else zeros.double()[:, group]
    return scales.double()[:, group] * (codes.double() - zero)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """``scale = max|x| / 127``, ``code = round(x * (127 / max|x|))`` in fp32, as specified."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    # A tensor of 127s: `127 / largest` would multiply by a rounded reciprocal.
    codes = torch.round(x * (torch.tensor(127.0) / largest))
    scales = largest / 127
    zero = largest < 2.0**-120
    bad = ~x.isfinite().all(dim=-1, keepdim=True)
    codes = torch.where(zero | bad, 0.0, codes)
    scales = torch.where(bad, float("nan"), torch.where(zero, 0.0, scales))
    return codes.to(torch.int8), scales.squeeze(-1)


def lowbit_linear_reference(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    compute: str = "float",
) -> Tensor:
    """``x @ dequantize(weight).T + bias + add`` in float64; int8 rounds x first."""
    w = dequantize(*unpack_lowbit(weight), weight.bits, weight.group_size)
    if compute == "int8":
        codes, scales = quantize_rows_reference(x)
        y = (codes.double() @ w.T) * scales.double()[..., None]
    else:
        y = x.double() @ w.T
        y[~x.isfinite().all(dim=-1)] = float("nan")
    if bias is not None:
        y = y + bias.double()
    if add is not None:
        y = y + add.double()
    return y


def lowbit_linear_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Rounding of the fp32 sums, then of the result.

    With M = max|x| * sum_k |w|, which bounds every partial sum: encoding x to three digits moves it
    by little over 2**-23 max|x|; combining digits, scaling and adding groups are five roundings a
    group; a bf16 dot product rounds once a pair of k. Bias, add and the result are one each.
    """
    x, weight = sample.args[:2]
    w = dequantize(*unpack_lowbit(weight), weight.bits, weight.group_size).abs()
    largest = x.double().abs().amax(dim=-1, keepdim=True) if x.numel() else x.double()
    magnitude = largest @ w.sum(dim=1)[None, :] if x.numel() else expected[0]
    operands = [sample.kwargs.get("bias"), sample.kwargs.get("add")]
    extra = sum(t.double().abs() for t in operands if t is not None)
    roundings = weight.k / 2 + 5 * weight.groups + 8
    inner = roundings * EPS[torch.float32] * (magnitude + extra)
    # A group of x below 2**-100 counts as zero.
    inner = inner + 2.0**-100 * w.sum(dim=1)
    outer = EPS[x.dtype] * (expected[0].abs() + inner) + TINY[x.dtype] * EPS[x.dtype]
    return (inner + outer,)


def make_weight(
    n: int, k: int, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int = 0
) -> PackedWeight:
    """A packed weight of random codes, zeros, and scales in 0.5 .. 1.5."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) + 0.5).to(dtype)
    zeros = None
    if not symmetric:
        zeros = torch.randint(2**bits, (n, groups), dtype=torch.uint8, generator=generator)
    return pack_lowbit(codes, scales, zeros, bits=bits, group_size=group_size)


# (m, n, k, group_size): 1s, primes, one less and one more than each tile, short last groups.
_SHAPES = (
    (1, 1, 1, 1),
    (1, 33, 37, 16),
    (2, 16, 32, 32),
    (3, 31, 100, 32),
    (5, 65, 257, 64),
    (9, 64, 576, 128),
    (13, 96, 130, 130),
    (26, 70, 144, 128),
    (67, 33, 300, 300),
)


def _linear_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(1)
    variants = (
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, True),
    )
    for bits in (2, 3, 4, 8):
        for i, (m, n, k, g) in enumerate(_SHAPES):
            dtype, scales, symmetric = variants[(i + bits) % 3]
            weight = make_weight(n, k, bits, g, symmetric, scales)
            x = torch.randn(m, k, generator=generator).to(dtype)
            for compute in ("float", "int8"):
                name = f"{compute}-w{bits}-{m}x{n}x{k}-g{g}-{str(dtype)[6:]}"
                yield Sample(name, (x, weight), {"compute": compute})
    weight = make_weight(48, 64, 4, 32, False, torch.float32)
    x = torch.randn(2, 3, 64, generator=generator)
    bias = torch.randn(48, generator=generator)
    add = torch.randn(2, 3, 48, generator=generator)
    yield Sample("bias-add", (x, weight), {"bias": bias, "add": add})
    yield Sample("bias-add-int8", (x, weight), {"bias": bias, "add": add, "compute": "int8"})
    yield Sample("no-rows", (x[:0], weight))
    yield Sample("vector", (x[0, 0], weight))
    yield Sample("strided", (torch.randn(64, 5, generator=generator).T, weight))
    extreme = torch.full((2, 64), 3.0e38)
    extreme[1] = 2.0e-38
    yield Sample("extreme", (extreme * 1e-4, weight))
    outlier = torch.randn(4, 64, generator=generator)
    outlier[:, 5] = 1000.0
    yield Sample("outlier", (outlier, weight))
    yield Sample("zero-row", (torch.zeros(3, 64), weight), {"compute": "int8"})
    bad = torch.randn(3, 64, generator=generator)
    bad[0, 3], bad[1, 7] = float("inf"), float("nan")
    yield Sample("not-finite", (bad, weight))
    yield Sample("not-finite-int8", (bad, weight), {"compute": "int8"})


def _linear_rejects() -> Iterator[Reject]:
    weight = make_weight(48, 64, 4, 32, False, torch.float32)
    x = torch.randn(2, 64)
    shape = "[2, 2, 2, 2, 16, 4]"

    def broken(**changes: Any) -> PackedWeight:
        return replace(weight, **changes)

    yield Reject("dtype", (x.double(), weight), {}, "x must be float32, bfloat16 or float16")
    yield Reject("k", (x[:, :63], weight), {}, "last dimension k = 64 (from weight), got [2, 63]")
    yield Reject("bias", (x, weight, torch.ones(47)), {}, "bias must have shape [48], got [47]")
    yield Reject(
        "bias dtype", (x, weight, torch.ones(48).half()), {}, "bias must be float32, got float16"
    )
    yield Reject("add", (x, weight, None, x), {}, "add must have shape [2, 48], got [2, 64]")
    yield Reject("k of weight", (x, broken(n=80)), {}, "packed must have shape [3, 4, 2, 2, 16, 4]")
    yield Reject("layout", (x, broken(layout="w8_n32k4@1")), {}, "packed must have shape")
    yield Reject(
        "scales", (x, broken(scales=weight.scales[:1])), {}, "scales must have shape [2, 2, 32]"
    )
    yield Reject(
        "packed dtype", (x, broken(packed=weight.packed.char())), {}, "packed must be uint8"
    )
    yield Reject("group", (x, broken(group_size=48)), {}, "group_size must be 16, 32, 64, 128")
    assert list(weight.packed.shape) == [2, 4, 2, 2, 16, 4], shape


def _pack_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(2)
    for bits in (2, 3, 4, 8):
        for n, k, g in ((1, 1, 1), (33, 37, 16), (31, 100, 32), (70, 144, 144)):
            groups = -(-k // g)
            codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
            scales = torch.rand(n, groups, generator=generator).half()
            zeros = torch.randint(2**bits, (n, groups), dtype=torch.uint8, generator=generator)
            for z in (None, zeros):
                name = f"w{bits}-{n}x{k}-g{g}-{'sym' if z is None else 'asym'}"
                yield Sample(name, (codes, scales, z), {"bits": bits, "group_size": g})


def _pack_rejects() -> Iterator[Reject]:
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    scales = torch.ones(4, 1)
    good = {"bits": 4, "group_size": 32}
    yield Reject("bits", (codes, scales), {**good, "bits": 5}, "bits must be 2, 3, 4 or 8, got 5")
    yield Reject("codes dtype", (codes.int(), scales), good, "codes must be uint8, got int32")
    yield Reject("codes rank", (codes[0], scales), good, "codes must be [n, k], got [32]")
    yield Reject("empty", (codes[:0], scales[:0]), good, "at least one row and one column")
    yield Reject("group", (codes, scales), {**good, "group_size": 24}, "group_size must be 16")
    yield Reject("scales", (codes, torch.ones(4, 2)), good, "scales must have shape [4, 1]")
    yield Reject("scales dtype", (codes, scales.double()), good, "scales must be float32")
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    yield Reject("zeros", (codes, scales, zeros), good, "zeros must have shape [4, 1]")


def round_trip(
    codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``unpack_lowbit(pack_lowbit(...))``, whose reference is the identity."""
    return unpack_lowbit(pack_lowbit(codes, scales, zeros, bits=bits, group_size=group_size))


def _row_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 1), (3, 17), (2, 5, 64), (7, 100), (0, 8), (5,)):
        for dtype in EPS:
            x = torch.randn(shape, generator=generator).to(dtype)
            yield Sample(f"{list(shape)}-{str(dtype)[6:]}", (x,))
    special = torch.tensor([[0.0, 0.0], [1e-37, -1e-38], [float("inf"), 1.0], [float("nan"), 2.0]])
    yield Sample("special", (special,))
    yield Sample("strided", (torch.randn(16, 6, generator=generator).T,))
    yield Sample("ties", (torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]),))


def _raw_linear(sample: Sample) -> tuple[Any, ...]:
    x, weight, bias, add = (*sample.args, None, None)[:4]
    compute = {"float": 0, "int8": 1}[sample.kwargs.get("compute", "float")]
    return (
        x,
        weight.packed,
        weight.scales,
        weight.zeros,
        sample.kwargs.get("bias", bias),
        sample.kwargs.get("add", add),
        weight.layout_id,
        weight.n,
        weight.k,
        weight.group_size,
        compute,
    )


@lru_cache(maxsize=1)
def _master(n: int, k: int, bits: int, group_size: int, symmetric: bool) -> PackedWeight:
    return make_weight(n, k, bits, group_size, symmetric, torch.float16)


def _workload(params: Mapping[str, Any]) -> Workload:
    def make() -> Sample:
        p = params
        weight = _master(p["n"], p["k"], p["bits"], p["group_size"], p["symmetric"])
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(p["m"], p["k"], generator=generator).to(getattr(torch, p["dtype"]))
        return Sample("workload", (x, weight.in_huge_pages()), {"compute": p["compute"]})

    return Workload(params, make)


def _linear_workloads() -> Iterator[Workload]:
    def workload(m: int, n: int, k: int, bits: int, compute: str, dtype: str) -> Workload:
        group_size = 128
        return _workload(
            {
                "m": m,
                "n": n,
                "k": k,
                "bits": bits,
                "group_size": group_size,
                "symmetric": True,
                "compute": compute,
                "dtype": dtype,
            }
        )

    for bits in (8, 4, 3, 2):
        for compute in ("int8", "float"):
            yield workload(1, 4096, 4096, bits, compute, "float32")
            yield workload(1, 11008, 4096, bits, compute, "float32")
            for m in (2, 4, 8, 16, 32):
                yield workload(m, 4096, 4096, bits, compute, "float32")
        for m in (128, 512):
            yield workload(m, 4096, 4096, bits, "int8", "bfloat16")
            yield workload(m, 4096, 4096, bits, "float", "bfloat16")
    for n, k in ((960, 576), (3072, 576), (576, 1536)):
        yield workload(1, n, k, 4, "int8", "float32")


def _gpu_workloads() -> Iterator[Workload]:
    for bits in (8, 4):
        for m in (1, 16, 256, 2048):
            for compute in ("float", "int8"):
                sizes = {"m": m, "n": 4096, "k": 4096, "bits": bits, "group_size": 128}
                kinds = {"symmetric": True, "compute": compute, "dtype": "float16"}
                yield _workload({**sizes, **kinds, "device": "cuda"})


def _linear_cost(params: Mapping[str, Any]) -> Cost:
    m, n, k, bits = params["m"], params["n"], params["k"], params["bits"]
    groups = -(-k // params["group_size"])
    weight = n * k * bits // 8 + n * groups * (2 if params["symmetric"] else 3)
    size = torch.empty((), dtype=getattr(torch, params["dtype"])).element_size()
    moved = weight + m * (n + k) * size
    ops = 2 * m * n * k
    if params["compute"] == "int8":
        return Cost(moved, ops, "int8")
    if params.get("device") == "cuda":
        return Cost(moved, ops, "bf16")
    # Few rows of bf16 are encoded (lowbit_gemm_takes_bf16); no workload has so few.
    if params["dtype"] == "bfloat16" and _native.isa() in ("avx512bf16", "avx512amx"):
        return Cost(moved, ops, "bf16")
    # Three int8 products for each of x's digits.
    return Cost(moved, 3 * ops, "int8")


def lowbit_embedding_reference(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``dequantize(weight)[ids]``, rounded to float32, then to dtype."""
    w = dequantize(*unpack_lowbit(weight), weight.bits, weight.group_size)
    return w.float()[ids].to(dtype)


def _embedding_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(10)
    for bits in (2, 3, 4, 8):
        for i, (n, k, g) in enumerate(((1, 1, 1), (33, 37, 16), (100, 72, 32), (70, 300, 300))):
            dtype, scales = list(EPS)[(i + bits) % 3], list(EPS)[bits % 3]
            weight = make_weight(n, k, bits, g, i % 2 == 0, scales)
            ids = torch.randint(n, (2, 9), generator=generator)
            yield Sample(f"w{bits}-{n}x{k}-g{g}-{str(dtype)[6:]}", (ids, weight, dtype))
    yield Sample("strided", (ids.T, weight))
    yield Sample("scalar", (ids[0, 0], weight))
    yield Sample("no-ids", (ids[:, :0], weight))


def _embedding_rejects() -> Iterator[Reject]:
    weight = make_weight(40, 32, 8, 32, True, torch.float32)
    ids = torch.tensor([0, 39])
    yield Reject("high", (ids + 1, weight), {}, "ids must be in 0 .. 39, got 40", of_values=True)
    yield Reject("low", (ids - 1, weight), {}, "ids must be in 0 .. 39, got -1", of_values=True)
    yield Reject("ids", (ids.int(), weight), {}, "ids must be int64, got int32")
    yield Reject("dtype", (ids, weight, torch.float64), {}, "dtype must be float32")
    yield Reject("layout", (ids, replace(weight, layout="w4_n32k8@1")), {}, "packed must have")


def _raw_embedding(sample: Sample) -> tuple[Any, ...]:
    ids, w, dtype = (*sample.args, torch.float32)[:3]
    return (ids, w.packed, w.scales, w.zeros, w.layout_id, w.n, w.k, w.group_size, dtype)


CASES = (
    OpCase(
        "lowbit_embedding",
        lowbit_embedding,
        lowbit_embedding_reference,
        lambda sample, expected: (0.0,),
        raw=_raw_embedding,
        samples=lambda: list(_embedding_samples()),
        rejects=lambda: list(_embedding_rejects()),
    ),
    OpCase(
        "lowbit_linear",
        lowbit_linear,
        lowbit_linear_reference,
        lowbit_linear_tolerance,
        raw=_raw_linear,
        samples=lambda: list(_linear_samples()),
        rejects=lambda: list(_linear_rejects()),
        workloads=tuple(_linear_workloads()),
        gpu_workloads=tuple(_gpu_workloads()),
        cost=_linear_cost,
    ),
    OpCase(
        "pack_lowbit",
        round_trip,
        lambda codes, scales, zeros=None, **_: (codes, scales, zeros),
        lambda sample, expected: tuple(0.0 for _ in expected),
        raw=lambda s: (*(*s.args, None)[:3], s.kwargs["bits"], s.kwargs["group_size"]),
        samples=lambda: list(_pack_samples()),
        rejects=lambda: list(_pack_rejects()),
    ),
    OpCase(
        "quantize_rows",
        quantize_rows,
        quantize_rows_reference,
        lambda sample, expected: (0.0, 0.0),
        raw=lambda s: s.args,
        samples=lambda: list(_row_samples()),
        rejects=lambda: [
            Reject("dtype", (torch.ones(2, 3, dtype=torch.int32),), {}, "x must be float32"),
            Reject("no columns", (torch.ones(2, 0),), {}, "last dimension of at least 1"),
        ],
    ),
)
