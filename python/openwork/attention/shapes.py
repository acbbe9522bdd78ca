"""Indexes that follow from positions alone, and heads of several indexes joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..block_index import BlockIndex
from ..ops.block_index import block_index
from .geometry import offsets_of, per_head

_FARTHEST = 2**31 - 1


def a_shape_index(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    *,
    window: int | Sequence[int] = 512,
    sinks: int | Sequence[int] = 4,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """The first keys and the nearest: blocks that meet ``j < sinks or p - j < window``.

    Whole blocks, so it holds a little more than the mask; give ``window`` and ``sinks`` to
    :func:`openwork.ops.block_attention` too for exactly the mask.

    Args:
        q_lengths: queries of each sequence.
        k_lengths: keys of each; None: as many.
        window: nearest keys, the query's own included; or one number for each head.
        sinks: first keys; or one number for each head.
        block_m: queries of a block.
        block_n: keys of a block.

    Returns:
        The index, of one head, or of as many as numbers are given.

    Raises:
        ValueError: windows and sinks of different numbers of heads, or negative.

    Source: Xiao et al., "Efficient streaming language models with attention sinks", 2023; Han et
    al., "LM-Infinite", 2023; the A-shape heads of MInference and LServe.

    Example:
        >>> index = openwork.attention.a_shape_index([1024], window=100, sinks=4)
        >>> index.indices[index.indptr[0, -2] :].tolist()
        [0, 13, 14, 15]
    """
    heads = max(
        1 if isinstance(value, int) else len(torch.as_tensor(value)) for value in (window, sinks)
    )
    return block_index(
        offsets_of(q_lengths),
        offsets_of(q_lengths if k_lengths is None else k_lengths),
        windows=per_head("a_shape_index: window", window, heads),
        sinks=per_head("a_shape_index: sinks", sinks, heads),
        block_m=block_m,
        block_n=block_n,
    )


def causal_index(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    *,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """Every block a query may see: dense causal attention, of density 1.

    Args:
        q_lengths: queries of each sequence.
        k_lengths: keys of each; None: as many.
        block_m: queries of a block.
        block_n: keys of a block.

    Example:
        >>> openwork.attention.causal_index([100, 30]).density([100, 30], [100, 30])
        1.0
    """
    return a_shape_index(
        q_lengths, k_lengths, window=_FARTHEST, sinks=0, block_m=block_m, block_n=block_n
    )


def select_heads(indexes: Sequence[BlockIndex], choice: Tensor | Sequence[int]) -> BlockIndex:
    """Join heads of several indexes: head x of the result is that of ``indexes[choice[x]]``.

    Args:
        indexes: of the same rows and block sizes; of one head, which then serves any, or of as
            many as there are choices.
        choice: ``[heads]``: which index.

    Raises:
        ValueError: indexes that do not fit, or a choice that is none.

    Example:
        >>> near, all_ = (openwork.attention.a_shape_index([256], window=w) for w in (1, 256))
        >>> openwork.attention.select_heads([near, all_], [0, 1]).indptr.tolist()
        [[0, 1, 3, 5, 7], [7, 8, 10, 13, 17]]
    """
    chosen = torch.as_tensor(choice, dtype=torch.int64)
    heads = len(chosen)
    first = indexes[0]
    for index in indexes:
        same = (index.rows, index.block_m, index.block_n)
        if same != (first.rows, first.block_m, first.block_n):
            raise ValueError(
                f"select_heads: indexes must have {first.rows} rows and blocks of {first.block_m} "
                f"x {first.block_n}, got {same[0]} rows and {same[1]} x {same[2]}"
            )
        if index.index_heads not in (1, heads):
            raise ValueError(
                f"select_heads: indexes must have 1 or {heads} heads, got {index.index_heads}"
            )
    if heads == 0 or int(chosen.amin()) < 0 or int(chosen.amax()) >= len(indexes):
        raise ValueError(f"select_heads: choice must be in 0 .. {len(indexes) - 1}, got {choice}")
    indptr, indices = _join([(i.indptr, i.indices) for i in indexes], chosen)
    if all(i.columns is None for i in indexes):
        return BlockIndex(indptr, indices, first.block_m, first.block_n)
    columns = _join(
        [
            (torch.zeros_like(i.indptr), torch.empty(0, dtype=torch.int32))
            if i.column_indptr is None or i.columns is None
            else (i.column_indptr, i.columns)
            for i in indexes
        ],
        chosen,
    )
    return BlockIndex(indptr, indices, first.block_m, first.block_n, *columns)


def _join(lists: Sequence[tuple[Tensor, Tensor]], chosen: Tensor) -> tuple[Tensor, Tensor]:
    """indptr and items of the chosen heads, all at once."""
    heads = len(chosen)
    sizes = torch.tensor([len(items) for _, items in lists])
    moved = [
        indptr.long().expand(heads, -1) + begin
        for (indptr, _), begin in zip(lists, sizes.cumsum(0) - sizes, strict=True)
    ]
    source = torch.stack(moved)[chosen, torch.arange(heads)]  # offsets into all items
    lengths = source[:, -1] - source[:, 0]
    begins = lengths.cumsum(0) - lengths
    indptr = source - source[:, :1] + begins[:, None]
    place = torch.arange(int(lengths.sum())) + (source[:, 0] - begins).repeat_interleave(lengths)
    return indptr.int(), torch.cat([items for _, items in lists])[place]
