"""Attention over cached keys and values: reference and small nasty calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import decode_attention
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Workload


def _scores(q: Tensor, keys: Tensor, length: int, scale: float | None) -> Tensor:
    """``[b, h, t, length]`` in float64, minus infinity where a query may not look."""
    t, h, d = q.shape[1:]
    keys = keys[:, :, :length].double().repeat_interleave(h // keys.shape[1], dim=1)
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = scale * torch.einsum("bthd,bhnd->bhtn", q.double(), keys)
    visible = torch.ones(t, length, dtype=torch.bool).tril(length - t)
    return scores.masked_fill(~visible, -math.inf)


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> Tensor:
    """``softmax(scale * q @ keys.T) @ values`` with a causal mask, in float64."""
    weights = _scores(q, keys, length, scale).softmax(-1)
    values = values[:, :, :length].double().repeat_interleave(q.shape[2] // keys.shape[1], dim=1)
    return torch.einsum("bhtn,bhnd->bthd", weights, values)


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    q, keys, values, length, *rest = sample.args
    scale = rest[0] if rest else None
    d = q.shape[3]
    # A score is a sum of d products; its error turns into a relative error of its weight, and that
    # of all weights into twice as much of the result. Exponential, sums and quotient: 5 + length.
    # (The three bf16 parts of a weight that tile products take are as good as fp32.)
    size = _scores(q.abs(), keys.abs(), length, None if scale is None else abs(scale))
    worst = size.nan_to_num(neginf=0.0).amax() if size.numel() else torch.tensor(0.0)
    steps = 2 * (d + 3) * worst + length + 10
    reach = decode_attention_reference(q, keys, values.abs(), length, scale)
    eps = EPS[q.dtype]
    inner = EPS[torch.float32] * steps * reach
    return (inner + eps * (expected[0].abs() + inner) + TINY[q.dtype] * eps,)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(9)
    shapes = (
        # b, t, h, kv_heads, d, length, max_len
        (1, 1, 1, 1, 1, 1, 1),
        (2, 1, 9, 3, 64, 7, 16),
        (1, 1, 4, 1, 80, 128, 129),
        (1, 2, 5, 5, 17, 131, 140),
        (2, 3, 6, 2, 33, 300, 300),
        (1, 130, 2, 1, 8, 130, 131),
        (0, 1, 2, 1, 8, 3, 4),
        (2, 0, 2, 1, 8, 3, 4),
    )
    for b, t, h, g, d, length, max_len in shapes:
        for dtype in EPS:
            q = torch.randn(b, t, h, d, generator=generator).to(dtype)
            cache = torch.randn(2, b, g, max_len, d, generator=generator).to(dtype)
            name = f"{b}x{t}x{h}x{g}x{d}-{length}-{str(dtype)[6:]}"
            yield Sample(name, (q, cache[0], cache[1], length))
    q = torch.randn(1, 2, 4, 6, generator=generator)
    wide = torch.randn(1, 9, 2, 6, generator=generator).transpose(1, 2)  # a token's heads together
    yield Sample("strided", (q.transpose(1, 2).contiguous().transpose(1, 2), wide, wide, 8))
    yield Sample("scale", (q, wide, wide, 8, -0.5))
    yield Sample("steep", (60 * q, 60 * wide, wide, 9))
    broken = wide.clone()
    broken[0, 1, 3, 2] = math.nan
    yield Sample("not-finite-key", (q[:, :1], broken, wide, 9))
    yield Sample("not-finite-value", (q[:, :1], wide, broken, 9))
    behind = wide.clone()
    behind[:, :, 5:] = math.nan
    yield Sample("garbage-behind-length", (q, behind, behind, 5))


def _rejects() -> Iterator[Reject]:
    q, cache = torch.ones(1, 2, 4, 6), torch.ones(1, 2, 8, 6)
    yield Reject("rank", (q[0], cache, cache, 3), {}, "q must be [b, t, h, d]")
    yield Reject("heads", (q[:, :, :3], cache, cache, 3), {}, "multiple of kv_heads = 2 heads")
    yield Reject("dtype", (q.double(), cache, cache, 3), {}, "q must be float32")
    yield Reject("mixed", (q, cache.half(), cache, 3), {}, "keys must be float32, got float16")
    yield Reject("values", (q, cache, cache[:, :1], 3), {}, "values must have shape [1, 2, 8, 6]")
    yield Reject("short", (q, cache, cache, 1), {}, "length must be in 2 .. 8")
    yield Reject("long", (q, cache, cache, 9), {}, "length must be in 2 .. 8")


def _workload(t: int, h: int, kv_heads: int, d: int, keys: int, dtype: str) -> Workload:
    params = {"b": 1, "t": t, "h": h, "kv_heads": kv_heads, "d": d, "keys": keys, "dtype": dtype}

    def make() -> Sample:
        generator = torch.Generator().manual_seed(12)
        q = torch.randn(1, t, h, d, generator=generator).to(getattr(torch, dtype))
        cache = torch.randn(2, 1, kv_heads, keys, d, generator=generator).to(q.dtype)
        return Sample("workload", (q, cache[0], cache[1], keys))

    return Workload(params, make)


def _cost(params: Mapping[str, Any]) -> Cost:
    b, t, h, g, d, keys = (params[name] for name in ("b", "t", "h", "kv_heads", "d", "keys"))
    size = getattr(torch, params["dtype"]).itemsize
    # Queries and keys, weights and values: two products of t h keys d each.
    return Cost(2 * b * (g * keys + t * h) * d * size, 4 * b * t * h * keys * d, "fp32")


def decode_attention_lse(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`decode_attention` with ``return_lse``, which is an operator of its own."""
    return decode_attention(q, keys, values, length, scale, return_lse=True)


def _lse_reference(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    lse = _scores(q, keys, length, scale).logsumexp(-1).transpose(1, 2)
    return decode_attention_reference(q, keys, values, length, scale), lse


def _lse_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, keys, _, length, *rest = sample.args
    d = q.shape[3]
    scale = abs(rest[0]) if rest and rest[0] is not None else 1 / math.sqrt(d)
    # The error of a score is one of the logarithm, and so is a relative one of the sum.
    worst = _scores(q.abs(), keys.abs(), length, scale).nan_to_num(neginf=0.0).amax()
    steps = (d + 7) * worst + length + 20 + expected[1].abs()
    return *_tolerance(sample, expected), EPS[torch.float32] * steps


def _lse_samples() -> Iterator[Sample]:
    yield from (s for s in _samples() if not s.name.startswith(("0x", "2x0x")))
    generator = torch.Generator().manual_seed(10)
    for dtype in EPS:
        # Multi-head latent attention: values lie in the keys.
        q = torch.randn(1, 2, 20, 24, generator=generator).to(dtype)
        latent = torch.randn(1, 1, 150, 24, generator=generator).to(dtype)
        yield Sample(f"latent-{str(dtype)[6:]}", (q, latent, latent[..., :17], 140))


def _lse_rejects() -> Iterator[Reject]:
    q, cache = torch.ones(1, 2, 4, 6), torch.ones(1, 2, 8, 6)
    yield Reject("no-dv", (q, cache, cache[..., :0], 3), {}, "dv at least 1, got [1, 2, 8, 0]")
    yield Reject("length", (q, cache, cache, 9), {}, "length must be in 2 .. 8")


CASES = (
    OpCase(
        "decode_attention",
        decode_attention,
        decode_attention_reference,
        _tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
        workloads=tuple(
            _workload(t, *heads, keys, dtype)
            for heads, lengths in (((9, 3, 64), (64, 1024, 4096)), ((32, 8, 128), (4096, 32768)))
            for keys in lengths
            for t in (1, 4)
            for dtype in ("float32", "bfloat16")
        ),
        cost=_cost,
    ),
    OpCase(
        "decode_attention_lse",
        decode_attention_lse,
        _lse_reference,
        _lse_tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_lse_samples()),
        rejects=lambda: list(_lse_rejects()),
    ),
)
