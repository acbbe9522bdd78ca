"""Weights of which any elements are stored: compressing, and the linears over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import layouts
from ..packing import (
    SPARSE_LAYOUTS,
    BlockSparseWeight,
    SparseWeight,
    block_of,
    sparse_padding,
)
from .block_sparse import block_sparse_linear_overload
from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_linear_x,
    check_operand,
    check_shape,
    check_weight_size,
    dtype_name,
    linear_result,
)

# The overloads, looked up once: finding one by name costs half a microsecond a call.
sparse_linear_overload = torch.ops.openwork.sparse_linear.default

# Asked for once: an operator that returns texts cannot be traced.
TAGS = layouts()
PANEL = 16
BITMASK, BYTES = "bitmask_n16k64@1", "bytes_n16k256@1"
# The density up to which a weight is stored with a byte a value: where that is less than a bit an
# element.
BYTES_DENSITY = 1 / 8
_VALUE_TYPES = (torch.float32, torch.bfloat16, torch.int8)


def compress_sparse(
    weight: Tensor,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    layout: str | None = None,
) -> SparseWeight:
    """Store some elements of a weight for :func:`sparse_linear`.

    Takes ``nnz`` values and either one bit an element (``"bitmask_n16k64@1"``: fewer bytes than the
    dense weight below a density of 96 % (float32), 93 % (bfloat16), 87 % (int8)) or one byte a
    value (``"bytes_n16k256@1"``).

    Args:
        weight: ``[n, k]`` float32, bfloat16, or int8 codes.
        mask: ``[n, k]`` bool: the elements to store, zeros among them; None: those that are not
            zero.
        scales: ``[n]`` float32 that rows are multiplied by, as int8 codes want; or None.
        layout: one of the two; None: bytes up to a density of an eighth, where they are fewer.

    Returns:
        A :class:`~openwork.SparseWeight` of new tensors in huge-page memory.

    Raises:
        ValueError: a wrong dtype or shape, or an unknown layout.

    Example:
        >>> w = openwork.compress_sparse(torch.eye(32, 100))
        >>> w.nnz, w.layout
        (32, 'bytes_n16k256@1')
    """
    stored = weight if mask is None else mask
    nnz = int(torch.count_nonzero(stored)) if isinstance(stored, Tensor) else 0
    if layout is None:
        few = isinstance(stored, Tensor) and nnz <= BYTES_DENSITY * stored.numel()
        layout = BYTES if few else BITMASK
    elif layout not in SPARSE_LAYOUTS:
        raise ValueError(f"compress_sparse: {_layout_message(layout)}")
    number = TAGS.index(layout)
    index, offsets, values = torch.ops.openwork.compress_sparse(weight, mask, nnz, number)
    n, k = weight.shape
    return SparseWeight(index, offsets, values, scales, layout, n, k).in_huge_pages()


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
        weight.index, weight.offsets, weight.values, weight.layout_id, weight.n, weight.k
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
    end. The result does not depend on the number of threads. What is not stored takes no part: an
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
        return block_sparse_linear_overload, (weight.indptr, weight.indices, weight.values), numbers
    tensors = (weight.index, weight.offsets, weight.values, weight.scales)
    return sparse_linear_overload, tensors, numbers


def check_layout_is(op: str, layout: int, want: str) -> None:
    tags = layouts()
    known = 0 <= layout < len(tags)
    got = tags[layout] if known else f"id {layout}"
    check(known and got == want, f"{op}: layout must be {want}, got {got}")


def _layout_message(got: str) -> str:
    return f"layout must be {' or '.join(SPARSE_LAYOUTS)}, got {got}"


def check_sparse_layout(op: str, layout: int) -> str:
    tag = TAGS[layout] if 0 <= layout < len(TAGS) else f"id {layout}"
    check(tag in SPARSE_LAYOUTS, f"{op}: {_layout_message(tag)}")
    return tag


def check_value_type(op: str, name: str, tensor: Tensor) -> None:
    check(tensor is not None, f"{op}: {name} must be a tensor, got None")
    check(
        tensor.dtype in _VALUE_TYPES,
        f"{op}: {name} must be float32, bfloat16 or int8, got {dtype_name(tensor.dtype)}",
    )


def pattern_shape(tag: str, n: int, k: int) -> list[int]:
    return [-(-n // PANEL), -(-k // block_of(tag))]


def _index_shape(tag: str, n: int, k: int, nnz: int) -> list[int]:
    panels, blocks = pattern_shape(tag, n, k)
    if tag == BITMASK:
        return [panels, blocks, PANEL]
    return [2 * PANEL * panels * blocks + nnz + sparse_padding(tag)]


def _index_dtype(tag: str) -> torch.dtype:
    return torch.int64 if tag == BITMASK else torch.uint8


def check_geometry(op: str, layout: int, n: int, k: int) -> str:
    tag = check_sparse_layout(op, layout)
    check_weight_size(op, n, k)
    return tag


def check_index(op: str, name: str, index: Tensor, tag: str, n: int, k: int, nnz: int) -> None:
    check_operand(op, name, index, _index_dtype(tag), _index_shape(tag, n, k, nnz))


def check_pattern(
    op: str, index: Tensor, offsets: Tensor, tag: str, n: int, k: int, nnz: int
) -> None:
    check_index(op, "index", index, tag, n, k, nnz)
    check_operand(op, "offsets", offsets, torch.int32, pattern_shape(tag, n, k))


def check_nnz(op: str, nnz: int, n: int, k: int) -> None:
    most = min(n * k, 2**31 - 1)
    check(0 <= nnz <= most, f"{op}: nnz must be in 0 .. {most}, got {nnz}")


def check_values(op: str, values: Tensor, tag: str) -> int:
    padding = sparse_padding(tag)
    check(
        values.dim() == 1 and values.shape[0] >= padding,
        f"{op}: values must be [nnz + {padding}], got {list(values.shape)}",
    )
    check_contiguous(op, "values", values)
    nnz = values.shape[0] - padding
    check(nnz < 2**31, f"{op}: values must be fewer than 2^31, got {nnz}")
    return nnz


@torch.library.register_fake("openwork::sparse_linear")
def _sparse_linear_fake(
    x: Tensor,
    index: Tensor,
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
    tag = check_geometry(op, layout, n, k)
    nnz = check_values(op, values, tag)
    check_pattern(op, index, offsets, tag, n, k, nnz)
    if scales is not None:
        check_operand(op, "scales", scales, torch.float32, [n])
    return linear_result(op, x, n, bias, add)


@torch.library.register_fake("openwork::compress_sparse")
def _compress_sparse_fake(
    weight: Tensor, mask: Tensor | None, nnz: int, layout: int
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
    tag = check_sparse_layout(op, layout)
    return (
        weight.new_empty(_index_shape(tag, n, k, nnz), dtype=_index_dtype(tag)),
        weight.new_empty(pattern_shape(tag, n, k), dtype=torch.int32),
        weight.new_empty((nnz + sparse_padding(tag),)),
    )


@torch.library.register_fake("openwork::expand_sparse")
def _expand_sparse_fake(
    index: Tensor, offsets: Tensor, values: Tensor, layout: int, n: int, k: int
) -> Tensor:
    op = "expand_sparse"
    check_value_type(op, "values", values)
    tag = check_geometry(op, layout, n, k)
    nnz = check_values(op, values, tag)
    check_pattern(op, index, offsets, tag, n, k, nnz)
    return values.new_empty((n, k))
