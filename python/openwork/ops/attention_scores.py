"""What estimators of sparse attention measure: lines, means of blocks, and a search of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check, check_operand, check_range
from .sequences import (
    check_heads,
    check_longest,
    check_queries_and_keys,
    check_sequence_pairs,
    check_sequences,
)

_line_scores = torch.ops.openwork.line_scores.default
_block_means = torch.ops.openwork.block_means.default
_hierarchical_topk = torch.ops.openwork.hierarchical_topk.default


def line_scores(
    q: Tensor,
    k: Tensor,
    *,
    probes: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much the last queries attend to each key and to each distance.

    With ``A = softmax(scale * q @ k.T)``, causal, of the last ``min(probes, sq, sk)`` queries of
    each sequence, at positions p that end at the last key::

        columns[j] = sum_i A[i, j]        diagonals[t] = sum_i A[i, p_i - t]

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16, last stride 1.
        k: ``[b, sk, kv_heads, d]``, dtype of q; head x reads key head ``x // (heads / kv_heads)``.
        probes: queries to measure.
        scale: of the scores; None: ``1 / sqrt(d)``.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.

    Returns:
        columns, diagonals: ``[sequences, heads, sk]`` float32 (of the longest sequence; 0 past a
        shorter one), arithmetic in fp32. No gradient. Scratch: 256 bytes a key and thread.

    Raises:
        ValueError: a wrong dtype or shape, or offsets that do not fit.

    Source: the vertical and slash lines of Jiang et al., "MInference 1.0", 2024.

    Example:
        >>> q = torch.zeros(1, 3, 1, 8)  # uniform attention
        >>> columns, diagonals = openwork.ops.line_scores(q, q, probes=1)
        >>> columns.mul(3).round().tolist(), diagonals.sum().round().item()
        ([[[1.0, 1.0, 1.0]]], 1.0)
    """
    longest = longest_of(k, cu_seqlens_k)
    columns, diagonals = _line_scores(q, k, cu_seqlens_q, cu_seqlens_k, longest, probes, scale)
    return columns, diagonals


def block_means(x: Tensor, block: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means of blocks of tokens: ``means[s, h, c] = mean(x[s, c * block : (c + 1) * block, h])``.

    Args:
        x: ``[b, n, heads, d]`` float32, bfloat16 or float16, last stride 1.
        block: tokens of a block; a sequence's last one may be shorter.
        cu_seqlens: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.

    Returns:
        ``[sequences, heads, ceil(n / block), d]`` float32 (n of the longest sequence; 0 past a
        shorter one), summed in fp32. No gradient.

    Raises:
        ValueError: a wrong dtype or shape, or offsets that do not fit.

    Example:
        >>> x = torch.arange(3.0).view(1, 3, 1, 1)
        >>> openwork.ops.block_means(x, 2).flatten().tolist()
        [0.5, 2.0]
    """
    max_blocks = -(-longest_of(x, cu_seqlens) // max(block, 1))
    means: Tensor = _block_means(x, cu_seqlens, block, max_blocks)
    return means


def hierarchical_topk(
    q: Tensor,
    k: Tensor,
    windows: Tensor,
    top: int,
    *,
    block_m: int = 64,
    block_n: int = 64,
    query_stride: int = 2,
    key_stride: int = 1,
    smallest: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``top`` best blocks of keys for each block of queries, by a tree search.

    Candidates are the blocks whose last key is at least ``windows[head]`` before the first query.
    They are cut into ``top`` groups of neighbours. In each round every group is halved, a half is
    scored by its first block, and the best ``top`` halves stay, until all are single blocks::

        score(block) = max(q_p . k_j)    every query_stride-th p, every key_stride-th j of it

    so ``ceil(log2(candidates / top))`` rounds score at most ``2 * top`` blocks each. Of equal
    scores the first block wins. Up to ``top`` candidates are all chosen.

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16, last stride 1.
        k: ``[b, sk, kv_heads, d]``, dtype of q; head x reads key head ``x // (heads / kv_heads)``.
        windows: ``[heads]`` int32: nearest keys that are not searched.
        top: blocks to choose.
        block_m: queries of a block, 1 .. 128.
        block_n: keys of a block, 1 .. 128.
        query_stride: 1 .. block_m.
        key_stride: 1 .. block_n.
        smallest: whether the smallest products are best (a negative softmax scale).
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.

    Returns:
        ``[sequences, heads, ceil(sq / block_m), ceil(sk / block_n)]`` bool, and
        ``[sequences, heads, ceil(sq / block_m)]`` int32: blocks that were scored. Products are
        summed in fp32. No gradient.

    Raises:
        ValueError: a wrong dtype or shape, an option out of range, or offsets that do not fit.

    Source: Lee et al., "A training-free sub-quadratic cost transformer model serving framework
    with hierarchically pruned attention" (HiP), 2024.

    Example:
        >>> k = torch.zeros(1, 64, 1, 4)
        >>> k[:, 12:20] = 1.0
        >>> q = torch.ones(1, 64, 1, 4)
        >>> blocks, scored = openwork.ops.hierarchical_topk(
        ...     q, k, torch.tensor([1]).int(), 2, block_m=16, block_n=4
        ... )
        >>> blocks[0, 0, 3].nonzero().flatten().tolist(), scored[0, 0, 3].item()
        ([3, 4], 8)
    """
    rows = -(-longest_of(q, cu_seqlens_q) // max(block_m, 1))
    max_blocks = -(-longest_of(k, cu_seqlens_k) // max(block_n, 1))
    blocks, scored = _hierarchical_topk(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        windows,
        top,
        block_m,
        block_n,
        query_stride,
        key_stride,
        smallest,
        rows,
        max_blocks,
    )
    return blocks, scored


def longest_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Tokens of the longest sequence of x ``[b, n, ...]``; what is wrong the operators refuse."""
    if cu_seqlens is None:
        return x.shape[1] if x.dim() > 1 else 0
    return int(cu_seqlens.diff().amax()) if cu_seqlens.numel() > 1 else 0


@torch.library.register_fake("openwork::line_scores")
def _line_scores_fake(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_keys: int,
    probes: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    op = "line_scores"
    check_queries_and_keys(op, q, k)
    check(probes >= 1, f"{op}: probes must be at least 1, got {probes}")
    sequences = check_sequence_pairs(op, q, k, cu_seqlens_q, cu_seqlens_k)
    check_longest(op, "max_keys", max_keys, k.shape[1], cu_seqlens_k)
    shape = (sequences, q.shape[2], max_keys)
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("openwork::block_means")
def _block_means_fake(x: Tensor, cu_seqlens: Tensor | None, block: int, max_blocks: int) -> Tensor:
    op = "block_means"
    check_heads(op, "x", x)
    check_range(op, "block", block, 1, 2**30)
    sequences = check_sequences(op, "x", x, "cu_seqlens", cu_seqlens)
    check_longest(op, "max_blocks", max_blocks, -(-x.shape[1] // block), cu_seqlens)
    return x.new_empty((sequences, x.shape[2], max_blocks, x.shape[3]), dtype=torch.float32)


@torch.library.register_fake("openwork::hierarchical_topk")
def _hierarchical_topk_fake(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    windows: Tensor,
    top: int,
    block_m: int,
    block_n: int,
    query_stride: int,
    key_stride: int,
    smallest: bool,
    max_rows: int,
    max_blocks: int,
) -> tuple[Tensor, Tensor]:
    op = "hierarchical_topk"
    check_queries_and_keys(op, q, k)
    sequences = check_sequence_pairs(op, q, k, cu_seqlens_q, cu_seqlens_k)
    heads = q.shape[2]
    check_operand(op, "windows", windows, torch.int32, [heads])
    check_range(op, "block_m", block_m, 1, 128)
    check_range(op, "block_n", block_n, 1, 128)
    check_range(op, "top", top, 1, 2**30)
    check_range(op, "query_stride", query_stride, 1, block_m)
    check_range(op, "key_stride", key_stride, 1, block_n)
    check_longest(op, "max_rows", max_rows, -(-q.shape[1] // block_m), cu_seqlens_q)
    check_longest(op, "max_blocks", max_blocks, -(-k.shape[1] // block_n), cu_seqlens_k)
    return (
        q.new_empty((sequences, heads, max_rows, max_blocks), dtype=torch.bool),
        q.new_empty((sequences, heads, max_rows), dtype=torch.int32),
    )
