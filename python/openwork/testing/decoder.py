"""A stack of decoder layers: the operators it stands for, and small nasty calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.activations import rms_norm, rope_append, silu_mul
from ..ops.attention import decode_attention
from ..ops.decoder import decoder_layers as ops_decoder_layers
from ..ops.lowbit import lowbit_linear_overload
from .case import OpCase, Reject, Sample
from .lowbit import make_weight


def decoder_layers(
    x: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor], *rest: Any
) -> tuple[Tensor, ...]:
    """The operator on copies of the caches: what it returns, and the caches afterwards."""
    keys, values = [k.clone() for k in keys], [v.clone() for v in values]
    y = ops_decoder_layers(x, cos, sin, keys, values, *rest)
    return (y, *keys, *values)


def decoder_layers_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    position: int,
    weights: list[Tensor],
    linears: list[int],
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """One operator after another; each of them has a reference of its own."""
    b, t, _ = x.shape
    keys, values = [k.clone() for k in keys], [v.clone() for v in values]
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        attn_norm, mlp_norm, *tensors = weights[18 * i : 18 * (i + 1)]
        numbers = linears[20 * i : 20 * (i + 1)]

        def linear(
            j: int,
            x: Tensor,
            add: Tensor | None = None,
            tensors: list[Tensor] = tensors,
            numbers: list[int] = numbers,
        ) -> Tensor:
            packed, scales, *optional = tensors[4 * j : 4 * j + 4]
            zeros, bias = (tensor if tensor.numel() else None for tensor in optional)
            y: Tensor = lowbit_linear_overload(
                x, packed, scales, zeros, bias, add, *numbers[5 * j : 5 * j + 5]
            )
            return y

        qkv = linear(0, rms_norm(x, attn_norm, eps)).view(b, t, heads + 2 * k.shape[1], k.shape[3])
        q = rope_append(qkv, cos, sin, k, v, position)
        x = linear(1, decode_attention(q, k, v, position + t).flatten(2), x)
        x = linear(3, silu_mul(linear(2, rms_norm(x, mlp_norm, eps))), x)
    return (x, *keys, *values)


def _sample(
    name: str,
    *,
    b: int,
    t: int,
    heads: int,
    kv_heads: int,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
    compute: int = 1,
    symmetric: bool = True,
    bias: bool = False,
    position: int = 3,
    max_len: int = 9,
    d: int = 40,
    head_dim: int = 6,
    ffn: int = 33,
) -> Sample:
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    nothing, weights, linears = torch.empty(0), [], []
    shapes = (
        ((heads + 2 * kv_heads) * head_dim, d),
        (d, heads * head_dim),
        (2 * ffn, d),
        (d, ffn),
    )
    for _ in range(layers):
        weights += [random(d), random(d)]
        for n, k in shapes:
            w = make_weight(n, k, bits, 32 if k >= 32 else 16, symmetric, torch.float16)
            w = replace(w, scales=w.scales / (4 * 2**bits))  # so that values stay near 1
            weights += [w.packed, w.scales, nothing if w.zeros is None else w.zeros]
            weights.append(random(n) if bias else nothing)
            linears += [w.layout_id, n, k, w.group_size, compute]
    angles = random(t, head_dim // 2).float()
    caches = [
        [random(b, kv_heads, max_len, head_dim) for _ in range(layers)] for _ in ("keys", "values")
    ]
    x = random(b, t, d)
    args = (x, angles.cos(), angles.sin(), *caches, position, weights, linears, heads, 1e-5)
    return Sample(name, args)


def _samples() -> Iterator[Sample]:
    yield _sample("token", b=1, t=1, heads=6, kv_heads=2)
    few: dict[str, Any] = {"b": 2, "t": 3, "heads": 3, "kv_heads": 1, "layers": 1}
    yield _sample("one-layer-asymmetric-bias", **few, symmetric=False, bias=True)
    for dtype in (torch.bfloat16, torch.float16):
        for compute in (0, 1):
            name = f"{str(dtype)[6:]}-{compute}"
            yield _sample(name, b=1, t=2, heads=4, kv_heads=4, dtype=dtype, compute=compute, bits=3)
    yield _sample("rows-of-bf16", b=7, t=2, heads=4, kv_heads=4, dtype=torch.bfloat16, compute=0)
    yield _sample("wide", b=1, t=1, heads=8, kv_heads=2, d=512, head_dim=64, ffn=1024, bits=8)
    yield _sample("long", b=2, t=4, heads=4, kv_heads=1, position=400, max_len=512, bits=2)
    yield _sample("first", b=1, t=9, heads=2, kv_heads=1, position=0)
    yield _sample("no-tokens", b=1, t=0, heads=2, kv_heads=1)
    yield _sample("no-sequences", b=0, t=1, heads=2, kv_heads=1)


def _rejects() -> Iterator[Reject]:
    good = _sample("good", b=1, t=2, heads=4, kv_heads=2).args

    def reject(name: str, message: str, at: int, value: object) -> Reject:
        return Reject(name, (*good[:at], value, *good[at + 1 :]), {}, message)

    def changed(at: int, i: int, value: object) -> list[Any]:
        return [*good[at][:i], value, *good[at][i + 1 :]]

    yield reject("rank", "x must be [b, t, d], got [2, 40]", 0, good[0][0])
    yield reject("cos", "cos must have shape [2, 3], got [1, 3]", 1, good[1][:1])
    yield reject("no layers", "keys must hold one tensor a layer, got none", 3, [])
    yield reject("values", "values must hold 2 (1 a layer), got 1", 4, good[4][:1])
    yield reject("weights", "weights must hold 36 (18 a layer), got 35", 6, good[6][1:])
    yield reject("linears", "linears must hold 40 (20 a layer), got 39", 7, good[7][1:])
    yield reject("full", "position must be in 0 .. 7", 5, 8)
    yield reject("heads", "heads must be a multiple of kv_heads = 2, got 3", 8, 3)
    yield reject("ffn", "down must have k in 1 .. 2^31 - 1, got 0", 7, changed(7, 17, 0))
    yield reject("compute", "compute must be 0 (float) or 1 (int8), got 2", 7, changed(7, 4, 2))
    message = "layer 0: mlp_norm must have shape [40]"
    yield reject("norm", message, 6, changed(6, 1, torch.ones(41)))
    message = "layer 0: o: weight must have n = 40 and k = 24, got 41 and 24"
    yield reject("n", message, 7, changed(7, 6, 41))
    message = "layer 1: qkv: layout must be one this build reads, got id 99"
    yield reject("layout", message, 7, changed(7, 20, 99))
    message = "layer 0: o: bias must have shape [40], got [3]"
    yield reject("bias", message, 6, changed(6, 9, torch.ones(3)))
    fewer = [[cache[0], cache[1][:, :1]] for cache in good[3:5]]
    message = "layer 1: keys must have 2 heads, as the first layer's, got 1"
    yield Reject("cache", (*good[:3], *fewer, *good[5:]), {}, message)


def _raw(sample: Sample) -> tuple[Any, ...]:
    # Fresh copies: the operator writes to the caches.
    x, cos, sin, keys, values, *rest = sample.args
    return (x, cos, sin, [k.clone() for k in keys], [v.clone() for v in values], *rest)


CASES = (
    OpCase(
        "decoder_layers",
        decoder_layers,
        decoder_layers_reference,
        lambda sample, expected: tuple(0.0 for _ in expected),
        raw=_raw,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
    ),
)
