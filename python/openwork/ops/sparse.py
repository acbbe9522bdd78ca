"""Weights of which any elements are stored: compressing, and the linears over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import layouts
from ..packing import BlockSparseWeight, SparseWeight
from .block_sparse import block_sparse_linear_overload
from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_linear_x,
    check_operand,
    check_shape,
    check_value_type,
    check_weight_size,
    linear_result,
)

# The overloads, looked up once: finding one by name costs half a microsecond a call.
sparse_linear_overload = torch.ops.openwork.sparse_linear.default

LAYOUT = "bitmask_n16k64@1"
PANEL = 16
_BLOCK_K = 64
PADDING = PANEL * _BLOCK_K


def compress_sparse(
    weight: Tensor, mask: Tensor | None = None, scales: Tensor | None = None
) -> SparseWeight:
    """Store some elements of a weight for :func:`sparse_linear`.

    Takes ``nnz`` values, one bit an element, and 4 bytes for each 1024 elements: fewer bytes than
    the dense weight below a density of 96 % (float32), 93 % (bfloat16), 87 % (int8).

    Args:
        weight: ``[n, k]`` float32, bfloat16, or int8 codes.
        mask: ``[n, k]`` bool: the elements to store, zeros among them; None: those that are not
            zero.
        scales: ``[n]`` float32 that rows are multiplied by, as int8 codes want; or None.

    Returns:
        A :class:`~openwork.SparseWeight` of new tensors in huge-page memory.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> w = openwork.compress_sparse(torch.eye(32, 100))
        >>> w.nnz, w.layout
        (32, 'bitmask_n16k64@1')
    """
    stored = weight if mask is None else mask
    nnz = int(torch.count_nonzero(stored)) if isinstance(stored, Tensor) else 0
    masks, offsets, values = torch.ops.openwork.compress_sparse(weight, mask, nnz)
    n, k = weight.shape
    return SparseWeight(masks, offsets, values, scales, LAYOUT, n, k).in_huge_pages()


def expand_sparse(weight: SparseWeight) -> Tensor:
    """The inverse of :func:`compress_sparse`: zeros where nothing is stored.

    Returns:
        ``[n, k]`` in the dtype of the values, not multiplied by ``weight.scales``.

    Raises:
        ValueError: tensors that do not fit the layout.

    Example:
        >>> w = openwork.compress_sparse(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        >>> openwork.expand_sparse(w).tolist()
        [[0.0, 2.0], [0.0, 0.0]]
    """
    w: Tensor = torch.ops.openwork.expand_sparse(
        weight.masks, weight.offsets, weight.values, weight.layout_id, weight.n, weight.k
    )
    return w


def sparse_linear(
    x: Tensor,
    weight: SparseWeight | BlockSparseWeight,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Multiply by a sparse weight: ``x @ expand(weight).T + bias + add``.

    Reads ``weight.nbytes`` bytes of weights; fp32 sums, and one rounding to the dtype of x at the
    end. The result does not depend on the number of threads; that of a row may differ in its last
    bits with the number of rows, which decides on the kernel. What is not stored takes no part: an
    infinity of x there does not become a NaN.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16; made contiguous if it is not. Not rounded,
            whatever the dtype of the values: int8 saves bytes of the weight.
        weight: from :func:`compress_sparse` or :func:`compress_block_sparse`.
        bias: ``[n]``, dtype of x, or None.
        add: ``[..., n]``, shape and dtype of the result, or None: a residual or another term of a
            sum of weights, added in fp32 before rounding. Not modified.

    Returns:
        ``[..., n]``, dtype of x. No gradient; see :func:`openwork.ops.sparse_linear_train`.

    Raises:
        ValueError: a wrong dtype or shape, a layout this build does not read, or offsets or indices
            outside of the tensors they point into.

    Example:
        >>> w = openwork.compress_sparse(torch.eye(16, 32))
        >>> openwork.sparse_linear(torch.arange(32.0), w)[5].item()
        5.0
    """
    overload, tensors, numbers = sparse_arguments(weight)
    y: Tensor = overload(x, *tensors, bias, add, *numbers)
    return y


def sparse_arguments(
    weight: SparseWeight | BlockSparseWeight,
) -> tuple[Any, tuple[Tensor | None, ...], tuple[int, int, int]]:
    """The overload :func:`sparse_linear` calls, and what it takes after x and after add."""
    numbers = (weight.layout_id, weight.n, weight.k)
    if isinstance(weight, BlockSparseWeight):
        blocks = (weight.indptr, weight.indices, weight.values, weight.scales)
        return block_sparse_linear_overload, blocks, numbers
    tensors = (weight.masks, weight.offsets, weight.values, weight.scales)
    return sparse_linear_overload, tensors, numbers


def check_layout_is(op: str, layout: int, want: str) -> None:
    tags = layouts()
    known = 0 <= layout < len(tags)
    got = tags[layout] if known else f"id {layout}"
    check(known and got == want, f"{op}: layout must be {want}, got {got}")


def pattern_shape(n: int, k: int) -> list[int]:
    return [-(-n // PANEL), -(-k // _BLOCK_K)]


def check_pattern(op: str, masks: Tensor, offsets: Tensor, layout: int, n: int, k: int) -> None:
    check_layout_is(op, layout, LAYOUT)
    check_weight_size(op, n, k)
    check_operand(op, "masks", masks, torch.int64, [*pattern_shape(n, k), PANEL])
    check_operand(op, "offsets", offsets, torch.int32, pattern_shape(n, k))


def check_nnz(op: str, nnz: int, n: int, k: int) -> None:
    most = min(n * k, 2**31 - 1)
    check(0 <= nnz <= most, f"{op}: nnz must be in 0 .. {most}, got {nnz}")


def check_values(op: str, values: Tensor) -> int:
    check(
        values.dim() == 1 and values.shape[0] >= PADDING,
        f"{op}: values must be [nnz + 1024], got {list(values.shape)}",
    )
    check_contiguous(op, "values", values)
    nnz = values.shape[0] - PADDING
    check(nnz < 2**31, f"{op}: values must be fewer than 2^31, got {nnz}")
    return nnz


@torch.library.register_fake("openwork::sparse_linear")
def _sparse_linear_fake(
    x: Tensor,
    masks: Tensor,
    offsets: Tensor,
    values: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    layout: int,
    n: int,
    k: int,
) -> Tensor:
    op = "sparse_linear"
    check_linear_x(op, x, k)
    check_value_type(op, "values", values)
    check_values(op, values)
    check_pattern(op, masks, offsets, layout, n, k)
    if scales is not None:
        check_operand(op, "scales", scales, torch.float32, [n])
    return linear_result(op, x, n, bias, add)


@torch.library.register_fake("openwork::compress_sparse")
def _compress_sparse_fake(
    weight: Tensor, mask: Tensor | None, nnz: int
) -> tuple[Tensor, Tensor, Tensor]:
    op = "compress_sparse"
    check_value_type(op, "weight", weight)
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    n, k = weight.shape
    check_weight_size(op, n, k)
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        check_shape(op, "mask", mask, [n, k])
    check_nnz(op, nnz, n, k)
    return (
        weight.new_empty([*pattern_shape(n, k), PANEL], dtype=torch.int64),
        weight.new_empty(pattern_shape(n, k), dtype=torch.int32),
        weight.new_empty((nnz + PADDING,)),
    )


@torch.library.register_fake("openwork::expand_sparse")
def _expand_sparse_fake(
    masks: Tensor, offsets: Tensor, values: Tensor, layout: int, n: int, k: int
) -> Tensor:
    op = "expand_sparse"
    check_value_type(op, "values", values)
    check_values(op, values)
    check_pattern(op, masks, offsets, layout, n, k)
    return values.new_empty((n, k))
