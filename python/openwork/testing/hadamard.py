"""Walsh-Hadamard transforms: reference, samples and workloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ops.hadamard import hadamard
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Workload


def hadamard_matrix(size: int) -> Tensor:
    """``[size, size]`` float64, by the recursion of Sylvester, normalized."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def hadamard_reference(x: Tensor, block: int | None = None) -> Tensor:
    """Products with two small matrices in float64: that of a block is their Kronecker product."""
    block = x.shape[-1] if block is None else block
    inner = 1 << (block.bit_length() - 1) // 2
    blocks = x.double().reshape(-1, block // inner, inner)
    y = hadamard_matrix(block // inner) @ blocks @ hadamard_matrix(inner)
    return y.reshape(x.shape)


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    x, block = (*sample.args, None)[:2]
    block = x.shape[-1] if block is None else block
    # A sum of `block` numbers in log2(block) roundings, then the factor, its product, the result.
    sizes = x.double().abs().reshape(-1, block).sum(-1, keepdim=True) / math.sqrt(block)
    inner = ((block.bit_length() + 1) * EPS[torch.float32] * sizes).expand(-1, block)
    inner = inner.reshape(x.shape)
    rounding = EPS[x.dtype] * (expected[0].abs() + inner) + TINY[x.dtype] * EPS[x.dtype]
    return (inner + rounding,)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(9)
    # Around a vector, the vectors of a pass, and two and three passes; a warp and blocks of warps.
    for shape, block in (
        ((1,), None), ((3, 2), None), ((5, 12), 4), ((2, 3, 8), None), ((7, 48), 16),
        ((2, 96), 32), ((3, 128), None), ((1, 768), 256), ((2, 512), None), ((1, 3072), 1024),
        ((2, 2048), None), ((1, 4096), None), ((1, 8192), None), ((1, 32768), None),
        ((0, 8), None), ((3, 0, 8), 2),
    ):  # fmt: skip
        for dtype in EPS if block or shape[-1] < 4096 else (torch.float16,):
            x = torch.randn(shape, generator=generator).to(dtype)
            name = f"{'x'.join(map(str, shape))}-{block or shape[-1]}-{str(dtype)[6:]}"
            yield Sample(name, (x,) if block is None else (x, block))
    yield Sample("strided", (torch.randn(64, 3, generator=generator).T, 16))
    # Not aligned to the 16 bytes that a GPU reads at once.
    yield Sample("shifted", (torch.randn(3 * 256 + 1, generator=generator)[1:].half(), 256))
    yield Sample("one-large", (torch.eye(64)[:2] * 1e30, 64))


def _rejects() -> Iterator[Reject]:
    x = torch.ones(2, 24)
    yield Reject("dtype", (x.double(), 8), {}, "x must be float32")
    yield Reject("scalar", (torch.ones(()), 1), {}, "x must have a last dimension of at least 1")
    yield Reject("empty", (torch.ones(2, 0), 1), {}, "x must have a last dimension of at least 1")
    for block in (0, -8, 6, 16, 48, 24):
        message = f"that divides the last dimension of x, 24, got {block}"
        yield Reject(f"block-{block}", (x, block), {}, message)
    wide = (torch.ones(1, 65536), 65536)
    yield Reject("wide", wide, {}, "block must be a power of two up to 32768")


def _raw(sample: Sample) -> tuple[Any, ...]:
    x, *rest = sample.args
    return (x, rest[0] if rest else x.shape[-1])


def _make(m: int, d: int, block: int, dtype: torch.dtype) -> Sample:
    return Sample("", (torch.randn(m, d).to(dtype), block))


def _workload(m: int, d: int, block: int, dtype: torch.dtype, **place: str) -> Workload:
    params = {"m": m, "d": d, "block": block, "dtype": str(dtype)[6:], **place}
    return Workload(params, partial(_make, m, d, block, dtype))


def _workloads() -> Iterator[Workload]:
    for m in (1, 16, 512):
        for d, block in ((4096, 4096), (4096, 128), (14336, 512)):
            for dtype in (torch.float32, torch.bfloat16):
                yield _workload(m, d, block, dtype)


def _gpu_workloads() -> Iterator[Workload]:
    for m in (1, 4096):
        for d, block in ((4096, 4096), (4096, 128), (14336, 512)):
            yield _workload(m, d, block, torch.float16, device="cuda")


def _cost(params: Mapping[str, Any]) -> Cost:
    count = params["m"] * params["d"]
    stages = params["block"].bit_length() - 1
    return Cost(2 * count * getattr(torch, params["dtype"]).itemsize, count * stages, "fp32")


CASES = (
    OpCase(
        "hadamard",
        hadamard,
        hadamard_reference,
        _tolerance,
        raw=_raw,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
        workloads=tuple(_workloads()),
        gpu_workloads=tuple(_gpu_workloads()),
        cost=_cost,
    ),
)
