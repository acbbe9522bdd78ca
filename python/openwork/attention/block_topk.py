"""MInference's block-sparse heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..block_index import BlockIndex
from ..ops.attention_scores import block_means
from ..ops.block_index import block_index
from .geometry import Blocks, block_products, mark_largest, per_head


def block_topk_index(
    q: Tensor,
    k: Tensor,
    top: int | Sequence[int] = 100,
    *,
    window: int = 1,
    sinks: int = 0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """The blocks of keys whose mean is nearest to the mean query: top-k of ``q_mean . k_mean``.

    Each block of queries lists its ``top`` blocks of those it sees (all, where there are fewer),
    and in any case the blocks of its ``window`` and of the ``sinks``.

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16.
        k: ``[b, sk, kv_heads, d]``, dtype of q.
        top: blocks to list; or one number for each head.
        window: nearest keys whose blocks are listed in any case.
        sinks: first keys whose blocks are listed in any case.
        scale: of the scores; None: ``1 / sqrt(d)``. A negative one turns the order around.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.
        block_m: queries of a block.
        block_n: keys of a block.

    Returns:
        An index of ``heads`` heads. Costs one reading of q and k.

    Raises:
        ValueError: a wrong dtype or shape, or numbers that do not fit the heads.

    Source: the block-sparse heads of Jiang et al., "MInference 1.0", 2024; there a row with fewer
    than ``top`` visible blocks lists blocks behind it.

    Example:
        >>> q, k = torch.randn(1, 512, 4, 64), torch.randn(1, 512, 2, 64)
        >>> openwork.attention.block_topk_index(q, k, 2).indptr[0].tolist()[:4]
        [0, 1, 3, 5]
    """
    op = "block_topk_index"
    heads = q.shape[2]
    blocks = Blocks.of(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    scores = block_products(
        block_means(q, block_m, cu_seqlens=cu_seqlens_q),
        block_means(k, block_n, cu_seqlens=cu_seqlens_k),
        1 / math.sqrt(q.shape[3]) if scale is None else scale,
    )
    scores.masked_fill_(~blocks.visible()[:, None], -math.inf)
    return block_index(
        blocks.cu_seqlens_q,
        blocks.cu_seqlens_k,
        blocks=mark_largest(scores, per_head(f"{op}: top", top, heads)[:, None]),
        windows=per_head(f"{op}: window", window, heads),
        sinks=per_head(f"{op}: sinks", sinks, heads),
        block_m=block_m,
        block_n=block_n,
    )
