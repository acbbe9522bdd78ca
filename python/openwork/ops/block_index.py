"""From scores to marks, and from marks to a :class:`~openwork.BlockIndex`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..block_index import MAX_BLOCK, MIN_BLOCK, BlockIndex
from .checks import check, check_contiguous, check_dtype, check_operand, check_range
from .sequences import check_offsets, check_same_count

_offsets = torch.ops.openwork.block_index_offsets.default
_lists = torch.ops.openwork.block_index_lists.default
_largest = torch.ops.openwork.largest.default


def block_index(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    slashes: Tensor | None = None,
    windows: Tensor,
    sinks: Tensor,
    causal: bool = True,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """List what is marked, for :func:`openwork.ops.block_attention`.

    Query ``i`` of a sequence is at position ``p = sk - sq + i``. A block of queries of head ``x``
    lists a block of keys, unless all of it is behind the last query, if ``blocks`` marks it, if
    it begins before ``sinks[x]``, if ``0 <= p - j < windows[x]`` or ``slashes[s, x, p - j]`` for
    one of its queries p and keys j, or if ``columns`` marks all its keys. It lists as single keys
    the marked columns of other blocks, up to its last query. So the result holds all that is
    marked, and of a slash or a window the whole blocks it meets. Without ``causal`` what is behind
    the last query is listed too, where blocks, sinks or columns mark it.

    Args:
        cu_seqlens_q: ``[sequences + 1]`` int32: offsets of each sequence's queries.
        cu_seqlens_k: ``[sequences + 1]`` int32: of its keys.
        blocks: ``[sequences, heads, ceil(max_q / block_m), ceil(max_k / block_n)]`` bool, of the
            longest sequences, or None. What is past a shorter sequence is not read.
        columns: ``[sequences, heads, max_k]`` bool: positions of keys, or None.
        slashes: ``[sequences, heads, max_k]`` bool: distances p - j, or None.
        windows: ``[heads]`` int32: nearest distances that are always listed; 0 for none.
        sinks: ``[heads]`` int32: first keys that are always listed.
        causal: whether what is behind a block's last query is left out.
        block_m: queries of a block: a multiple of 16 in 16 .. 128.
        block_n: keys of a block, alike.

    Returns:
        The index, of as many heads; it has columns if ``columns`` is given. Reads each mark twice.

    Raises:
        ValueError: a wrong dtype or shape, or lists of 2^31 items.

    Example:
        >>> lengths, one = torch.tensor([0, 64], dtype=torch.int32), torch.ones(1).int()
        >>> index = openwork.ops.block_index(
        ...     lengths, lengths, windows=one, sinks=one, block_m=16, block_n=16
        ... )
        >>> index.indptr.tolist(), index.indices.tolist()
        ([[0, 1, 3, 5, 7]], [0, 0, 1, 0, 2, 0, 3])
    """
    rows = int((cu_seqlens_q.diff() + block_m - 1).div(block_m, rounding_mode="floor").sum())
    marks = (cu_seqlens_q, cu_seqlens_k, blocks, columns, slashes, windows, sinks, causal)
    indptr, column_indptr = _offsets(*marks, block_m, block_n, rows)
    nnz, column_nnz = int(indptr[-1, -1]), int(column_indptr[-1, -1])
    indices, singles = _lists(
        *marks, block_m, block_n, rows, indptr, column_indptr, nnz, column_nnz
    )
    if columns is None:
        return BlockIndex(indptr, indices, block_m, block_n)
    return BlockIndex(indptr, indices, block_m, block_n, column_indptr, singles)


def largest(scores: Tensor, budgets: Tensor, *, by_mass: bool = False) -> Tensor:
    """Mark the largest scores of each row: a number of them, or the fewest that reach a sum.

    Of equal scores the first are marked. A score of minus infinity never is, NaN counts as the
    largest, and a row whose total does not exceed its budget is marked whole, but for minus
    infinity. Radix selection, O(n) a row; sums are in float64.

    Args:
        scores: ``[rows, n]`` float32; a negative one has no mass.
        budgets: ``[rows]`` float32: scores to mark, rounded up, or the sum to reach.
        by_mass: whether a budget is a sum.

    Returns:
        ``[rows, n]`` bool. No gradient.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        >>> openwork.ops.largest(scores, torch.tensor([2.0])).int().tolist()
        [[0, 1, 0, 1]]
        >>> openwork.ops.largest(scores, torch.tensor([0.85]), by_mass=True).int().tolist()
        [[0, 1, 1, 1]]
    """
    marks: Tensor = _largest(scores, budgets, by_mass)
    return marks


def check_block(op: str, name: str, block: int) -> None:
    check(
        MIN_BLOCK <= block <= MAX_BLOCK and block % 16 == 0,
        f"{op}: {name} must be a multiple of 16 in {MIN_BLOCK} .. {MAX_BLOCK}, got {block}",
    )


_MOST_ITEMS = 2**31 - 1


def _check_marks(
    op: str, name: str, marks: Tensor | None, dims: int, sequences: int, heads: int
) -> None:
    """Their other dimensions are those of the longest sequence."""
    if marks is None:
        return
    check_dtype(op, name, marks, torch.bool)
    check(
        marks.dim() == dims and list(marks.shape[:2]) == [sequences, heads],
        f"{op}: {name} must be [{sequences}, {heads}, ...] (sequences, heads) of {dims} "
        f"dimensions, got {list(marks.shape)}",
    )
    check_contiguous(op, name, marks)


@torch.library.register_fake("openwork::block_index_offsets")
def _offsets_fake(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    blocks: Tensor | None,
    columns: Tensor | None,
    slashes: Tensor | None,
    windows: Tensor,
    sinks: Tensor,
    causal: bool,
    block_m: int,
    block_n: int,
    rows: int,
    *,
    op: str = "block_index_offsets",
) -> tuple[Tensor, Tensor]:
    check_block(op, "block_m", block_m)
    check_block(op, "block_n", block_n)
    sequences = check_offsets(op, "cu_seqlens_q", cu_seqlens_q)
    check_same_count(op, sequences, check_offsets(op, "cu_seqlens_k", cu_seqlens_k))
    check_dtype(op, "windows", windows, torch.int32)
    check(
        windows.dim() == 1 and windows.shape[0] >= 1,
        f"{op}: windows must be [heads], got {list(windows.shape)}",
    )
    check_contiguous(op, "windows", windows)
    heads = windows.shape[0]
    check_operand(op, "sinks", sinks, torch.int32, [heads])
    _check_marks(op, "blocks", blocks, 4, sequences, heads)
    _check_marks(op, "columns", columns, 3, sequences, heads)
    _check_marks(op, "slashes", slashes, 3, sequences, heads)
    check_range(op, "rows", rows, 0, _MOST_ITEMS)
    shape = [heads, rows + 1]
    return windows.new_empty(shape), windows.new_empty(shape)


@torch.library.register_fake("openwork::block_index_lists")
def _lists_fake(*args: Any) -> tuple[Tensor, Tensor]:
    op = "block_index_lists"
    *marks, indptr, column_indptr, nnz, column_nnz = args
    offsets, column_offsets = _offsets_fake(*marks, op=op)
    check_operand(op, "indptr", indptr, torch.int32, list(offsets.shape))
    check_operand(op, "column_indptr", column_indptr, torch.int32, list(column_offsets.shape))
    check_range(op, "nnz", nnz, 0, _MOST_ITEMS)
    check_range(op, "column_nnz", column_nnz, 0, _MOST_ITEMS)
    return offsets.new_empty([nnz]), offsets.new_empty([column_nnz])


@torch.library.register_fake("openwork::largest")
def _largest_fake(scores: Tensor, budgets: Tensor, by_mass: bool) -> Tensor:
    op = "largest"
    check_dtype(op, "scores", scores, torch.float32)
    check(scores.dim() == 2, f"{op}: scores must be [rows, n], got {list(scores.shape)}")
    check_operand(op, "budgets", budgets, torch.float32, [scores.shape[0]])
    return scores.new_empty(scores.shape, dtype=torch.bool)
