"""Operands, indices and workloads of block attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..block_index import BlockIndex
from .case import Cost, Sample, Workload


def make_operands(
    b: int, sq: int, sk: int, h: int, g: int, d: int, dv: int, dtype: torch.dtype, seed: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, sq, h, d), (b, sk, g, d), (b, sk, g, dv))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def _lists(masks: Tensor) -> tuple[Tensor, Tensor]:
    """``[heads, rows, items]`` bool as offsets and items."""
    counts = masks.sum(-1).flatten()
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    heads, rows = masks.shape[:2]
    at = torch.arange(heads)[:, None] * rows + torch.arange(rows + 1)
    return ends[at].int(), masks.nonzero()[:, 2].int()


def make_index(
    lengths: list[tuple[int, int]],
    heads: int,
    block_m: int,
    block_n: int,
    density: float,
    columns: float = 0.0,
    seed: int = 6,
) -> BlockIndex:
    """Random lists: each block at or before a row's last query with probability ``density``.

    Args:
        lengths: queries and keys of each sequence.
        heads: index_heads.
        block_m, block_n: block sizes.
        density: share of the blocks that are listed.
        columns: share of the other keys that are.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max((sk for _, sk in lengths), default=0)
    blocks: list[Tensor] = []
    keys: list[Tensor] = []
    for sq, sk in lengths:
        rows = -(-sq // block_m)
        last = sk - sq + (torch.arange(1, rows + 1) * block_m).clamp(max=sq) - 1
        begin = torch.arange(-(-most // block_n)) * block_n
        possible = (begin < sk) & (begin <= last[:, None])
        chosen = torch.rand(heads, *possible.shape, generator=generator) < density
        chosen &= possible
        inside = chosen.repeat_interleave(block_n, 2)[:, :, :most]
        single = torch.rand(heads, rows, most, generator=generator) < columns
        single &= (torch.arange(most) < sk) & ~inside
        blocks.append(chosen)
        keys.append(single)
    indptr, indices = _lists(torch.cat(blocks, 1))
    if columns == 0.0:
        return BlockIndex(indptr, indices, block_m, block_n)
    column_indptr, items = _lists(torch.cat(keys, 1))
    return BlockIndex(indptr, indices, block_m, block_n, column_indptr, items)


# Queries and keys of a block of the workloads' indices.
WORKLOAD_BLOCK = 64


def _workload(pattern: str, keys: int, d: int, dtype: str, density: float) -> Workload:
    h, g = 4, 1
    params = {
        "pattern": pattern,
        "keys": keys,
        "h": h,
        "kv_heads": g,
        "d": d,
        "dtype": dtype,
        "density": density,
        "hot": True,  # a call reads its operands many times, from memory or not
    }

    def make() -> Sample:
        operands = make_operands(1, keys, keys, h, g, d, d, getattr(torch, dtype))
        if pattern == "blocks":
            index = make_index([(keys, keys)], h, WORKLOAD_BLOCK, WORKLOAD_BLOCK, density)
            return Sample("workload", (*operands, index))
        return Sample("workload", operands, {"scores": "all"} if pattern == "scores" else {})

    return Workload(params, make)


def _chunk_workload(queries: int, h: int, d: int, dtype: str) -> Workload:
    """The last queries of a sequence: a part of a prompt, or guesses to be verified."""
    keys, g = 4096, 8
    params = {
        "pattern": "chunk",
        "queries": queries,
        "keys": keys,
        "h": h,
        "kv_heads": g,
        "d": d,
        "dtype": dtype,
        "density": 1.0,
    }

    def make() -> Sample:
        return Sample(
            "workload", make_operands(1, queries, keys, h, g, d, d, getattr(torch, dtype))
        )

    return Workload(params, make)


def cost(params: Mapping[str, Any]) -> Cost:
    """Of a workload."""
    keys, h, g, d = (params[name] for name in ("keys", "h", "kv_heads", "d"))
    queries = params.get("queries", keys)
    # Two products of d for each pair of a query and a key that is listed and not after it.
    pairs = params["density"] * (queries * keys - queries * (queries - 1) / 2)
    size = 2 * (queries * h + keys * g) * d * getattr(torch, params["dtype"]).itemsize
    return Cost(size, int(4 * h * d * pairs), "bf16" if params["dtype"] == "bfloat16" else "fp32")


WORKLOADS = (
    *(
        _workload(pattern, keys, d, dtype, density)
        for keys in (4096, 8192)
        for d in (64, 128)
        for dtype in ("float32", "bfloat16")
        for pattern, density in (
            ("dense", 1.0),
            ("scores", 1.0),
            ("blocks", 0.25),
            ("blocks", 0.1),
        )
    ),
    *(
        _chunk_workload(queries, h, 128, dtype)
        for dtype in ("float32", "bfloat16")
        for h in (8, 32)
        for queries in (8, 32, 64)
    ),
)
