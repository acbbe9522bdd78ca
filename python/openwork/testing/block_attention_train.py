"""Gradients of block attention: torch's own, of the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..block_index import BlockIndex
from ..ops.block_attention import block_attention
from ..ops.block_attention_train import block_attention_train
from .attention_workloads import WORKLOADS, make_index, make_operands
from .attention_workloads import cost as forward_cost
from .block_attention import BF16_EXP, block_attention_reference, raw_arguments
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Workload


def _train(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    o, lse = block_attention_train(q, k, v, *rest, **kwargs, return_lse=True)
    return o, lse


def _train_reference(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None = None, **kwargs: Any
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = block_attention_reference(
        q, k, v, index, **{**kwargs, "return_lse": True}
    )
    return results


def _forward_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    from .block_attention import _tolerance

    kwargs = {**sample.kwargs, "return_lse": True}
    return _tolerance(Sample(sample.name, sample.args, kwargs), expected)


def backward(
    grad_o: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The operator, on o and lse of the forward one."""
    raw = _raw_backward(Sample("", (grad_o, grad_lse, q, k, v, *rest), kwargs))
    grads: tuple[Tensor, ...] = torch.ops.openwork.block_attention_backward(*raw)
    return grads


def backward_reference(
    grad_o: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """Autograd through the dense formula in float64."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("o", "lse")}
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = inputs = [x.double().requires_grad_() for x in (q, k, v)]
        o, lse = _train_reference(q, k, v, *rest, **kwargs)
        # Rows without keys: their lse is a constant.
        seen = lse.isfinite()
        total = (o * grad_o.double()).sum() + (lse[seen] * grad_lse.double()[seen]).sum()
        if not total.requires_grad:
            return tuple(torch.zeros_like(x) for x in inputs)
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return tuple(
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)
    )


def _backward_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    grad_o, grad_lse, q, k, v = sample.args[:5]
    d, dv = q.shape[3], v.shape[3]
    scale = sample.kwargs.get("scale")
    scale = d**-0.5 if scale is None else scale
    longest = [
        float(x.double().norm(dim=-1).amax()) if x.numel() else 0.0 for x in (q, k, v, grad_o)
    ]
    # A weight: d products in its score, whose error is relative to its own size; lse as much.
    steps = 2 * ((d + 8) * abs(scale) * longest[0] * longest[1] + 8)
    # o was rounded to the dtype of q, as p and ds of bfloat16 may be; grad_p and delta are at most
    # as large as two rows allow.
    inner = EPS[torch.float32] * (steps + 2 * dv + q.shape[1] + k.shape[1] + 16)
    inner += EPS[q.dtype] if q.dtype != torch.float32 else 0.0
    inner += EPS[q.dtype] + BF16_EXP if q.dtype == torch.bfloat16 else 0.0
    slope = longest[2] * longest[3] + (float(grad_lse.abs().amax()) if grad_lse.numel() else 0.0)
    group = q.shape[2] // k.shape[2]
    # Sums of p are 1 along keys, and along queries at most as many as there are.
    many = group * q.shape[1]
    ds = 2 * abs(scale) * slope
    bounds = (ds * longest[1], many * ds * longest[0], many * longest[3])
    return tuple(
        inner * bound + EPS[q.dtype] * (want.abs() + inner * bound) + TINY[q.dtype] * EPS[q.dtype]
        for bound, want in zip(bounds, expected, strict=True)
    )


def _operands() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for shape, dtype in (
        # b, sq, sk, h, kv_heads, d, dv
        ((1, 1, 1, 1, 1, 1, 1), torch.float32),
        ((2, 65, 65, 3, 1, 64, 64), torch.float32),
        ((1, 17, 131, 6, 2, 80, 96), torch.bfloat16),
        ((1, 130, 67, 2, 2, 33, 17), torch.float16),
        ((0, 1, 2, 2, 1, 8, 8), torch.float32),
        ((2, 0, 3, 2, 1, 8, 8), torch.float32),
        ((2, 3, 0, 2, 1, 8, 8), torch.float32),
    ):
        name = f"{'x'.join(map(str, shape))}-{str(dtype)[6:]}"
        yield name, make_operands(*shape, dtype), {}
    qkv = make_operands(1, 70, 100, 4, 2, 40, 40, torch.float32)
    yield "window", qkv, {"window": 40, "sinks": 5, "scale": -0.3}
    yield "far", qkv, {"min_distance": 31}
    index = make_index([(70, 100)], 4, 32, 48, 0.4, 0.1)
    yield "index", (*qkv, index), {}
    yield "window-index", (*qkv, index), {"window": 30, "sinks": 20}
    at_q = torch.tensor([0, 1, 1, 40, 70], dtype=torch.int32)
    at_k = torch.tensor([0, 10, 10, 61, 100], dtype=torch.int32)
    packed = {"cu_seqlens_q": at_q, "cu_seqlens_k": at_k}
    lists = make_index([(1, 10), (0, 0), (39, 51), (30, 39)], 2, 16, 16, 0.5, 0.1)
    yield "packed-index", (*qkv, lists), packed


def _train_samples() -> Iterator[Sample]:
    # The forward pass is block_attention's, whose case has more of them.
    for name, args, kwargs in _operands():
        if name.startswith(("2x", "1x17", "packed")):
            yield Sample(name, args, kwargs)


def _backward_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(31)

    def gradients(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        grad_o = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.dtype)
        return grad_o, torch.randn(q.shape[:3], generator=generator)

    for name, args, kwargs in _operands():
        yield Sample(name, (*gradients(args[0], args[2]), *args), kwargs)
    q, k, v = make_operands(1, 40, 50, 4, 2, 16, 16, torch.float32)
    yield Sample("whole", (*gradients(q, v), q, k, v), {"causal": False, "scale": 0.0})
    cache = torch.stack([k, v]).transpose(2, 3).contiguous().transpose(2, 3)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    grad_o, grad_lse = gradients(q, v)
    wide = grad_o.repeat(1, 1, 1, 2)[..., 16:]
    yield Sample("strided", (wide, grad_lse, turned, *cache), {})


def _raw_backward(sample: Sample) -> tuple[Any, ...]:
    grad_o, grad_lse, *args = sample.args
    kwargs = dict(sample.kwargs)
    o, lse = kwargs.pop("o", None), kwargs.pop("lse", None)
    shared = raw_arguments(Sample("", tuple(args), kwargs))
    if o is None:
        with torch.no_grad():
            o, lse = torch.ops.openwork.block_attention_train(*shared)
    return (grad_o, grad_lse, o, lse, *shared)


def _train_rejects() -> Iterator[Reject]:
    q, k, v = make_operands(1, 40, 50, 4, 2, 6, 6, torch.float32)
    yield Reject("rank", (q[0], k, v), {}, "q must be [b, n, heads, d]")
    yield Reject("mixed", (q, k.half(), v), {}, "k must be float32, got float16")
    yield Reject("window", (q, k, v), {"window": -1}, "window must be at least 0")
    at = torch.tensor([0, 40], dtype=torch.int32)
    yield Reject("one-side", (q, k, v), {"cu_seqlens_q": at}, "must come together")
    index = BlockIndex(torch.tensor([[0, 1]]).int(), torch.tensor([0]).int(), 32, 16)
    yield Reject("rows", (q, k, v, index), {}, "indptr must have shape [1, 3], got [1, 2]")


def _backward_rejects() -> Iterator[Reject]:
    q, k, v = make_operands(1, 40, 50, 4, 2, 6, 8, torch.float32)
    o, lse = torch.ones(1, 40, 4, 8), torch.ones(1, 40, 4)
    saved = {"o": o, "lse": lse}
    good = (o, lse, q, k, v)
    yield Reject("rank", (o, lse, q[0], k, v), saved, "q must be [b, n, heads, d]")
    yield Reject("grad_o", (o[..., :7], *good[1:]), saved, "grad_o must have shape [1, 40, 4, 8]")
    yield Reject("dtype", (o.half(), *good[1:]), saved, "grad_o must be float32, got float16")
    yield Reject("grad_lse", (o, lse.half(), q, k, v), saved, "grad_lse must be float32")
    yield Reject("o", good, {**saved, "o": o[:, 1:]}, "o must have shape [1, 40, 4, 8]")
    yield Reject("lse", good, {**saved, "lse": lse[:, 1:]}, "lse must have shape [1, 40, 4]")


def workload_gradient(params: Mapping[str, Any]) -> Tensor:
    """Normal grad_o of a workload."""
    generator = torch.Generator().manual_seed(7)
    shape = (1, params["keys"], params["h"], params["d"])
    return torch.randn(shape, generator=generator).to(getattr(torch, params["dtype"]))


def _backward_workload(forward: Workload) -> Workload:
    """Of a workload of block_attention, whose results are given."""

    def make() -> Sample:
        sample = forward.make()
        o, lse = block_attention(*sample.args, return_lse=True)
        grad_o = workload_gradient(forward.params)
        return Sample(
            "workload", (grad_o, torch.zeros_like(lse), *sample.args), {"o": o, "lse": lse}
        )

    return Workload(forward.params, make)


def _backward_cost(params: Mapping[str, Any]) -> Cost:
    # Five products for the forward pass's two; o and grad_o are read, and three gradients written.
    forward = forward_cost(params)
    return Cost(2 * forward.bytes, forward.ops * 5 // 2, forward.unit)


CASES = (
    OpCase(
        "block_attention_train",
        _train,
        _train_reference,
        _forward_tolerance,
        raw=raw_arguments,
        samples=lambda: list(_train_samples()),
        rejects=lambda: list(_train_rejects()),
    ),
    OpCase(
        "block_attention_backward",
        backward,
        backward_reference,
        _backward_tolerance,
        raw=_raw_backward,
        samples=lambda: list(_backward_samples()),
        rejects=lambda: list(_backward_rejects()),
        workloads=tuple(
            _backward_workload(workload)
            for workload in WORKLOADS
            if workload.params["keys"] == 4096 and workload.params["pattern"] in ("dense", "blocks")
        ),
        cost=_backward_cost,
    ),
)
