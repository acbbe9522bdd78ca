"""MInference's vertical-slash heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..block_index import BlockIndex
from ..ops.attention_scores import line_scores
from ..ops.block_index import block_index
from .geometry import Blocks, mark_largest, per_head


def vertical_slash_index(
    q: Tensor,
    k: Tensor,
    verticals: int | Sequence[int] = 1000,
    slashes: int | Sequence[int] = 6096,
    *,
    probes: int = 64,
    sinks: int = 30,
    window: int = 100,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """The keys and the distances that the last queries attend to most, for all queries.

    Of the attention of the last ``probes`` queries, the ``verticals`` largest columns are listed as
    single keys, and the ``slashes`` largest diagonals as the blocks they meet; so the result holds
    their union, and more only next to slashes. The first ``sinks`` columns and the nearest
    ``window`` distances are counted among them whatever they score, and so is a query's own block.
    What a query misses is the mass outside: ``|o - o_dense| <= 2 * (1 - covered) * max|v|``.

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16.
        k: ``[b, sk, kv_heads, d]``, dtype of q.
        verticals: columns to keep; or one number for each head.
        slashes: diagonals to keep; or one number for each head.
        probes: queries to measure.
        sinks: first columns that are kept in any case.
        window: nearest diagonals that are kept in any case.
        scale: of the scores; None: ``1 / sqrt(d)``.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.
        block_m: queries of a block.
        block_n: keys of a block.

    Returns:
        An index of ``heads`` heads, with columns. Costs ``2 * probes * sk * d`` operations a head.

    Raises:
        ValueError: a wrong dtype or shape, or numbers that do not fit the heads.

    Source: Jiang et al., "MInference 1.0: accelerating pre-filling for long-context LLMs via
    dynamic sparse attention", 2024. There slashes are not aligned to blocks of keys.

    Example:
        >>> q, k = torch.randn(1, 512, 4, 64), torch.randn(1, 512, 2, 64)
        >>> index = openwork.attention.vertical_slash_index(q, k, 40, 120)
        >>> index.index_heads, bool(index.density([512], [512]) < 1)
        (4, True)
    """
    op = "vertical_slash_index"
    columns, diagonals = line_scores(
        q, k, probes=probes, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    blocks = Blocks.of(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    outside = ~blocks.inside()[:, None]
    heads = q.shape[2]
    for scores, kept in ((columns, sinks), (diagonals, window)):
        scores[..., :kept] = math.inf
        scores.masked_fill_(outside, -math.inf)
    return block_index(
        blocks.cu_seqlens_q,
        blocks.cu_seqlens_k,
        columns=mark_largest(columns, per_head(f"{op}: verticals", verticals, heads)),
        slashes=mark_largest(diagonals, per_head(f"{op}: slashes", slashes, heads)),
        windows=per_head(f"{op}: window", 1, heads),
        sinks=per_head(f"{op}: sinks", 0, heads),
        block_m=block_m,
        block_n=block_n,
    )
