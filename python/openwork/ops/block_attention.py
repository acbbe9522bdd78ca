"""Attention of whole sequences, over all keys or those that a BlockIndex lists."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..block_index import BlockIndex
from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_last_stride,
    check_operand,
    check_scale,
    check_shape,
)
from .sequences import check_queries_and_keys, check_sequence_pairs

_block_attention = torch.ops.openwork.block_attention.default


def block_attention(
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
    scores: Literal["all"] | int | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of many queries, dense or over the keys that an index lists.

    ``o = softmax(scale * q @ k.T) @ v`` over the keys that are listed and visible. Query ``i`` of
    ``sq`` over ``sk`` keys is at position ``p = sk - sq + i``; with ``causal`` it sees key ``j``
    where ``j <= p - min_distance`` and, if there is a window, ``p - j < window`` or ``j < sinks``.
    A query without a key gives ``o = 0`` and ``lse = -inf``. Time is proportional to the keys read:
    blocks of which a query sees nothing are skipped. The result does not depend on the number of
    threads. Scratch memory is a copy of k and v, unless each key is read by few queries, and, with
    ``scores``, the weights of 64 queries.

    Args:
        q: ``[b, sq, h, d]`` float32, bfloat16 or float16, any strides but a last one of 1; head
            ``i`` reads key head ``i // (h / kv_heads)``.
        k: ``[b, sk, kv_heads, d]``, dtype of q, strides alike; so a cache
            ``[b, kv_heads, max_len, d]`` needs no copy: pass ``cache[:, :, :sk].transpose(1, 2)``.
        v: ``[b, sk, kv_heads, dv]``, alike.
        index: which keys each block of queries reads, see :class:`~openwork.BlockIndex`; None: all.
        causal: whether a query sees only keys at or before its position. The next three need it.
        window: of keys seen, the position's own included; 0: no limit.
        sinks: first keys of a sequence, seen beyond the window.
        min_distance: from a query to the nearest key it sees.
        scale: of the scores; None: ``1 / sqrt(d)``.
        cu_seqlens_q: ``[sequences + 1]`` int32: the sequences that q, with ``b = 1``, is made of:
            tokens ``cu_seqlens_q[s] .. cu_seqlens_q[s + 1] - 1``. Together with cu_seqlens_k.
        cu_seqlens_k: alike, of k and v.
        return_lse: also give the log of the sum of ``exp(scale * q . k)``.
        scores: also give column sums of the softmax, over ``"all"`` queries, over the last so many
            of each sequence, or over those of a ``[b, sq]`` bool mask.

    Returns:
        o ``[b, sq, h, dv]``, dtype of q, contiguous. With ``return_lse`` or ``scores`` a tuple of
        o, lse ``[b, sq, h]`` float32, and scores ``[b, h, sk]`` float32, those that are asked for.
        Sums are fp32; on CPUs with bfloat16 products, weights of bfloat16 operands are rounded to
        it. A score that is not finite gives NaN, as may a key or value that is not finite in the
        rows that read its block without seeing it. No gradient.

    Raises:
        ValueError: a wrong dtype or shape, sequences that do not add up, or an index that is not
            sorted, lists a key twice, or one that its sequence does not have.

    Source: Dao, "FlashAttention-2: faster attention with better parallelism and work
    partitioning", 2023; Jiang et al., "MInference 1.0", 2024, for single columns.

    Example:
        >>> q = torch.randn(1, 100, 9, 64)
        >>> k = v = torch.randn(1, 100, 3, 64)
        >>> o, lse = openwork.ops.block_attention(q, k, v, window=32, sinks=4, return_lse=True)
        >>> o.shape, lse.shape
        (torch.Size([1, 100, 9, 64]), torch.Size([1, 100, 9]))
    """
    rows = None if scores is None else _score_rows(scores, q, cu_seqlens_q)
    masks = (causal, window, sinks, min_distance)
    shared = shared_arguments(index, *masks, scale, cu_seqlens_q, cu_seqlens_k)
    o, lse, sums = _block_attention(q, k, v, *shared, rows)
    results = (o, *((lse,) if return_lse else ()), *(() if scores is None else (sums,)))
    return results if len(results) > 1 else o


def shared_arguments(
    index: BlockIndex | None = None,
    causal: bool = True,
    window: int = 0,
    sinks: int = 0,
    min_distance: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Any, ...]:
    """What the raw operators of block attention take after v (``OW_ATTENTION_SCHEMA``)."""
    lists: tuple[Tensor | None, ...] = (None, None, None, None)
    blocks = (0, 0)
    if index is not None:
        lists = (index.indptr, index.indices, index.column_indptr, index.columns)
        blocks = (index.block_m, index.block_n)
    options = (causal, window, sinks, min_distance, scale)
    return (*lists, cu_seqlens_q, cu_seqlens_k, *blocks, *options)


def _score_rows(
    scores: Literal["all"] | int | Tensor, q: Tensor, cu_seqlens_q: Tensor | None
) -> Tensor:
    """``[b, sq]`` bool: the queries whose weights are added up."""
    if isinstance(scores, Tensor):
        return scores
    b, sq = q.shape[:2]
    if scores == "all":
        return torch.ones(b, sq, dtype=torch.bool)
    check(
        isinstance(scores, int) and scores >= 0,
        f'block_attention: scores must be "all", a number of queries or a mask, got {scores!r}',
    )
    end = torch.full((sq,), sq)
    if cu_seqlens_q is not None:
        ends = cu_seqlens_q[1:].long()
        end = ends.repeat_interleave(cu_seqlens_q.diff().long())
    return (torch.arange(sq) >= end - scores).expand(b, sq).contiguous()


def _check_lists(
    op: str, name: str, indptr: Tensor, items_name: str, items: Tensor, rows: int | None
) -> None:
    check_dtype(op, name, indptr, torch.int32)
    check(
        indptr.dim() == 2 and indptr.shape[0] >= 1,
        f"{op}: {name} must be [index_heads, rows + 1], got {list(indptr.shape)}",
    )
    if rows is not None:
        check_shape(op, name, indptr, [indptr.shape[0], rows + 1])
    check_contiguous(op, name, indptr)
    check_dtype(op, items_name, items, torch.int32)
    check(items.dim() == 1, f"{op}: {items_name} must be [n], got {list(items.shape)}")
    check_contiguous(op, items_name, items)


def check_index(
    op: str,
    lists: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int],
    q: Tensor,
    kv_heads: int,
    packed: bool,
) -> None:
    """Shapes of an index; ``packed``: its rows follow from what ``cu_seqlens_q`` holds."""
    indptr, indices, column_indptr, columns, block_m, block_n = lists
    check(
        (indptr is None) == (indices is None),
        f"{op}: indptr and indices must come together, got one",
    )
    check(
        (column_indptr is None) == (columns is None),
        f"{op}: column_indptr and columns must come together, got one",
    )
    if indptr is None or indices is None:
        check(columns is None, f"{op}: columns must come with indptr and indices, got None")
        return
    for name, size in (("block_m", block_m), ("block_n", block_n)):
        check(
            16 <= size <= 128 and size % 16 == 0,
            f"{op}: {name} must be a multiple of 16 in 16 .. 128, got {size}",
        )
    rows = None if packed else q.shape[0] * -(-q.shape[1] // block_m)
    _check_lists(op, "indptr", indptr, "indices", indices, rows)
    heads = indptr.shape[0]
    check(
        heads in (1, kv_heads, q.shape[2]),
        f"{op}: indptr must have 1, kv_heads = {kv_heads} or heads = {q.shape[2]} rows of lists, "
        f"got {heads}",
    )
    if column_indptr is not None and columns is not None:
        _check_lists(op, "column_indptr", column_indptr, "columns", columns, rows)
        check_shape(op, "column_indptr", column_indptr, list(indptr.shape))


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indptr: Tensor | None,
    indices: Tensor | None,
    column_indptr: Tensor | None,
    columns: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_m: int,
    block_n: int,
    causal: bool,
    window: int,
    sinks: int,
    min_distance: int,
    scale: float | None,
) -> None:
    """All that does not depend on what tensors hold (csrc/ops/block_attention.h)."""
    check_queries_and_keys(op, q, k)
    check_dtype(op, "v", v, q.dtype)
    check(
        v.dim() == 4 and v.shape[3] >= 1,
        f"{op}: v must be [b, sk, kv_heads, dv] with dv at least 1, got {list(v.shape)}",
    )
    check_shape(op, "v", v, [*k.shape[:3], v.shape[3]])
    check_last_stride(op, "v", v)
    for name, value in (("window", window), ("sinks", sinks), ("min_distance", min_distance)):
        check(value >= 0, f"{op}: {name} must be at least 0, got {value}")
        check(causal or value == 0, f"{op}: {name} must be 0 without causal, got {value}")
    check_scale(op, scale)
    check(
        (cu_seqlens_q is None) == (cu_seqlens_k is None),
        f"{op}: cu_seqlens_q and cu_seqlens_k must come together, got one",
    )
    check_sequence_pairs(op, q, k, cu_seqlens_q, cu_seqlens_k)
    lists = (indptr, indices, column_indptr, columns, block_m, block_n)
    check_index(op, lists, q, k.shape[2], cu_seqlens_q is not None)


@torch.library.register_fake("openwork::block_attention")
def _block_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    op = "block_attention"
    *shared, score_rows = rest
    check_attention(op, q, k, v, *shared)
    b, sq, h, _ = q.shape
    if score_rows is not None:
        check_operand(op, "score_rows", score_rows, torch.bool, [b, sq])
    return (
        q.new_empty((b, sq, h, v.shape[3])),
        q.new_empty((b, sq, h), dtype=torch.float32),
        q.new_empty((b, h, 0 if score_rows is None else k.shape[1]), dtype=torch.float32),
    )
