"""HiP: hierarchically pruned attention."""

from __future__ import annotations

from torch import Tensor

from ..block_index import BlockIndex
from ..ops.attention_scores import hierarchical_topk
from ..ops.block_index import block_index
from .geometry import Blocks, per_head


def hip_index(
    q: Tensor,
    k: Tensor,
    top: int = 16,
    *,
    window: int = 256,
    sinks: int = 16,
    query_stride: int = 4,
    key_stride: int = 16,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> BlockIndex:
    """The blocks of keys that a tree search finds for each block of queries.

    Neighbouring keys score alike, so the blocks before the window are searched from coarse to
    fine: see :func:`openwork.ops.hierarchical_topk`, which scores at most
    ``2 * top * ceil(log2(blocks / top))`` of them. Where neighbours do score alike the result is
    that of a full search.

    Args:
        q: ``[b, sq, heads, d]`` float32, bfloat16 or float16.
        k: ``[b, sk, kv_heads, d]``, dtype of q.
        top: blocks to list.
        window: nearest keys, which are not searched and whose blocks are listed.
        sinks: first keys whose blocks are listed in any case.
        query_stride: of the queries of a block that are scored.
        key_stride: of the keys of a block that are scored. 1 is the paper's; with the blocks of 64
            keys used here, that reads 16 times as much.
        scale: of the scores; only its sign matters.
        cu_seqlens_q: ``[sequences + 1]`` int32 offsets of sequences packed into a batch of 1.
        cu_seqlens_k: alike, of keys.
        block_m: queries of a block.
        block_n: keys of a block.

    Returns:
        An index of ``heads`` heads; dense for up to ``top`` blocks before the window.

    Raises:
        ValueError: a wrong dtype or shape, or an option out of range.

    Source: Lee et al., HiP, 2024, from the paper alone.

    Example:
        >>> q, k = torch.randn(1, 512, 4, 64), torch.randn(1, 512, 2, 64)
        >>> index = openwork.attention.hip_index(q, k, 2, window=64)
        >>> (index.indptr[0].diff().max() <= 2 + 2 + 1).item()
        True
    """
    heads = q.shape[2]
    windows = per_head("hip_index: window", window, heads)
    marks, _ = hierarchical_topk(
        q,
        k,
        windows,
        top,
        block_m=block_m,
        block_n=block_n,
        query_stride=query_stride,
        key_stride=key_stride,
        smallest=scale is not None and scale < 0,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    blocks = Blocks.of(q, k, cu_seqlens_q, cu_seqlens_k, block_m, block_n)
    return block_index(
        blocks.cu_seqlens_q,
        blocks.cu_seqlens_k,
        blocks=marks,
        windows=windows,
        sinks=per_head("hip_index: sinks", sinks, heads),
        block_m=block_m,
        block_n=block_n,
    )
