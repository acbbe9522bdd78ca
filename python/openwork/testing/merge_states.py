"""Merging of attention states: reference and samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.merge_states import merge_states
from .case import EPS, TINY, OpCase, Reject, Sample


def merge_states_reference(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sides' weights in float64."""
    lse = torch.logaddexp(lse1.double(), lse2.double())
    weights = [torch.exp(x.double() - lse).nan_to_num(nan=0.0)[..., None] for x in (lse1, lse2)]
    return weights[0] * o1.double() + weights[1] * o2.double(), lse


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    o1, lse1, o2, lse2 = sample.args
    eps = EPS[torch.float32]
    reach = merge_states_reference(o1.abs(), lse1, o2.abs(), lse2)[0]
    # Each weight: a difference, an exponential, a sum and a quotient, each rounded once or twice.
    far = (lse1 - lse2).abs().nan_to_num(posinf=0.0)[..., None]
    inner = eps * (far + 10) * reach
    o = inner + EPS[o1.dtype] * (expected[0].abs() + inner) + TINY[o1.dtype] * EPS[o1.dtype]
    return (o, eps * (expected[1].abs().nan_to_num(posinf=0.0) + 6))


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(8)
    for shape in ((1,), (3, 17), (2, 5, 3, 64), (0, 4), (4, 0)):
        for dtype in EPS:
            o1, o2 = torch.randn(2, *shape, generator=generator).to(dtype)
            lse1, lse2 = 9 * torch.randn(2, *shape[:-1], generator=generator)
            name = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}"
            yield Sample(name, (o1, lse1, o2, lse2))
    o1, o2 = torch.randn(2, 4, 20, generator=generator)
    lse1 = torch.tensor([1.0, -math.inf, -math.inf, 80.0])
    lse2 = torch.tensor([-math.inf, 2.0, -math.inf, -80.0])
    o1[1:3] = o2[[0, 2]] = 0.0
    yield Sample("empty-sides", (o1, lse1, o2, lse2))
    turned = torch.randn(20, 4, generator=generator).T
    spread = torch.randn(8, generator=generator)[::2]
    yield Sample("strided", (turned, spread, -turned, spread.flip(0)))


def _rejects() -> Iterator[Reject]:
    o, lse = torch.ones(2, 3, 8), torch.ones(2, 3)
    yield Reject("dtype", (o.double(), lse, o, lse), {}, "o1 must be float32")
    yield Reject("mixed", (o, lse, o.half(), lse), {}, "o2 must be float32, got float16")
    yield Reject("shape", (o, lse, o[:1], lse), {}, "o2 must have the shape of o1, [2, 3, 8]")
    yield Reject("lse", (o, lse, o, lse[0]), {}, "lse2 must have the shape of o1 without")
    yield Reject("half-lse", (o, lse.half(), o, lse), {}, "lse1 must be float32")


CASES = (
    OpCase(
        "merge_states",
        merge_states,
        merge_states_reference,
        _tolerance,
        raw=lambda s: s.args,
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
    ),
)
