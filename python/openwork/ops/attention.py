"""Attention over cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check,
    check_cache,
    check_float,
)

_decode_attention = torch.ops.openwork.decode_attention.default


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> Tensor:
    """Attention of the last ``t`` tokens of each sequence over the ``length`` its cache holds.

    ``softmax(scale * q @ keys.T) @ values``, causal: the last query sees ``length`` keys, the one
    before it one less. Made for few queries (decoding, a draft): keys and values are read once for
    every four heads that share them, and scratch memory grows with ``t * length / 128``. The result
    does not depend on the number of threads.

    Args:
        q: ``[b, t, h, d]`` float32, bfloat16 or float16; head ``i`` reads key head
            ``i // (h / kv_heads)``. Made contiguous if it is not.
        keys: ``[b, kv_heads, max_len, d]``, dtype of q, any strides but a last one of 1.
        values: alike.
        length: keys to attend to, ``t .. max_len``; what lies behind them is not read.
        scale: of the scores; None: ``1 / sqrt(d)``.

    Returns:
        ``[b, t, h, d]``, dtype of q, contiguous; arithmetic in fp32. No gradient. A score that is
        not finite gives NaN.

    Raises:
        ValueError: a wrong dtype or shape, or a length out of range.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023.

    Example:
        >>> cache = torch.zeros(1, 3, 128, 64)
        >>> openwork.ops.decode_attention(torch.zeros(1, 1, 9, 64), cache, cache, 5).shape
        torch.Size([1, 1, 9, 64])
    """
    y: Tensor = _decode_attention(q, keys, values, length, scale)
    return y


@torch.library.register_fake("openwork::decode_attention")
def _decode_attention_fake(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> Tensor:
    op = "decode_attention"
    check_float(op, "q", q)
    check(
        q.dim() == 4 and q.shape[2] >= 1 and q.shape[3] >= 1,
        f"{op}: q must be [b, t, h, d] with h and d at least 1, got {list(q.shape)}",
    )
    b, t, h, d = q.shape
    g, max_len = check_cache(op, keys, values, b, d, q.dtype)
    check(
        g >= 1 and h % g == 0,
        f"{op}: q must have a multiple of kv_heads = {g} heads, got {h}",
    )
    check(
        t <= length <= max_len,
        f"{op}: length must be in {t} .. {max_len} (queries .. max_len), got {length}",
    )
    return q.new_empty((b, t, h, d))
