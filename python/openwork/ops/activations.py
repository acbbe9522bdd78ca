"""The elementwise steps of a decoder block, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check,
    check_cache,
    check_float,
    check_operand,
    check_position,
    check_result_rank,
)

# Overloads, looked up once: finding them by name costs half a microsecond a call.
_rms_norm = torch.ops.openwork.rms_norm.default
_silu_mul = torch.ops.openwork.silu_mul.default
_rope = torch.ops.openwork.rope.default
_rope_append = torch.ops.openwork.rope_append.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: ``x * weight / sqrt(mean(x ** 2) + eps)`` over the last dimension.

    Args:
        x: ``[..., d]`` float32, bfloat16 or float16; arithmetic in fp32.
        weight: ``[d]``, dtype of x.
        eps: added to the mean square.

    Returns:
        ``[..., d]``, dtype of x, contiguous. No gradient.

    Raises:
        ValueError: a wrong dtype or shape.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Example:
        >>> openwork.ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0).shape
        torch.Size([1, 2])
    """
    y: Tensor = _rms_norm(x, weight, eps)
    return y


def silu_mul(x: Tensor) -> Tensor:
    """Gated activation of SwiGLU: ``silu(gate) * up`` for ``gate, up = x.chunk(2, -1)``.

    Args:
        x: ``[..., 2 d]`` float32, bfloat16 or float16; arithmetic in fp32.

    Returns:
        ``[..., d]``, dtype of x, contiguous. No gradient.

    Raises:
        ValueError: an odd last dimension or another dtype.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    Example:
        >>> openwork.ops.silu_mul(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """
    y: Tensor = _silu_mul(x)
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on halves: dimension j turns with dimension j + d / 2.

    ``y[j] = x[j] * cos[j] - x[j + d/2] * sin[j]`` and
    ``y[j + d/2] = x[j + d/2] * cos[j] + x[j] * sin[j]`` for ``j < d / 2``.

    Args:
        x: ``[b, t, h, d]`` float32, bfloat16 or float16, d even; any strides, so a view of a fused
            query-key-value projection needs no copy.
        cos: ``[t, d / 2]`` float32, contiguous: cosines at each token's position.
        sin: ``[t, d / 2]`` float32, contiguous.

    Returns:
        ``[b, t, h, d]``, dtype of x, contiguous. No gradient.

    Raises:
        ValueError: a wrong dtype or shape.

    Source: Su et al., "RoFormer", 2021, in the half-split order of GPT-NeoX.

    Example:
        >>> table = torch.zeros(5, 4)
        >>> openwork.ops.rope(torch.ones(1, 5, 2, 8), table + 1, table).shape
        torch.Size([1, 5, 2, 8])
    """
    y: Tensor = _rope(x, cos, sin)
    return y


def rope_append(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    """Rotate the queries and keys of a fused projection, and put keys and values into a cache.

    With ``q, k, v = split(x, [h, g, g])`` along the heads::

        keys[:, :, position : position + t]   = rope(k)
        values[:, :, position : position + t] = v

    Args:
        x: ``[b, t, h + 2 g, d]`` float32, bfloat16 or float16: query heads, then key heads, then
            value heads; any strides.
        cos: ``[t, d / 2]`` float32, contiguous; ``sin`` alike.
        keys: ``[b, g, max_len, d]``, dtype of x, last stride 1. **Modified.**
        values: as keys. **Modified.**
        position: first place written, in ``0 .. max_len - t``.

    Returns:
        ``rope(q)``, ``[b, t, h, d]`` contiguous. No gradient.

    Raises:
        ValueError: a wrong dtype, shape or position.

    Example:
        >>> cache = torch.zeros(2, 1, 2, 8, 4)  # keys and values of 2 heads, 8 places
        >>> table = torch.zeros(3, 2)
        >>> x = torch.ones(1, 3, 6 + 2 * 2, 4)
        >>> openwork.ops.rope_append(x, table + 1, table, cache[0], cache[1], 5).shape
        torch.Size([1, 3, 6, 4])
        >>> cache[1, 0, 0, :, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    """
    q: Tensor = _rope_append(x, cos, sin, keys, values, position)
    return q


@torch.library.register_fake("openwork::rms_norm")
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    op = "rms_norm"
    check_float(op, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] >= 1,
        f"rms_norm: x must have a last dimension of at least 1, got {list(x.shape)}",
    )
    check_operand(op, "weight", weight, x.dtype, [x.shape[-1]])
    check_result_rank(op, x)
    return x.new_empty(x.shape)


@torch.library.register_fake("openwork::silu_mul")
def _silu_mul_fake(x: Tensor) -> Tensor:
    op = "silu_mul"
    check_float(op, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] >= 2 and x.shape[-1] % 2 == 0,
        f"{op}: x must have an even last dimension (gate and up), got {list(x.shape)}",
    )
    check_result_rank(op, x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def check_tables(op: str, cos: Tensor, sin: Tensor, t: int, d: int) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        check_operand(op, name, table, torch.float32, [t, d // 2])


def _check_heads(op: str, x: Tensor) -> None:
    check_float(op, "x", x)
    check(
        x.dim() == 4 and x.shape[3] >= 2 and x.shape[3] % 2 == 0,
        f"{op}: x must be [b, t, h, d] with d even, got {list(x.shape)}",
    )


@torch.library.register_fake("openwork::rope")
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_heads("rope", x)
    check_tables("rope", cos, sin, x.shape[1], x.shape[3])
    return x.new_empty(x.shape)


@torch.library.register_fake("openwork::rope_append")
def _rope_append_fake(
    x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    op = "rope_append"
    _check_heads(op, x)
    b, t, heads, d = x.shape
    check_tables(op, cos, sin, t, d)
    g, max_len = check_cache(op, keys, values, b, d, d, x.dtype)
    check_position(op, max_len, t, position)
    check(
        heads > 2 * g,
        f"{op}: x must have more than 2 * kv_heads = {2 * g} heads, got {heads}",
    )
    return x.new_empty((b, t, heads - 2 * g, d))
