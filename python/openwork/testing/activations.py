"""The fused elementwise steps: references and small nasty calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.activations import rms_norm, rope, silu_mul
from .case import OpCase, Reject, Sample

_EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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


def _relative(roundings: float):  # type: ignore[no-untyped-def]
    """Bound for `roundings` fp32 steps that each keep the result's size, and the last rounding."""

    def tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
        eps = roundings * 2.0**-24 + _EPS[sample.args[0].dtype]
        return (eps * expected[0].abs() + 2.0**-24 * _EPS[sample.args[0].dtype],)

    return tolerance


def _rms_norm_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # The sum of d squares has no cancellation: d/2 roundings at most, halved by the square root.
    return _relative(sample.args[0].shape[-1] / 2 + 6)(sample, expected)


def _rope_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # The two products may cancel, so the error follows their sizes, not the result's.
    x, cos, sin = sample.args
    parts = rope_reference(
        torch.cat([x.abs().chunk(2, -1)[0], -x.abs().chunk(2, -1)[1]], -1), cos.abs(), sin.abs()
    ).abs()
    size = parts + x.double().abs()
    eps = _EPS[x.dtype]
    return (3 * 2.0**-24 * size + eps * expected[0].abs() + 2.0**-24 * eps,)


def _norm_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(5)
    for shape in ((1, 1), (3, 17), (2, 5, 64), (1, 576), (0, 8), (31,)):
        for dtype in _EPS:
            x = torch.randn(shape, generator=generator).to(dtype)
            weight = torch.randn(shape[-1], generator=generator).to(dtype)
            yield Sample(f"{list(shape)}-{str(dtype)[6:]}", (x, weight, 1e-5))
    yield Sample("strided", (torch.randn(16, 6, generator=generator).T, torch.ones(16), 0.0))
    yield Sample("large", (torch.full((2, 8), 1e15), torch.ones(8), 1e-5))


def _silu_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(6)
    for shape in ((1, 2), (3, 34), (2, 5, 64), (1, 3072), (0, 8)):
        for dtype in _EPS:
            x = (4 * torch.randn(shape, generator=generator)).to(dtype)
            yield Sample(f"{list(shape)}-{str(dtype)[6:]}", (x,))
    extreme = torch.tensor([[-200.0, -90.0, -40.0, 0.0, 40.0, 90.0, 200.0, 1e4] + [1.0] * 8])
    yield Sample("extreme", (extreme,))


def _rope_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(7)
    for b, t, h, d in ((1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 3, 64), (1, 0, 2, 8)):
        angle = 100 * torch.rand(t, d // 2, generator=generator)
        for dtype in _EPS:
            x = torch.randn(b, t, h + 2, d, generator=generator).to(dtype)
            name = f"{b}x{t}x{h}x{d}-{str(dtype)[6:]}"
            # A view of a wider projection, as the model has it.
            yield Sample(name, (x[:, :, :h], angle.cos(), angle.sin()))


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
        # exp and the quotient: 6 roundings, and 3e-7 = 5 more in the exponential.
        _relative(11),
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
)
