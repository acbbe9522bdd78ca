"""Attention over pages of keys and values."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..kv_pages import KVPages
from .checks import check, check_dtype, check_float, check_operand, dtype_name
from .kv_checks import PageSizes, check_kv_pages

_paged_attention = torch.ops.openwork.paged_attention.default

MAX_QUERIES = 8
_MAX_D = 256


@overload
def paged_attention(
    q: Tensor,
    pages: KVPages,
    *,
    selected: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor: ...
@overload
def paged_attention(
    q: Tensor,
    pages: KVPages,
    *,
    selected: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def paged_attention(
    q: Tensor,
    pages: KVPages,
    *,
    selected: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last ``t`` tokens of each sequence over what its pages and tails hold.

    ``softmax(scale * q @ k.T) @ v`` with k and v as the formats say that they are. Causal: of a
    head that holds n tokens the last query sees n, the one before it one less; a query that sees
    none gives 0. The result does not depend on the number of threads.

    Codes are multiplied as they are; scales of keys go into queries, those of values into weights.
    In float32 and float16 this is accurate as fp32 is. In bfloat16 either factor that meets codes
    may be rounded, by up to 2^-16 of the largest of its row (of weights: of 256 tokens) where codes
    have 8 or 3 bits: errors of 128 channels together move a score by no more than rounding the
    largest q to bfloat16 has. Where they have 4 or 2 bits, by 1.15 * 2^-12 or 1.69 * 2^-10: an
    error of y of 1 to 2 % of the format's own, with outlier channels and tokens too; of 6 to 10 %
    where one channel decides alone, whose extremes codes hold exactly.

    With ``selected`` only some pages count, and the newest tokens: those from the last multiple of
    32 on that lies in pages on both sides and that every query sees.

    Args:
        q: ``[b, t, h, d]``, dtype of the pages, t up to 8, d up to 256; head ``i`` reads key head
            ``i // (h / kv_heads)``.
        pages: the cache, which already holds the keys and values of q's tokens.
        selected: ``[b, kv_heads, budget]`` int32: places in the block table, rising, then -1;
            None: all.
        scale: of the scores; None: ``1 / sqrt(d)``.
        return_lse: also give ``log(sum(exp(scale * q @ k.T)))``, with which results over parts of
            the tokens can be merged.
        cos: ``[positions, d / 2]`` float32: keys are held before rotation and turned, on halves as
            in :func:`rope`, by their positions (those the pages keep, or else 0, 1, ...). q is
            taken as it is.
        sin: as cos.

    Returns:
        ``[b, t, h, value_d]``, dtype of q, contiguous; arithmetic in fp32. With ``return_lse`` also
        ``[b, t, h]`` float32, -infinity for a query that sees nothing. No gradient.

    Raises:
        ValueError: a wrong dtype or shape; damaged tables; selected places or positions out of
            range.

    Sources: Liu et al., "KIVI", 2024 (scales of channels in the query); Tang et al., "Quest", 2024
    (page selection); Hooper et al., "KVQuant", 2024 (keys before rotation).

    Example:
        >>> four = openwork.KVFormat(4, "token", 64)
        >>> pages = openwork.KVPages.allocate(1, 2, 64, 1000, keys=four, values=four)
        >>> x = torch.ones(1, 100, 2, 64)
        >>> openwork.ops.kv_append(pages, x, x)
        >>> y, lse = openwork.ops.paged_attention(torch.zeros(1, 1, 8, 64), pages, return_lse=True)
        >>> y.shape, y.min().item(), round(lse.exp().max().item())
        (torch.Size([1, 1, 8, 64]), 1.0, 100)
    """
    y, lse = _paged_attention(q, pages.tensors, pages.format, selected, scale, cos, sin)
    return (y, lse) if return_lse else y


def _check_queries(op: str, q: Tensor, sizes: PageSizes) -> None:
    check_float(op, "q", q)
    check(
        q.dtype == sizes.dtype,
        f"{op}: q must be of the dtype of the pages, got {dtype_name(q.dtype)}",
    )
    check(
        q.dim() == 4 and q.shape[0] == sizes.b and q.shape[3] == sizes.keys.d,
        f"{op}: q must be [b, t, h, d] with b = {sizes.b} and d = {sizes.keys.d}, "
        f"got {list(q.shape)}",
    )
    t, h = q.shape[1:3]
    check(t <= MAX_QUERIES, f"{op}: q must have at most {MAX_QUERIES} tokens, got {t}")
    g = sizes.kv_heads
    check(
        h >= 1 and g >= 1 and h % g == 0,
        f"{op}: q must have a multiple of kv_heads = {g} heads, got {h}",
    )
    d, dv = sizes.keys.d, sizes.values.d
    check(
        max(d, dv) <= _MAX_D,
        f"{op}: pages must have keys and values of at most {_MAX_D} channels, got {d} and {dv}",
    )


def _check_rotation(op: str, cos: Tensor | None, sin: Tensor | None, d: int) -> None:
    want, got = ("None, as cos is", "a tensor") if cos is None else ("given, as cos is", "None")
    check((cos is None) == (sin is None), f"{op}: sin must be {want}, got {got}")
    if cos is None or sin is None:
        return
    check(d % 2 == 0, f"{op}: cos must be None where d is odd, got d = {d}")
    check_dtype(op, "cos", cos, torch.float32)
    positions = cos.shape[0] if cos.dim() > 0 else 0
    for name, table in (("cos", cos), ("sin", sin)):
        check_operand(op, name, table, torch.float32, [positions, d // 2])


@torch.library.register_fake("openwork::paged_attention")
def _paged_attention_fake(
    q: Tensor,
    pages: list[Tensor],
    format: list[int],
    selected: Tensor | None = None,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    op = "paged_attention"
    sizes = check_kv_pages(op, pages, format)
    _check_queries(op, q, sizes)
    _check_rotation(op, cos, sin, sizes.keys.d)
    if selected is not None:
        check_dtype(op, "selected", selected, torch.int32)
        budget = selected.shape[2] if selected.dim() == 3 else 0
        check_operand(op, "selected", selected, torch.int32, [sizes.b, sizes.kv_heads, budget])
    y = q.new_empty((*q.shape[:3], sizes.values.d))
    return y, q.new_empty(q.shape[:3], dtype=torch.float32)
