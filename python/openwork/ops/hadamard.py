"""Walsh-Hadamard transforms of the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check, check_float, check_result_rank

# What csrc/kernels/hadamard/hadamard.h allows.
MAX_BLOCK = 32768

_hadamard = torch.ops.openwork.hadamard.default


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """Multiply blocks of the last dimension by the normalized Walsh-Hadamard matrix.

    With ``H[i, j] = (-1) ** popcount(i & j) / sqrt(block)``, which is symmetric and orthogonal::

        y.view(..., d / block, block) = x.view(..., d / block, block) @ H

    The transform is its own inverse and its own gradient. It spreads outliers over a block, so that
    a rotated activation loses less when it is rounded; weights that meet it are rotated alike.
    Rotations of other sizes are products with it: for ``d = 28 * 512``,
    ``hadamard(x, 512).unflatten(-1, (28, 512))``, multiplied along the 28 by an orthogonal matrix.

    Args:
        x: ``[..., d]`` float32, bfloat16 or float16; made contiguous if it is not. Sums are fp32.
        block: a power of two up to 32768 that divides d; None: d.

    Returns:
        ``[..., d]``, dtype of x, contiguous; differentiable any number of times. A call outside of
        ``torch.inference_mode()`` costs some microseconds more.

    Raises:
        ValueError: a wrong dtype, shape or block.

    Source: the rotations of Ashkboos et al., "QuaRot: outlier-free 4-bit inference in rotated
    LLMs", 2024.

    Example:
        >>> x = torch.tensor([4.0, 0.0, 0.0, 0.0, 3.0, 2.0, 1.0, 0.0])
        >>> openwork.ops.hadamard(x, block=4)
        tensor([2., 2., 2., 2., 3., 1., 2., 0.])
    """
    if block is None:
        block = x.shape[-1] if x.dim() else 1
    y: Tensor = _hadamard(x, block)
    return y


def _keep_block(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.block = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _hadamard(grad, ctx.block), None


torch.library.register_autograd("openwork::hadamard", _backward, setup_context=_keep_block)


@torch.library.register_fake("openwork::hadamard")
def _hadamard_fake(x: Tensor, block: int) -> Tensor:
    op = "hadamard"
    check_float(op, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] >= 1,
        f"{op}: x must have a last dimension of at least 1, got {list(x.shape)}",
    )
    d = x.shape[-1]
    check(
        1 <= block <= MAX_BLOCK and block & (block - 1) == 0 and d % block == 0,
        f"{op}: block must be a power of two up to {MAX_BLOCK} that divides the last dimension of "
        f"x, {d}, got {block}",
    )
    check_result_rank(op, x)
    return x.new_empty(x.shape)
