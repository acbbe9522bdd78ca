"""Training a dense weight whose forward pass is N:M sparse: straight-through and SR-STE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import layouts
from ..packing import nm_layout_for_bits
from .checks import check
from .nm import nm_linear_overload
from .nm_mask import nm_mask

_BITS = {torch.float32: 32, torch.bfloat16: 16}
_LAYOUT_IDS = {bits: layouts().index(nm_layout_for_bits(bits)) for bits in _BITS.values()}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, keep)
        ctx.decay = decay
        return weight.masked_fill(~keep, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, keep = ctx.saved_tensors
        grad = gradients[0]
        if ctx.decay:
            grad = grad + ctx.decay * weight.masked_fill(keep, 0)
        return grad, None, None


def straight_through(weight: Tensor, keep: Tensor, decay: float) -> Tensor:
    """``W * m``, whose gradient is that of SR-STE (Zhou et al. 2021, arXiv:2102.04010).

    It passes the mask as if it were not there, and pulls what is masked towards zero, so that the
    mask settles: ``dL/dW = dL/d(W * m) + decay * (1 - m) * W``.

    Args:
        weight: ``[n, k]`` floating point, W.
        keep: ``[n, k]`` bool, m.
        decay: lambda of the paper; 0 is the plain straight-through estimator.

    Returns:
        ``[n, k]``, dtype of weight, differentiable in weight, once.

    Example:
        >>> w = torch.tensor([[3.0, 1.0]], requires_grad=True)
        >>> openwork.ops.straight_through(w, torch.tensor([[True, False]]), 0.5).sum().backward()
        >>> w.grad
        tensor([[1.0000, 1.5000]])
    """
    masked: Tensor = _StraightThrough.apply(weight, keep, decay)
    return masked


class _NmProduct(torch.autograd.Function):
    """``x @ weight.T``, of which ``mask`` says what is not zero, with dense gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, kept: int, block: int, vector: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, k = weight.shape
        bits = _BITS[weight.dtype]
        values, index, _ = torch.ops.openwork.compress_nm(
            weight, mask, None, kept, block, vector, bits, k
        )
        numbers = (_LAYOUT_IDS[bits], n, k, kept, block, vector, k, 0)
        y: Tensor = nm_linear_overload(x, values, index, None, None, None, *numbers)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_weight, None, None, None, None


def nm_linear_ste(
    x: Tensor,
    weight: Tensor,
    pattern: tuple[int, int] = (2, 4),
    *,
    vector: int = 1,
    decay: float = 2e-4,
) -> Tensor:
    """Multiply by the N:M part of a dense weight that is being trained: ``x @ (W * m).T``.

    ``m = nm_mask(W)``, anew at each call; the product is :func:`openwork.nm_linear`'s, and the
    gradient that of :func:`openwork.ops.straight_through`:

        grad_x = g @ (W * m)        grad_W = g.T @ x + decay * (1 - m) * W

    Args:
        x: ``[..., k]`` float32 or bfloat16, at least two dimensions.
        weight: ``[n, k]`` W, dtype of x; the dense master weight.
        pattern: ``(N, M)`` as in :func:`openwork.compress_nm`.
        vector: 1, 8, 16 or 32 rows that share a mask.
        decay: see :func:`openwork.ops.straight_through`.

    Returns:
        ``[..., n]``, dtype of x, differentiable in x and weight, once.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> w = torch.tensor([[4.0, 1.0, 2.0, 3.0]], requires_grad=True)
        >>> openwork.ops.nm_linear_ste(torch.ones(1, 4), w, (2, 4), decay=0.5).item()  # 4 + 3
        7.0
        >>> openwork.ops.nm_linear_ste(torch.ones(1, 4), w, (2, 4), decay=0.5).backward()
        >>> w.grad.tolist()
        [[1.0, 1.5, 2.0, 1.0]]
    """
    op = "nm_linear_ste"
    check(
        weight.dtype in _BITS and weight.dtype == x.dtype,
        f"{op}: x and weight must both be float32 or both bfloat16, got {x.dtype} and "
        f"{weight.dtype}",
    )
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    check(x.dim() >= 2, f"{op}: x must have at least two dimensions, got {list(x.shape)}")
    kept, block = pattern
    mask = nm_mask(weight.detach(), pattern, vector=vector)
    masked = straight_through(weight, mask, decay)
    y: Tensor = _NmProduct.apply(x, masked, mask, kept, block, vector)
    return y
