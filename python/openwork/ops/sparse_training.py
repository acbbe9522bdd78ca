"""Training on a support: a sparse linear with gradients, and the gradient of its values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..packing import SparseWeight, sparse_padding
from .checks import check, check_dtype, check_linear_x, check_operand, linear_result
from .sparse import (
    TAGS,
    check_geometry,
    check_index,
    check_nnz,
    check_pattern,
    check_values,
    compress_sparse,
    expand_sparse,
    pattern_shape,
    sparse_linear_overload,
)

sparse_linear_train_overload = torch.ops.openwork.sparse_linear_train.default
sparse_values_grad_overload = torch.ops.openwork.sparse_values_grad.default


def sparse_values_grad(g: Tensor, x: Tensor, weight: SparseWeight) -> Tensor:
    """Gradient of the stored values: ``(g.T @ x)`` where elements are stored, and nowhere else.

    A product of dense matrices sampled at the support (SDDMM): ``2 m nnz`` operations, and no
    ``[n, k]`` gradient.

    Args:
        g: ``[..., n]``, the gradient of the result, dtype of x.
        x: ``[..., k]`` float32, bfloat16 or float16.
        weight: the pattern; its values are not read.

    Returns:
        float32 of the length and in the order of ``weight.values``, its zeros among them.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> w = openwork.compress_sparse(torch.eye(16, 32))
        >>> g = openwork.ops.sparse_values_grad(torch.ones(2, 16), torch.ones(2, 32), w)
        >>> g[: w.nnz].unique().item()
        2.0
    """
    grad: Tensor = sparse_values_grad_overload(
        g, x, weight.index, weight.offsets, weight.nnz, weight.layout_id, weight.n, weight.k
    )
    return grad


def transposed_pattern(weight: SparseWeight) -> tuple[SparseWeight, Tensor]:
    """The pattern of the transposed weight, and where its values are in the weight's.

    Returns:
        A :class:`~openwork.SparseWeight` ``[k, n]`` of float32 in the same layout, and ``order``
        int64, as long as the values, with ``transposed.values = weight.values[order]``.

    Example:
        >>> w = openwork.compress_sparse(torch.randn(20, 30))
        >>> t, order = openwork.ops.transposed_pattern(w)
        >>> torch.equal(openwork.expand_sparse(t), openwork.expand_sparse(w).T)
        True
    """
    # Places as the bits of floats, which packing moves and does not read.
    place = torch.arange(weight.values.numel(), dtype=torch.int32)
    dense = expand_sparse(_with_values(weight, place.view(torch.float32)))
    stored = expand_sparse(_with_values(weight, torch.ones(len(place)))) != 0
    pattern = compress_sparse(dense.T.contiguous(), stored.T.contiguous(), layout=weight.layout)
    order = pattern.values.view(torch.int32).long()
    order[pattern.nnz :] = place[pattern.nnz :]
    return _with_values(pattern, weight.values.float()[order]), order


def _with_values(weight: SparseWeight, values: Tensor) -> SparseWeight:
    return replace(weight, values=values, scales=None)


def sparse_linear_train(
    x: Tensor, values: Tensor, weight: SparseWeight, transposed: SparseWeight, order: Tensor
) -> Tensor:
    """:func:`openwork.sparse_linear` with gradients for x and for the stored values.

    The gradient of the values is the dense gradient restricted to the support, by
    :func:`sparse_values_grad`; that of x is a product with the transposed weight. No dense weight
    and no dense gradient is made. A call outside of ``torch.no_grad()`` costs some microseconds
    more than :func:`openwork.sparse_linear`.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16.
        values: float32 of the length of ``weight.values``, in place of them.
        weight: the pattern.
        transposed: its transposed pattern, and
        order: where the transposed values are, both from :func:`transposed_pattern`.

    Returns:
        ``[..., n]``, dtype of x.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> w = openwork.compress_sparse(torch.eye(16, 32))
        >>> values = w.values.clone().requires_grad_()
        >>> y = openwork.ops.sparse_linear_train(
        ...     torch.ones(3, 32), values, w, *openwork.ops.transposed_pattern(w)
        ... )
        >>> y.sum().backward()
        >>> values.grad[: w.nnz].unique().item()
        3.0
    """
    y: Tensor = sparse_linear_train_overload(
        x,
        values,
        weight.index,
        weight.offsets,
        transposed.index,
        transposed.offsets,
        order,
        weight.layout_id,
        weight.n,
        weight.k,
    )
    return y


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, offsets, t_index, t_offsets, order, *numbers = inputs
    ctx.save_for_backward(x, values, index, offsets, t_index, t_offsets, order)
    ctx.numbers = numbers


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index, offsets, t_index, t_offsets, order = ctx.saved_tensors
    layout, n, k = ctx.numbers
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        t_values = values.index_select(0, order)
        grad_x = sparse_linear_overload(
            g, t_index, t_offsets, t_values, None, None, None, layout, k, n
        )
    if ctx.needs_input_grad[1]:
        nnz = values.shape[0] - sparse_padding(TAGS[layout])
        grad_values = sparse_values_grad_overload(
            g.to(x.dtype), x, index, offsets, nnz, layout, n, k
        )
    return (grad_x, grad_values, *[None] * 8)


torch.library.register_autograd(
    "openwork::sparse_linear_train", _backward, setup_context=_save_for_backward
)


@torch.library.register_fake("openwork::sparse_linear_train")
def _sparse_linear_train_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    t_index: Tensor,
    t_offsets: Tensor,
    order: Tensor,
    layout: int,
    n: int,
    k: int,
) -> Tensor:
    op = "sparse_linear_train"
    check_linear_x(op, x, k)
    check_dtype(op, "values", values, torch.float32)
    tag = check_geometry(op, layout, n, k)
    nnz = check_values(op, values, tag)
    check_pattern(op, index, offsets, tag, n, k, nnz)
    check_index(op, "t_index", t_index, tag, k, n, nnz)
    check_operand(op, "t_offsets", t_offsets, torch.int32, pattern_shape(tag, k, n))
    check_operand(op, "order", order, torch.int64, [nnz + sparse_padding(tag)])
    return linear_result(op, x, n, None, None)


@torch.library.register_fake("openwork::sparse_values_grad")
def _sparse_values_grad_fake(
    g: Tensor, x: Tensor, index: Tensor, offsets: Tensor, nnz: int, layout: int, n: int, k: int
) -> Tensor:
    op = "sparse_values_grad"
    check_linear_x(op, x, k)
    check_dtype(op, "g", g, x.dtype)
    check(
        g.dim() == x.dim() and g.shape[-1] == n,
        f"{op}: g must have the dimensions of x and a last one of n = {n}, got {list(g.shape)}",
    )
    check(
        g.shape[:-1] == x.shape[:-1],
        f"{op}: g must have the rows of x, {list(x.shape)}, got {list(g.shape)}",
    )
    tag = check_geometry(op, layout, n, k)
    check_nnz(op, nnz, n, k)
    check_pattern(op, index, offsets, tag, n, k, nnz)
    return x.new_empty((nnz + sparse_padding(tag),), dtype=torch.float32)
