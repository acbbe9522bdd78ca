"""Weights of which whole square blocks are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import layouts
from ..packing import BLOCK_LAYOUTS, BlockSparseWeight, block_of
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

block_sparse_linear_overload = torch.ops.openwork.block_sparse_linear.default

_BLOCKS = {block_of(tag): tag for tag in BLOCK_LAYOUTS}


def compress_block_sparse(
    weight: Tensor, block: int, mask: Tensor | None = None, scales: Tensor | None = None
) -> BlockSparseWeight:
    """Store some square blocks of a weight for :func:`sparse_linear` (BSR).

    A block is stored whole, and 4 bytes of index with it. Any n and k: the last blocks are filled
    up with zeros.

    Args:
        weight: ``[n, k]`` float32, bfloat16, or int8 codes.
        block: rows and columns of a block: 16, 32 or 64.
        mask: ``[ceil(n / block), ceil(k / block)]`` bool: the blocks to store; None: those that are
            not all zero.
        scales: ``[n]`` float32 that rows are multiplied by, as int8 codes want; or None.

    Returns:
        A :class:`~openwork.BlockSparseWeight` of new tensors in huge-page memory.

    Raises:
        ValueError: a wrong dtype or shape, or another block size.

    Example:
        >>> w = openwork.compress_block_sparse(torch.eye(64, 128), block=32)
        >>> w.indices.tolist(), w.density
        ([0, 1], 0.25)
    """
    if mask is None and block in _BLOCKS and weight.dim() == 2:
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight != 0, (0, -k % block, 0, -n % block))
        mask = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(3).any(1)
    blocks = 0 if mask is None else int(torch.count_nonzero(mask))
    if mask is None:
        mask = torch.zeros(0, 0, dtype=torch.bool)
    indptr, indices, values = torch.ops.openwork.compress_block_sparse(weight, mask, block, blocks)
    n, k = weight.shape
    tag = _BLOCKS[block]
    return BlockSparseWeight(indptr, indices, values, scales, tag, n, k).in_huge_pages()


def expand_block_sparse(weight: BlockSparseWeight) -> Tensor:
    """The inverse of :func:`compress_block_sparse`: zeros where no block is stored.

    Returns:
        ``[n, k]`` in the dtype of the values, not multiplied by ``weight.scales``.

    Raises:
        ValueError: tensors that do not fit the layout.

    Example:
        >>> w = openwork.compress_block_sparse(torch.eye(20), block=16)
        >>> torch.equal(openwork.expand_block_sparse(w), torch.eye(20))
        True
    """
    w: Tensor = torch.ops.openwork.expand_block_sparse(
        weight.indptr, weight.indices, weight.values, weight.layout_id, weight.n, weight.k
    )
    return w


def _check_blocks(
    op: str, indptr: Tensor, indices: Tensor, values: Tensor, layout: int, n: int, k: int
) -> None:
    check_value_type(op, "values", values)
    tags = layouts()
    got = tags[layout] if 0 <= layout < len(tags) else f"id {layout}"
    check(got in BLOCK_LAYOUTS, f"{op}: layout must be one of blocks, got {got}")
    block = block_of(got)
    check_weight_size(op, n, k)
    check_operand(op, "indptr", indptr, torch.int32, [-(-n // block) + 1])
    check_dtype(op, "indices", indices, torch.int32)
    check(indices.dim() == 1, f"{op}: indices must be [blocks], got {list(indices.shape)}")
    check_contiguous(op, "indices", indices)
    check_shape(op, "values", values, [indices.shape[0], block, block])
    check_contiguous(op, "values", values)


@torch.library.register_fake("openwork::block_sparse_linear")
def _block_sparse_linear_fake(
    x: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    layout: int,
    n: int,
    k: int,
) -> Tensor:
    op = "block_sparse_linear"
    check_linear_x(op, x, k)
    _check_blocks(op, indptr, indices, values, layout, n, k)
    if scales is not None:
        check_operand(op, "scales", scales, torch.float32, [n])
    return linear_result(op, x, n, bias, add)


@torch.library.register_fake("openwork::compress_block_sparse")
def _compress_block_sparse_fake(
    weight: Tensor, mask: Tensor, block: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    op = "compress_block_sparse"
    check_value_type(op, "weight", weight)
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    check(block in _BLOCKS, f"{op}: block must be 16, 32 or 64, got {block}")
    n, k = weight.shape
    check_weight_size(op, n, k)
    rows, columns = -(-n // block), -(-k // block)
    check_dtype(op, "mask", mask, torch.bool)
    check_shape(op, "mask", mask, [rows, columns])
    check(
        0 <= blocks <= rows * columns,
        f"{op}: blocks must be in 0 .. {rows * columns}, got {blocks}",
    )
    return (
        weight.new_empty((rows + 1,), dtype=torch.int32),
        weight.new_empty((blocks,), dtype=torch.int32),
        weight.new_empty((blocks, block, block)),
    )


@torch.library.register_fake("openwork::expand_block_sparse")
def _expand_block_sparse_fake(
    indptr: Tensor, indices: Tensor, values: Tensor, layout: int, n: int, k: int
) -> Tensor:
    op = "expand_block_sparse"
    _check_blocks(op, indptr, indices, values, layout, n, k)
    return values.new_empty((n, k))
