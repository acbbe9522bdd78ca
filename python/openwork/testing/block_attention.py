"""Block attention: reference, samples and workloads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..block_index import BlockIndex
from ..ops.block_attention import _score_rows, block_attention, shared_arguments
from .attention_workloads import WORKLOADS, cost, make_index, make_operands
from .case import EPS, TINY, OpCase, Reject, Sample


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> list[Any]:
    """Of each sequence: its batch, and its slices of queries and keys."""
    if cu_q is None or cu_k is None:
        return [(b, slice(0, q.shape[1]), slice(0, k.shape[1])) for b in range(q.shape[0])]
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return [(0, slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in ends]


def visible(sq: int, sk: int, causal: bool, window: int, sinks: int, min_distance: int) -> Tensor:
    """``[sq, sk]`` bool: what the masks by position leave."""
    distance = (sk - sq + torch.arange(sq))[:, None] - torch.arange(sk)
    if not causal:
        return torch.ones_like(distance, dtype=torch.bool)
    near = (distance < window) | (torch.arange(sk) < sinks) if window else distance >= 0
    return near & (distance >= max(min_distance, 0)) & (distance >= 0)


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    min_distance: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    scores: Any = None,
) -> tuple[Tensor, ...]:
    """The formula in float64, with the masks as matrices."""
    b, sq, h, d = q.shape
    sk, g = k.shape[1:3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    o = torch.zeros(b, sq, h, v.shape[3], dtype=torch.float64)
    lse = torch.full((b, sq, h), -math.inf, dtype=torch.float64)
    sums = torch.zeros(b, h, sk, dtype=torch.float64)
    chosen = torch.zeros(b, sq, dtype=torch.bool)
    if scores is not None:
        chosen = _score_rows(scores, q, cu_seqlens_q)
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    lengths = [(i.stop - i.start, j.stop - j.start) for _, i, j in sequences]
    listed = None if index is None else index.to_mask(*map(list, zip(*lengths, strict=True)))
    for s, (at, i, j) in enumerate(sequences):
        sees = visible(*lengths[s], causal, window, sinks, min_distance)
        keys, values = (x[at, j].double() for x in (k, v))
        # A head and some queries at a time: the matrices of long sequences would not fit.
        for head, rows in itertools.product(range(h), torch.arange(sq)[i].split(1024)):
            part = sees[rows - i.start]
            if listed is not None:
                part = part & listed[s][head // (h // listed[s].shape[0]), rows - i.start]
            logits = scale * q[at, rows, head].double() @ keys[:, head // (h // g)].T
            logits = logits.masked_fill(~part, -math.inf)
            lse[at, rows, head] = logits.logsumexp(-1)
            weights = logits.softmax(-1).masked_fill(~part, 0.0)
            o[at, rows, head] = weights @ values[:, head // (h // g)]
            sums[at, head, j] += (weights * chosen[at, rows, None]).sum(0)
    return (o, *((lse,) if return_lse else ()), *(() if scores is None else (sums,)))


# Of a weight, relative: the polynomial of the bfloat16 tiers, with its roundings.
BF16_EXP = 8e-5


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k, v = sample.args[:3]
    d, n = q.shape[3], k.shape[1]
    scale = sample.kwargs.get("scale")
    scale = 1 / math.sqrt(d) if scale is None else scale
    # A score is a sum of d products; it is scaled, and the largest is subtracted. Its error turns
    # into a relative error of its weight; there, the exponential has 3 roundings more.
    norms = [
        x.double().nan_to_num().norm(dim=-1).amax().item() if x.numel() else 0.0 for x in (q, k)
    ]
    worst = abs(scale) * norms[0] * norms[1]
    weight = EPS[torch.float32] * ((d + 8) * worst + 3)
    rounding = 0.0
    if q.dtype == torch.bfloat16:
        weight, rounding = weight + BF16_EXP, EPS[torch.bfloat16]
    add = EPS[torch.float32] * (n + 10)
    kwargs = {**sample.kwargs, "return_lse": True, "scores": None}
    reach = block_attention_reference(q, k, v.abs(), *sample.args[3:], **kwargs)[0]
    inner = (2 * (weight + add) + rounding) * reach
    eps = EPS[q.dtype]
    bounds: list[Tensor] = [inner + eps * (expected[0].abs() + inner) + TINY[q.dtype] * eps]
    rest = list(expected[1:])
    if sample.kwargs.get("return_lse"):
        lse = rest.pop(0)
        bounds.append(
            weight + add + 4 * EPS[torch.float32] * (lse.abs().nan_to_num(posinf=0) + worst)
        )
    if rest:
        rows = EPS[torch.float32] * (q.shape[1] + 10)
        bounds.append((2 * (weight + add) + rounding + rows) * rest[0] + 1e-37)
    return tuple(bounds)


def _raw(sample: Sample) -> tuple[Any, ...]:
    q = sample.args[0]
    scores = sample.kwargs.get("scores")
    rows = None
    if scores is not None:
        rows = _score_rows(scores, q, sample.kwargs.get("cu_seqlens_q"))
    return (*raw_arguments(sample), rows)


def raw_arguments(sample: Sample) -> tuple[Any, ...]:
    """Of the sample's, those that raw operators of block attention share."""
    q, k, v, *index = sample.args
    results = ("return_lse", "scores")
    kwargs = {name: value for name, value in sample.kwargs.items() if name not in results}
    return (q, k, v, *shared_arguments(*index, **kwargs))


def _samples() -> Iterator[Sample]:
    shapes = (
        # b, sq, sk, h, kv_heads, d, dv
        (1, 1, 1, 1, 1, 1, 1),
        (2, 65, 65, 3, 1, 64, 64),
        (1, 17, 131, 6, 2, 80, 96),
        (1, 130, 67, 2, 2, 33, 17),
        (1, 97, 300, 2, 1, 128, 256),
        (0, 1, 2, 2, 1, 8, 8),
        (2, 0, 3, 2, 1, 8, 8),
        (2, 3, 0, 2, 1, 8, 8),
    )
    for shape in shapes:
        for dtype in EPS:
            name = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}"
            yield Sample(name, make_operands(*shape, dtype), {"return_lse": True, "scores": "all"})
    for dtype in (torch.float32, torch.bfloat16):
        kind = "float" if dtype == torch.float32 else "bfloat"
        yield from _masked_samples(kind, dtype)
        yield from _indexed_samples(kind, dtype)


def _masked_samples(kind: str, dtype: torch.dtype) -> Iterator[Sample]:
    q, k, v = make_operands(1, 150, 210, 4, 2, 64, 64, dtype)
    both = {"return_lse": True, "scores": "all"}
    yield Sample(f"{kind}-whole", (q, k, v), {"causal": False, **both})
    yield Sample(f"{kind}-window", (q, k, v), {"window": 70, "sinks": 5, **both})
    yield Sample(f"{kind}-narrow", (q, k, v), {"window": 1, **both})
    yield Sample(f"{kind}-far", (q, k, v), {"min_distance": 61, **both})
    yield Sample(f"{kind}-sinks", (q, k, v), {"window": 90, "sinks": 80, "min_distance": 9, **both})
    yield Sample(f"{kind}-scale", (q, k, v), {"scale": -0.5})
    yield Sample(f"{kind}-flat", (q, k, v), {"scale": 0.0, **both})
    yield Sample(f"{kind}-steep", (40 * q, 40 * k, v), {"return_lse": True})
    ascending = k * torch.linspace(0.1, 20, 210)[:, None, None].to(dtype)
    yield Sample(f"{kind}-rising", (q.abs(), ascending.abs(), v), both)
    cache = torch.stack([k, v]).transpose(2, 3).contiguous()  # [2, b, kv_heads, sk, d]
    wide = q.repeat(1, 1, 1, 2)[..., 3:67]
    yield Sample(f"{kind}-strided", (wide, *cache.transpose(2, 3)), {"scores": 7})
    rows = torch.zeros(1, 150, dtype=torch.bool)
    rows[0, [3, 77, 149]] = True
    yield Sample(f"{kind}-probes", (q, k, v), {"scores": rows})
    at_q = torch.tensor([0, 1, 1, 90, 150], dtype=torch.int32)
    at_k = torch.tensor([0, 40, 40, 151, 210], dtype=torch.int32)
    varlen = {"cu_seqlens_q": at_q, "cu_seqlens_k": at_k, "return_lse": True, "scores": 3}
    yield Sample(f"{kind}-sequences", (q, k, v), varlen)
    broken = k.clone()
    broken[0, 200, 0, 3] = math.nan
    yield Sample(f"{kind}-not-finite", (q[:, -1:], broken, v), {"return_lse": True})


def _indexed_samples(kind: str, dtype: torch.dtype) -> Iterator[Sample]:
    shapes = (
        # sq, sk, h, kv_heads, index_heads, block_m, block_n, density, columns
        (200, 200, 4, 2, 4, 64, 64, 0.5, 0.0),
        (200, 330, 4, 2, 2, 32, 16, 0.3, 0.1),
        (200, 331, 4, 2, 1, 128, 48, 0.5, 0.2),
        (70, 301, 2, 1, 2, 16, 128, 0.7, 0.05),
        (200, 200, 2, 1, 1, 80, 32, 0.0, 0.4),
        (200, 200, 2, 1, 1, 64, 64, 0.0, 0.0),
    )
    both = {"return_lse": True, "scores": "all"}
    for sq, sk, h, g, heads, block_m, block_n, density, columns in shapes:
        index = make_index([(sq, sk)], heads, block_m, block_n, density, columns)
        name = f"{kind}-{block_m}x{block_n}-{sq}-{sk}-{heads}-{density}-{columns}"
        yield Sample(name, (*make_operands(1, sq, sk, h, g, 64, 64, dtype), index), both)
    # Later keys exceed the largest score so far, again and again.
    q, k, v = make_operands(1, 200, 900, 2, 1, 64, 64, dtype)
    ascending = k * torch.linspace(0.1, 20, 900)[:, None, None].to(dtype)
    index = make_index([(200, 900)], 2, 64, 32, 0.2, 0.5)
    yield Sample(f"{kind}-rising-index", (q.abs(), ascending.abs(), v, index), {})
    # Few queries, whose heads share tiles.
    q, k, v = make_operands(2, 9, 70, 10, 2, 40, 24, dtype)
    yield Sample(f"{kind}-few", (q, k, v), {"return_lse": True})
    yield Sample(f"{kind}-few-window", (q, k, v), {"window": 20, "sinks": 3, "return_lse": True})
    index = make_index([(200, 210)], 2, 16, 48, 0.5, 0.1)
    q, k, v = make_operands(1, 200, 210, 4, 2, 64, 64, dtype)
    yield Sample(f"{kind}-few-index", (q, k, v, index), {"return_lse": True})
    q, k, v = make_operands(2, 100, 160, 4, 2, 40, 48, dtype)
    index = make_index([(100, 160)] * 2, 4, 48, 32, 0.4, 0.1)
    yield Sample(f"{kind}-batch-index", (q, k, v, index), both)
    window = {"window": 50, "sinks": 20, **both}
    yield Sample(f"{kind}-window-index", (q, k, v, index), window)
    at = torch.tensor([0, 30, 30, 160], dtype=torch.int32)
    index = make_index([(30, 30), (0, 0), (130, 130)], 2, 32, 32, 0.6, 0.1)
    varlen = {"cu_seqlens_q": at, "cu_seqlens_k": at, **both}
    q = make_operands(1, 160, 0, 4, 1, 40, 1, dtype)[0]
    yield Sample(f"{kind}-sequences-index", (q, k[:1], v[:1], index), varlen)
    whole = {"causal": False, **both}
    index = make_index([(160, 160)], 1, 64, 64, 0.6, 0.0)
    yield Sample(f"{kind}-whole-index", (q, k[:1], v[:1], index), whole)


def _rejects() -> Iterator[Reject]:
    q, k, v = make_operands(1, 40, 50, 4, 2, 6, 6, torch.float32)
    yield Reject("rank", (q[0], k, v), {}, "q must be [b, n, heads, d]")
    yield Reject("dtype", (q.double(), k, v), {}, "q must be float32")
    yield Reject("mixed", (q, k.half(), v), {}, "k must be float32, got float16")
    yield Reject("k", (q, k[..., :5], v), {}, "k must have the d of q, 6, got 5")
    yield Reject("v", (q, k, v[:, 1:]), {}, "v must have shape [1, 50, 2, 6]")
    yield Reject("heads", (q[:, :, :3], k, v), {}, "multiple of kv_heads = 2 heads, got 3")
    yield Reject("stride", (q, k.repeat(1, 1, 1, 2)[..., ::2], v), {}, "k must have a last stride")
    yield Reject("window", (q, k, v), {"window": -1}, "window must be at least 0")
    yield Reject("no-causal", (q, k, v), {"window": 3, "causal": False}, "window must be 0")
    yield Reject("scale", (q, k, v), {"scale": math.inf}, "scale must be finite, got inf")
    rows = torch.ones(1, 39, dtype=torch.bool)
    yield Reject("rows", (q, k, v), {"scores": rows}, "score_rows must have shape [1, 40]")
    at = torch.tensor([0, 40], dtype=torch.int32)
    yield Reject("one-side", (q, k, v), {"cu_seqlens_q": at}, "must come together")
    long = {"cu_seqlens_q": at.long(), "cu_seqlens_k": at}
    yield Reject("long", (q, k, v), long, "cu_seqlens_q must be int32")
    past = {"cu_seqlens_q": at, "cu_seqlens_k": at + torch.tensor([0, 11], dtype=torch.int32)}
    yield Reject("past", (q, k, v), past, "cu_seqlens_k must rise from 0 to 50", of_values=True)
    yield from _index_rejects(q, k, v)


def _index_rejects(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Reject]:
    def lists(*rows: list[int]) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()[None]
        return indptr, torch.tensor([item for row in rows for item in row], dtype=torch.int32)

    def index(*rows: list[int], columns: list[list[int]] | None = None) -> tuple[Any, ...]:
        single = (None, None) if columns is None else lists(*columns)
        return (q, k, v, BlockIndex(*lists(*rows), 32, 16, *single))

    of_index = {"of_values": True}
    yield Reject("few-rows", index([0]), {}, "indptr must have shape [1, 3], got [1, 2]")
    heads = BlockIndex(torch.zeros(3, 3, dtype=torch.int32), lists()[1], 32, 16)
    yield Reject("index-heads", (q, k, v, heads), {}, "indptr must have 1, kv_heads = 2 or heads")
    text = "indices must rise strictly in each row"
    yield Reject("outside", index([0], [4]), {}, text, **of_index)
    yield Reject("negative", index([-1], [0]), {}, text, **of_index)
    yield Reject("twice", index([0], [2, 2]), {}, text, **of_index)
    text = "columns must rise strictly in each row"
    yield Reject("column", index([0], [1], columns=[[], [50]]), {}, text, **of_index)
    yield Reject("columns", index([0], [1], columns=[[], [40, 36]]), {}, text, **of_index)
    text = "columns must be outside of the row's listed blocks"
    yield Reject("inside", index([0], [1], columns=[[], [3, 16]]), {}, text, **of_index)
    falling = BlockIndex(torch.tensor([[0, 2, 1]], dtype=torch.int32), lists([0])[1], 32, 16)
    yield Reject("falling", (q, k, v, falling), {}, "indptr must rise from 0 to 1", **of_index)


CASES = (
    OpCase(
        "block_attention",
        block_attention,
        block_attention_reference,
        _tolerance,
        raw=_raw,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
        workloads=WORKLOADS,
        cost=cost,
    ),
)
