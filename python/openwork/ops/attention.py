"""Attention over cached keys and values."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .checks import (
    check,
    check_cache,
    check_defined,
    check_float,
)

_decode_attention = torch.ops.openwork.decode_attention.default
_decode_attention_lse = torch.ops.openwork.decode_attention_lse.default


@overload
def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    scale: float | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last ``t`` tokens of each sequence over the ``length`` its cache holds.

    ``softmax(scale * q @ keys.T) @ values``, causal: the last query sees ``length`` keys, the one
    before it one less. Made for few queries (decoding, a draft): the heads that share a key are
    rows of one pass over it, and scratch memory grows with ``t * length / 128``. The result does
    not depend on the number of threads.

    Args:
        q: ``[b, t, h, d]`` float32, bfloat16 or float16; head ``i`` reads key head
            ``i // (h / kv_heads)``. Made contiguous if it is not.
        keys: ``[b, kv_heads, max_len, d]``, dtype of q, any strides but a last one of 1.
        values: ``[b, kv_heads, max_len, dv]``, alike; may be a view of keys, as in multi-head
            latent attention: ``keys[..., :dv]``.
        length: keys to attend to, ``t .. max_len``; what lies behind them is not read.
        scale: of the scores; None: ``1 / sqrt(d)``.
        return_lse: also give ``log(sum(exp(scale * q @ keys.T)))``, with which results over parts
            of the keys can be merged.

    Returns:
        ``[b, t, h, dv]``, dtype of q, contiguous; arithmetic in fp32. With ``return_lse`` also
        ``[b, t, h]`` float32. No gradient. A score that is not finite gives NaN; a value that is
        not finite gives NaN or infinity in its dimension.

    Raises:
        ValueError: a wrong dtype or shape, or a length out of range.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023.

    Example:
        >>> cache = torch.zeros(1, 3, 128, 64)
        >>> q = torch.zeros(1, 1, 9, 64)
        >>> openwork.ops.decode_attention(q, cache, cache, 5).shape
        torch.Size([1, 1, 9, 64])
        >>> latent = torch.zeros(1, 1, 128, 80)  # keys, whose first 64 dimensions are the values
        >>> q = torch.zeros(1, 1, 9, 80)
        >>> y, lse = openwork.ops.decode_attention(q, latent, latent[..., :64], 5, return_lse=True)
        >>> y.shape, lse.shape
        (torch.Size([1, 1, 9, 64]), torch.Size([1, 1, 9]))
    """
    if return_lse:
        y, lse = _decode_attention_lse(q, keys, values, length, scale)
        return y, lse
    result: Tensor = _decode_attention(q, keys, values, length, scale)
    return result


def _check(op: str, q: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    check_float(op, "q", q)
    check(
        q.dim() == 4 and q.shape[2] >= 1 and q.shape[3] >= 1,
        f"{op}: q must be [b, t, h, d] with h and d at least 1, got {list(q.shape)}",
    )
    b, t, h, d = q.shape
    check_defined(op, "values", values)
    check(
        values.dim() == 4 and values.shape[3] >= 1,
        f"{op}: values must be [b, kv_heads, max_len, dv] with dv at least 1, "
        f"got {list(values.shape)}",
    )
    dv = values.shape[3]
    g, max_len = check_cache(op, keys, values, b, d, dv, q.dtype)
    check(
        g >= 1 and h % g == 0,
        f"{op}: q must have a multiple of kv_heads = {g} heads, got {h}",
    )
    check(
        t <= length <= max_len,
        f"{op}: length must be in {t} .. {max_len} (queries .. max_len), got {length}",
    )
    return q.new_empty((b, t, h, dv))


@torch.library.register_fake("openwork::decode_attention")
def _decode_attention_fake(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> Tensor:
    return _check("decode_attention", q, keys, values, length)


@torch.library.register_fake("openwork::decode_attention_lse")
def _decode_attention_lse_fake(
    q: Tensor, keys: Tensor, values: Tensor, length: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    y = _check("decode_attention_lse", q, keys, values, length)
    return y, q.new_empty(q.shape[:3], dtype=torch.float32)
