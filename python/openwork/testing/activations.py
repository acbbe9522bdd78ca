"""The fused elementwise steps: references and small nasty calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.activations import rms_norm, rope, silu_mul
from ..ops.activations import rope_append as ops_rope_append
from .case import EPS, TINY, OpCase, Reject, Sample


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x * weight / sqrt(mean(x ** 2) + eps)`` in float64."""
    x = x.double()
    return x * weight.double() / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def silu_mul_reference(x: Tensor) -> Tensor:
    """``silu(gate) * up`` in float64."""
    gate, up = x.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of dimensions j and j + d / 2 in float64."""
    low, high = x.double().chunk(2, dim=-1)
    c, s = cos.double()[:, None, :], sin.double()[:, None, :]
    return torch.cat([low * c - high * s, high * c + low * s], dim=-1)


def rope_append(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on copies of the cache: what it returns, and the cache afterwards."""
    keys, values = keys.clone(), values.clone()
    q = ops_rope_append(x, cos, sin, keys, values, position)
    return q, keys, values


def rope_append_reference(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rope_reference` of queries and keys, and assignments to slices."""
    g, t = keys.shape[1], x.shape[1]
    q, k, v = x.split([x.shape[2] - 2 * g, g, g], dim=2)
    keys, values = keys.double(), values.double()
    keys[:, :, position : position + t] = rope_reference(k, cos, sin).transpose(1, 2)
    values[:, :, position : position + t] = v.double().transpose(1, 2)
    return rope_reference(q, cos, sin), keys, values


def _rounded(expected: Tensor, inner: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Bound for a result that is off by ``inner`` and is then rounded to ``dtype``."""
    return inner + EPS[dtype] * (expected.abs() + inner) + TINY[dtype] * EPS[dtype]


def _rms_norm_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # The sum of d squares has no cancellation: d/2 roundings at most, halved by the square root.
    x, y = sample.args[0], expected[0]
    return (_rounded(y, (x.shape[-1] / 2 + 6) * EPS[torch.float32] * y.abs(), x.dtype),)


def _silu_mul_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # exp and the quotient: 6 roundings, and 3e-7 = 5 more in the exponential. Below a gate of -87
    # the kernel's exponential stops growing: down to -300 it gives up to 2**-117 in place of 0.
    x, y = sample.args[0], expected[0]
    up = x.double().chunk(2, dim=-1)[1]
    return (_rounded(y, 11 * EPS[torch.float32] * y.abs() + 2.0**-117 * up.abs(), x.dtype),)


def _rope_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # The two products may cancel, so the error follows their sizes, not the result's.
    x, cos, sin = sample.args
    parts = rope_reference(
        torch.cat([x.abs().chunk(2, -1)[0], -x.abs().chunk(2, -1)[1]], -1), cos.abs(), sin.abs()
    ).abs()
    size = parts + x.double().abs()
    return (_rounded(expected[0], 3 * EPS[torch.float32] * size, x.dtype),)


def _rope_append_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, cos, sin, keys, _, position = sample.args
    g, t = keys.shape[1], x.shape[1]
    turned = _rope_tolerance(Sample("", (x, cos, sin)), (rope_reference(x, cos, sin),))[0]
    q, k, _ = turned.split([x.shape[2] - 2 * g, g, g], dim=2)
    in_cache = torch.zeros(keys.shape, dtype=torch.float64)
    in_cache[:, :, position : position + t] = k.transpose(1, 2)
    return q, in_cache, torch.zeros_like(in_cache)


def _norm_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(5)
    for shape in ((1, 1), (3, 17), (2, 5, 64), (1, 576), (0, 8), (31,)):
        for dtype in EPS:
            x = torch.randn(shape, generator=generator).to(dtype)
            weight = torch.randn(shape[-1], generator=generator).to(dtype)
            yield Sample(f"{list(shape)}-{str(dtype)[6:]}", (x, weight, 1e-5))
    yield Sample("strided", (torch.randn(16, 6, generator=generator).T, torch.ones(16), 0.0))
    yield Sample("large", (torch.full((2, 8), 1e15), torch.ones(8), 1e-5))


def _silu_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(6)
    for shape in ((1, 2), (3, 34), (2, 5, 64), (1, 3072), (0, 8)):
        for dtype in EPS:
            x = (4 * torch.randn(shape, generator=generator)).to(dtype)
            yield Sample(f"{list(shape)}-{str(dtype)[6:]}", (x,))
    extreme = torch.tensor([[-200.0, -90.0, -40.0, 0.0, 40.0, 90.0, 200.0, 1e4] + [1.0] * 8])
    yield Sample("extreme", (extreme,))


def _rope_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(7)
    for b, t, h, d in ((1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 3, 64), (1, 0, 2, 8)):
        angle = 100 * torch.rand(t, d // 2, generator=generator)
        for dtype in EPS:
            x = torch.randn(b, t, h + 2, d, generator=generator).to(dtype)
            name = f"{b}x{t}x{h}x{d}-{str(dtype)[6:]}"
            # A view of a wider projection, as the model has it.
            yield Sample(name, (x[:, :, :h], angle.cos(), angle.sin()))


def _rope_append_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(8)
    for b, t, h, g, d, position in ((1, 1, 1, 1, 2, 0), (2, 3, 6, 2, 6, 4), (1, 7, 9, 3, 64, 2)):
        angle = 100 * torch.rand(t, d // 2, generator=generator)
        for dtype in EPS:
            x = torch.randn(b, t, h + 2 * g, d, generator=generator).to(dtype)
            cache = torch.randn(2, b, g, 9, d, generator=generator).to(dtype)
            name = f"{b}x{t}x{h}x{g}x{d}-{str(dtype)[6:]}"
            yield Sample(name, (x, angle.cos(), angle.sin(), cache[0], cache[1], position))


def _rope_append_rejects() -> Iterator[Reject]:
    x, table, cache = torch.ones(1, 3, 5, 4), torch.ones(3, 2), torch.ones(1, 2, 8, 4)
    yield Reject("full", (x, table, table, cache, cache, 6), {}, "position must be in 0 .. 5")
    yield Reject("negative", (x, table, table, cache, cache, -1), {}, "position must be in 0 .. 5")
    yield Reject(
        "heads", (x[:, :, :4], table, table, cache, cache, 0), {}, "more than 2 * kv_heads"
    )
    yield Reject(
        "values",
        (x, table, table, cache, cache[:, :1], 0),
        {},
        "values must have shape [1, 2, 8, 4]",
    )


CASES = (
    OpCase(
        "rms_norm",
        rms_norm,
        rms_norm_reference,
        _rms_norm_tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_norm_samples()),
        rejects=lambda: [
            Reject("dtype", (torch.ones(2, 3).double(), torch.ones(3), 1e-5), {}, "x must be"),
            Reject(
                "weight",
                (torch.ones(2, 3), torch.ones(4), 1e-5),
                {},
                "weight must have shape [3], got [4]",
            ),
        ],
    ),
    OpCase(
        "silu_mul",
        silu_mul,
        silu_mul_reference,
        _silu_mul_tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_silu_samples()),
        rejects=lambda: [
            Reject("odd", (torch.ones(2, 3),), {}, "x must have an even last dimension"),
            Reject("dtype", (torch.ones(2, 4).int(),), {}, "x must be float32"),
        ],
    ),
    OpCase(
        "rope",
        rope,
        rope_reference,
        _rope_tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_rope_samples()),
        rejects=lambda: [
            Reject("rank", (torch.ones(2, 3, 4), torch.ones(3, 2), torch.ones(3, 2)), {}, "x must"),
            Reject(
                "cos",
                (torch.ones(1, 3, 2, 4), torch.ones(2, 2), torch.ones(3, 2)),
                {},
                "cos must have shape [3, 2], got [2, 2]",
            ),
        ],
    ),
    OpCase(
        "rope_append",
        rope_append,
        rope_append_reference,
        _rope_append_tolerance,
        # Fresh copies: the operator writes to the cache.
        raw=lambda s: (*s.args[:3], s.args[3].clone(), s.args[4].clone(), s.args[5]),
        samples=lambda: list(_rope_append_samples()),
        rejects=lambda: list(_rope_append_rejects()),
    ),
)
