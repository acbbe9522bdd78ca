"""Training a dense weight whose forward pass is N:M sparse: straight-through and SR-STE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._native import layouts
from ..packing import nm_layout_for_bits
from .checks import check
from .nm import nm_linear_overload

_BITS = {torch.float32: 32, torch.bfloat16: 16}
_LAYOUT_IDS = {bits: layouts().index(nm_layout_for_bits(bits)) for bits in _BITS.values()}


def nm_mask(weight: Tensor, pattern: tuple[int, int] = (2, 4), *, vector: int = 1) -> Tensor:
    """The N:M mask that keeps the largest magnitudes: of each block of M columns the N largest.

    With ``vector`` V, of the sums of ``|weight|`` over V consecutive rows. Of equal magnitudes the
    first is kept.

    Args:
        weight: ``[n, k]`` of any float dtype.
        pattern: ``(N, M)``.
        vector: rows that share a mask.

    Returns:
        ``[n, k]`` bool.

    Raises:
        ValueError: weight is no matrix, or N:M or V is none.

    Example:
        >>> openwork.ops.nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), (2, 4)).int().tolist()
        [[0, 1, 1, 0]]
    """
    op = "nm_mask"
    kept, block = pattern
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    check(1 <= kept < block, f"{op}: pattern must be N:M with 1 <= N < M, got {kept}:{block}")
    check(vector >= 1, f"{op}: vector must be at least 1, got {vector}")
    n, k = weight.shape
    # Columns past k are kept last.
    sizes = pad(weight.abs(), (0, -k % block), value=-1.0)
    sizes = pad(sizes, (0, 0, 0, -n % vector))
    blocks = sizes.view(-1, vector, sizes.shape[1] // block, block).sum(dim=1)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, order[..., :kept], True)
    return mask.flatten(1).repeat_interleave(vector, dim=0)[:n, :k]


class _NmLinearSte(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, kept: int, block: int, vector: int, decay: float
    ) -> Tensor:
        mask = nm_mask(weight, (kept, block), vector=vector)
        n, k = weight.shape
        bits = _BITS[weight.dtype]
        values, index, _ = torch.ops.openwork.compress_nm(
            weight, mask, None, kept, block, vector, bits, k
        )
        layout = _LAYOUT_IDS[bits]
        ctx.save_for_backward(x, weight, mask)
        ctx.decay = decay
        y: Tensor = nm_linear_overload(
            x, values, index, None, None, None, layout, n, k, kept, block, vector, k, 0
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight * mask).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
            if ctx.decay:
                grad_weight = grad_weight + ctx.decay * (weight * ~mask)
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

    ``m = nm_mask(W)``, anew at each call; the product is :func:`openwork.nm_linear`'s. The gradient
    is that of SR-STE (Zhou et al., "Learning N:M fine-grained structured sparse neural networks
    from scratch", 2021): it passes the mask as if it were not there, and pulls what is masked
    towards zero, so that the mask settles:

        grad_x = g @ (W * m)        grad_W = g.T @ x + decay * (1 - m) * W

    Args:
        x: ``[..., k]`` float32 or bfloat16, at least two dimensions.
        weight: ``[n, k]`` W, dtype of x; the dense master weight.
        pattern: ``(N, M)`` as in :func:`openwork.compress_nm`.
        vector: 1, 8, 16 or 32 rows that share a mask.
        decay: lambda of the paper; 0 is the plain straight-through estimator.

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
    y: Tensor = _NmLinearSte.apply(x, weight, kept, block, vector, decay)
    return y
