"""FlexPrefill: which pattern a head has, and how much of it, is measured on the prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_index import BlockIndex
from ..ops.attention_scores import block_means, line_scores
from ..ops.block_index import block_index
from .geometry import Blocks, block_products, mark_largest, per_head


def flexprefill_index(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.9,
    *,
    tau: float = 0.1,
    probes: int = 64,
    min_budget: int = 512,
    max_budget: int | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_m: int = 128,
    block_n: int = 128,
) -> BlockIndex:
    """As many blocks as it takes to cover a share ``gamma`` of the attention.

    The last ``probes`` queries are measured exactly: ``a``, their mean attention to each block of
    keys. Means of blocks estimate the same: ``a_mean = softmax(scale * q_mean . k_mean)``. Where
    the two agree, ``sqrt(JSD(a_mean || a)) < tau``, the head is *query-aware*: of the estimated
    attention of all rows the fewest blocks that hold ``gamma`` of it are listed. Else it is
    *vertical-slash*: all rows list the fewest blocks that hold ``gamma`` of ``a``, and the fewest
    block diagonals that hold ``gamma`` of the attention to each distance.

    All heads list at least ``min_budget`` keys of columns and of diagonals, the first block of
    keys, and their own; and the rows of the measured queries list ``gamma`` of what was measured,
    so that their coverage is at least ``gamma``. A larger gamma lists all that a smaller one does;
    1 lists everything.

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16.
        k: ``[b, sk, kv_heads, d]``, dtype of q.
        gamma: attention to cover, 0 .. 1.
        tau: largest distance of a query-aware head's estimate, 0 .. sqrt(ln 2); 0 for none.
        probes: queries to measure; the paper takes a whole block, of 128.
        min_budget: keys of columns, and of diagonals, to list at least.
        max_budget: keys of columns, and of diagonals, to list at most, which then limits coverage.
        scale: of the scores; None: ``1 / sqrt(d)``.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.
        block_m: queries of a block.
        block_n: keys of a block.

    Returns:
        An index of ``heads`` heads. Costs ``2 * probes * sk * d`` operations a head.

    Raises:
        ValueError: a wrong dtype or shape, or gamma out of range.

    Source: Lai et al., "FlexPrefill: a context-aware sparse attention mechanism for efficient
    long-sequence inference", 2025. There the number of blocks follows from the number of single
    keys that hold gamma, which does not bound the coverage of blocks.

    Example:
        >>> q, k = torch.randn(1, 512, 4, 64), torch.randn(1, 512, 2, 64)
        >>> openwork.attention.flexprefill_index(q, k, 1.0).density([512], [512])
        1.0
    """
    op = "flexprefill_index"
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must be in 0 .. 1, got {gamma}")
    heads = q.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    blocks = Blocks.of(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    columns, diagonals = line_scores(
        q, k, probes=probes, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    columns, diagonals = pool(columns, block_n), pool(diagonals, block_n)
    inside = pool(blocks.inside().float(), block_n) > 0  # [sequences, blocks of keys]
    k_means = block_means(k, block_n, cu_seqlens=cu_seqlens_k)
    mean_scores = block_products(last_means(q, blocks, probes), k_means, scale)[:, :, 0]
    estimate = mean_scores.masked_fill(~inside[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    query_aware = jensen_shannon(estimate, normalized(columns)).sqrt() < tau

    covering = cover(columns.masked_fill(~inside[:, None], -math.inf), gamma)
    lines = [covering, cover(diagonals.masked_fill(~inside[:, None], -math.inf), gamma)]
    least = min_budget // block_n
    most = inside.shape[1] if max_budget is None else max_budget // block_n
    for i, scores in enumerate((columns, diagonals)):
        count = lines[i].sum(-1).masked_fill(query_aware, 0).clamp(least, most)
        lines[i] = mark_largest(scores, count)

    last = blocks.last_positions()
    distance = last[..., None].div(block_n, rounding_mode="floor") - torch.arange(inside.shape[1])
    marks = lines[0][:, :, None] | along_diagonals(lines[1], distance)
    q_means = block_means(q, block_m, cu_seqlens=cu_seqlens_q)
    visible = blocks.visible()[:, None]
    weights = block_products(q_means, k_means, scale).masked_fill_(~visible, -math.inf).softmax(-1)
    weights = weights.masked_fill_(~visible, -math.inf).flatten(2)
    best = cover(weights, gamma).view(marks.shape)
    marks |= best & query_aware[:, :, None, None]
    measured = last >= (blocks.k_lengths - probes)[:, None]  # rows that hold a measured query
    if max_budget is None:
        marks |= covering[:, :, None] & measured[:, None, :, None]
    return block_index(
        blocks.cu_seqlens_q,
        blocks.cu_seqlens_k,
        blocks=marks.contiguous(),
        windows=per_head(op, 1, heads),
        sinks=per_head(op, 1, heads),
        block_m=block_m,
        block_n=block_n,
    )


def pool(lines: Tensor, block: int) -> Tensor:
    """Sums of lines ``[..., n]`` over blocks: ``[..., ceil(n / block)]``."""
    padded = pad(lines, (0, -lines.shape[-1] % block))
    return padded.view(*lines.shape[:-1], padded.shape[-1] // block, block).sum(-1)


def normalized(mass: Tensor) -> Tensor:
    """Divided by their sum along the last dimension; zeros stay."""
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """JSD of distributions along the last dimension, in nats: 0 .. ln 2, with 0 log 0 = 0.

    Example:
        >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> (jensen_shannon(p, q) / torch.tensor(2.0).log()).item()
        1.0
    """

    def negative_entropy(x: Tensor) -> Tensor:
        return torch.xlogy(x, x).sum(-1)

    mean = (p + q) / 2
    divergence = (negative_entropy(p) + negative_entropy(q)) / 2 - negative_entropy(mean)
    return divergence.clamp(0.0, math.log(2.0))


def cover(mass: Tensor, gamma: float) -> Tensor:
    """Mark the fewest of the last dimension that hold ``gamma`` of it; minus infinity is none."""
    total = mass.clamp(min=0.0).sum(-1, dtype=torch.float64)
    # A float's rounding must not leave less than gamma, and all is all, however small.
    budgets = (gamma * total).float().nextafter(torch.tensor(math.inf))
    return mark_largest(
        mass, torch.full_like(budgets, math.inf) if gamma == 1 else budgets, by_mass=True
    )


def last_means(q: Tensor, blocks: Blocks, count: int) -> Tensor:
    """Means of each sequence's last ``count`` queries: ``[sequences, heads, 1, d]`` float32."""
    sequences = len(blocks.q_lengths)
    if q.shape[1] == 0 or sequences == 0:
        return torch.zeros(sequences, q.shape[2], 1, q.shape[3])
    begins, ends = blocks.cu_seqlens_q[:-1, None].long(), blocks.cu_seqlens_q[1:, None].long()
    place = ends - torch.arange(count, 0, -1)
    there = place >= begins
    row = torch.arange(sequences)[:, None] if q.shape[0] > 1 else torch.zeros(1, 1).long()
    last = q[row, (place - row * q.shape[1]).clamp(min=0)].float()
    share = there / there.sum(1, keepdim=True).clamp(min=1)
    means: Tensor = torch.einsum("swhd,sw->shd", last, share)[:, :, None]
    return means


def along_diagonals(lines: Tensor, distance: Tensor) -> Tensor:
    """``lines[s, h, distance[s, r, c]]`` ``[s, h, rows, blocks]``; False before the first line."""
    s, h, n = lines.shape
    place = distance.clamp(0, max(n - 1, 0)).flatten(1)[:, None].expand(s, h, -1)
    return lines.gather(-1, place).view(s, h, *distance.shape[1:]) & (distance >= 0)[:, None]
