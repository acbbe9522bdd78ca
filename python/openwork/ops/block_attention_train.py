"""Block attention with gradients for queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_index import BlockIndex
from .block_attention import check_attention, shared_arguments
from .checks import check_dtype, check_operand, check_shape

_train = torch.ops.openwork.block_attention_train.default
_backward_overload = torch.ops.openwork.block_attention_backward.default

# Arguments of block_attention_train that are tensors: q, k, v, the lists, and the offsets.
_TENSORS = 9


def block_attention_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    min_distance: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`openwork.ops.block_attention` with gradients for q, k and v.

    With ``p = exp(scale * q @ k.T - lse)`` on the pairs that are listed and visible, computed again
    in the backward pass::

        delta  = rowsum(o * grad_o) - grad_lse
        ds     = scale * p * (grad_o @ v.T - delta)
        grad_q = ds @ k        grad_k = ds.T @ q        grad_v = p.T @ grad_o

    Sums are fp32 whatever the dtype. On CPUs with dot products of bfloat16, p and ds of bfloat16
    inputs are rounded to it before they are multiplied, as in torch's own backward: against
    float64, the error of grad_q is level with torch's, and those of grad_k and grad_v are smaller.
    What the index leaves out has no gradient, and the index itself is taken as given. Gradients do
    not depend on the number of threads. A call outside of ``torch.no_grad()`` costs some
    microseconds more than :func:`openwork.ops.block_attention`.

    Args:
        q: ``[b, sq, h, d]`` float32, bfloat16 or float16.
        k: ``[b, sk, kv_heads, d]``, dtype of q.
        v: ``[b, sk, kv_heads, dv]``, alike.
        index: which keys each block of queries reads; None: all.
        causal: as in :func:`openwork.ops.block_attention`, like the rest.
        window: of keys seen; 0: no limit.
        sinks: first keys of a sequence, seen beyond the window.
        min_distance: from a query to the nearest key it sees.
        scale: of the scores; None: ``1 / sqrt(d)``.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.
        return_lse: also give lse, which has a gradient too.

    Returns:
        o ``[b, sq, h, dv]``, dtype of q, or a tuple of o and lse ``[b, sq, h]`` float32;
        differentiable in q, k and v, once.

    Raises:
        ValueError: as :func:`openwork.ops.block_attention`.

    Source: Dao, "FlashAttention-2: faster attention with better parallelism and work
    partitioning", 2023.

    Example:
        >>> q, k, v = torch.ones(3, 1, 4, 1, 8).unbind()
        >>> v = v.clone().requires_grad_()
        >>> openwork.ops.block_attention_train(q, k, v).sum().backward()
        >>> v.grad[0, :, 0, 0].mul(12).round().tolist()  # 1 + 1/2 + 1/3 + 1/4, ...
        [25.0, 13.0, 7.0, 3.0]
    """
    masks = (causal, window, sinks, min_distance)
    shared = shared_arguments(index, *masks, scale, cu_seqlens_q, cu_seqlens_k)
    o, lse = _train(q, k, v, *shared)
    return (o, lse) if return_lse else o


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = inputs[:_TENSORS]
    ctx.present = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*output, *(tensor for tensor in tensors if tensor is not None))
    ctx.options = inputs[_TENSORS:]


def _backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    o, lse, *saved = ctx.saved_tensors
    rest = iter(saved)
    tensors = [next(rest) if present else None for present in ctx.present]
    grads = _backward_overload(grad_o, grad_lse, o, lse, *tensors, *ctx.options)
    return (*grads, *[None] * (_TENSORS - 3 + len(ctx.options)))


torch.library.register_autograd(
    "openwork::block_attention_train", _backward, setup_context=_save_for_backward
)


@torch.library.register_fake("openwork::block_attention_train")
def _train_fake(q: Tensor, k: Tensor, v: Tensor, *shared: Any) -> tuple[Tensor, Tensor]:
    check_attention("block_attention_train", q, k, v, *shared)
    b, sq, h, _ = q.shape
    return q.new_empty((b, sq, h, v.shape[3])), q.new_empty((b, sq, h), dtype=torch.float32)


@torch.library.register_fake("openwork::block_attention_backward")
def _backward_fake(
    grad_o: Tensor,
    grad_lse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *shared: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "block_attention_backward"
    check_attention(op, q, k, v, *shared)
    b, sq, h, _ = q.shape
    shape = [b, sq, h, v.shape[3]]
    check_operand(op, "o", o, q.dtype, shape)
    check_operand(op, "lse", lse, torch.float32, shape[:3])
    check_dtype(op, "grad_o", grad_o, q.dtype)
    check_shape(op, "grad_o", grad_o, shape)
    check_dtype(op, "grad_lse", grad_lse, torch.float32)
    check_shape(op, "grad_lse", grad_lse, shape[:3])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
