"""Operators with which policies shrink pages of keys and values, and choose among them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..kv_pages import KVPages
from .checks import check, check_defined, check_float, check_operand
from .checks import dtype_name as _name
from .kv_checks import PageSizes, check_kv_pages

_kv_compact = torch.ops.openwork.kv_compact.default
_kv_merge = torch.ops.openwork.kv_merge.default
_select_pages = torch.ops.openwork.select_pages.default


def kv_compact(pages: KVPages, kept: Tensor, *, begins: Tensor | None = None) -> None:
    """Keep some tokens of each row, in order, and give the memory of the others back.

    The tokens move down to places 0, 1, ...; their keys stay rotated as they were, and where
    positions are kept they move along. With a scale for each token (or none) they keep every bit.
    On the channel axis a group of tokens that stays together does; the others are quantized anew
    from what they held, within half a step of their new group's scale. Tokens that fill no group
    go to the tail as they are read.

    Costs what is kept from ``begins`` on.

    Args:
        pages: the cache. **Modified**; free pages' memory goes back to the system.
        kept: ``[b, kv_heads, n]`` int32: rising numbers of tokens, filled up with -1.
        begins: ``[b]`` int32: all tokens of the sequence before this one stay too, and ``kept``
            begins there; None: 0. The accepted path of a draft tree is ``kept``, the text before it
            is not listed.

    Raises:
        ValueError: numbers that do not rise or are not held; more tokens than the tail has room
            for; damaged tables.

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 1, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32))
        >>> tokens = torch.arange(5.0).view(1, 5, 1, 1)
        >>> openwork.ops.kv_append(pages, tokens, tokens)
        >>> openwork.ops.kv_compact(pages, torch.tensor([[[1, 4, -1]]], dtype=torch.int32))
        >>> openwork.ops.kv_read(pages)[0].flatten().tolist()
        [1.0, 4.0]
    """
    pages.own(pages.max_tokens)
    _kv_compact(kept, begins, pages.tensors, pages.format)
    pages.trim()


def kv_evict(pages: KVPages, evicted: Tensor) -> None:
    """Drop some tokens of each row: :func:`kv_compact` of all the others.

    Args:
        pages: the cache. **Modified**; free pages' memory goes back to the system.
        evicted: ``[b, kv_heads, n]`` int32: numbers of tokens in any order; -1 stands for none.

    Raises:
        ValueError: tokens that are not held; else as :func:`kv_compact`.

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 1, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32))
        >>> tokens = torch.arange(5.0).view(1, 5, 1, 1)
        >>> openwork.ops.kv_append(pages, tokens, tokens)
        >>> openwork.ops.kv_evict(pages, torch.tensor([[[3, 0]]], dtype=torch.int32))
        >>> openwork.ops.kv_read(pages)[0].flatten().tolist()
        [1.0, 2.0, 4.0]
    """
    op = "kv_evict"
    rows = pages.block_table.shape[:2]
    check(
        evicted.dim() == 3 and evicted.shape[:2] == rows and evicted.dtype == torch.int32,
        f"{op}: evicted must be [b, kv_heads, n] int32 with b, kv_heads = {list(rows)}, got "
        f"{list(evicted.shape)} {_name(evicted.dtype)}",
    )
    check(
        bool(((evicted >= -1) & (evicted < pages.lengths[..., None])).all()),
        f"{op}: evicted must be tokens that are held, or -1, got others",
    )
    longest = int(pages.lengths.max()) if pages.lengths.numel() else 0
    tokens = torch.arange(longest, dtype=torch.int32)
    stays = tokens < pages.lengths[..., None]
    # One place more takes what stands for none.
    dropped = torch.zeros((*rows, longest + 1), dtype=torch.bool)
    dropped.scatter_(2, torch.where(evicted < 0, longest, evicted).long(), True)
    stays &= ~dropped[..., :longest]
    # The tokens that stay, moved before those that do not.
    order = torch.where(stays, tokens, longest).sort(-1).values
    kv_compact(pages, torch.where(order < longest, order, -1))


def kv_merge(
    pages: KVPages,
    targets: Tensor,
    own: Tensor,
    indptr: Tensor,
    sources: Tensor,
    weights: Tensor,
    *,
    keys: bool = True,
    values: bool = True,
    norms: bool = False,
) -> None:
    """Add tokens that are about to be evicted to others that stay.

    Of target i of a row, with sources j in ``indptr[i] .. indptr[i + 1] - 1``::

        x[targets[i]] = own[i] * x[targets[i]] + sum_j weights[j] * x[sources[j]]

    for its key and its value, in fp32 in that order. A target that is quantized already is
    quantized anew: alone (token axis), or with its group (channel axis), whose targets are merged
    together from what group and sources hold then. The sources stay; :func:`kv_evict` drops them.

    Args:
        pages: the cache. **Modified.**
        targets: ``[b, kv_heads, m]`` int32: rising numbers of tokens, filled up with -1.
        own: ``[b, kv_heads, m]`` float32: weight of the target itself.
        indptr: ``[b, kv_heads, m + 1]`` int32, rising from 0: which sources are whose.
        sources: ``[b, kv_heads, n]`` int32: tokens that are no targets.
        weights: ``[b, kv_heads, n]`` float32.
        keys: merge keys.
        values: merge values.
        norms: scale each merged key to ``own * |x[target]| + sum_j weights[j] * |x[sources[j]]|``,
            so that merging changes directions and not lengths.

    Raises:
        ValueError: a wrong dtype or shape, tokens that are not held, a source that is a target;
            damaged tables.

    Sources: Wan et al., "LOOK-M", 2024; Wang et al., "Model Tells You Where to Merge" (KVMerger),
    2024; Zhang et al., "CaM: Cache Merging", 2024 (values only); Li et al., "EMS", 2024 (norms).

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 1, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32))
        >>> tokens = torch.arange(5.0).view(1, 5, 1, 1)
        >>> openwork.ops.kv_append(pages, tokens, tokens)
        >>> lists = [torch.tensor([[x]], dtype=torch.int32) for x in ([4], [0, 2], [1, 3])]
        >>> halves = torch.tensor([[[0.5, 0.25]]])
        >>> openwork.ops.kv_merge(pages, lists[0], halves[..., :1], lists[1], lists[2], halves)
        >>> openwork.ops.kv_read(pages)[0].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 3.25]
    """
    pages.own(pages.max_tokens)
    _kv_merge(
        targets, own, indptr, sources, weights, keys, values, norms, pages.tensors, pages.format
    )


def select_pages(
    q: Tensor,
    pages: KVPages,
    budget: int,
    *,
    method: Literal["flat", "chunks"] = "flat",
    reduce: Literal["max", "sum"] = "max",
) -> Tensor:
    """The pages of each key head that some queries may find their largest scores in.

    With bounds ``low <= k <= high`` of keys, no score of them is above
    ``u(q) = sum_c max(q[c] * low[c], q[c] * high[c])``. A page scores u with the bounds of all its
    keys (``flat``), or the largest u of its 16 keys each (``chunks``, which is never more). Each
    key head takes the newest page with keys and the best of the others.

    Reads all bounds once: ``d / 8`` numbers of the dtype a token.

    Args:
        q: ``[b, t, heads, d]``, dtype of the pages, heads a multiple of kv_heads.
        pages: the cache, with bounds.
        budget: pages of a row, 1 .. 2^20.
        method: ``flat`` or ``chunks``.
        reduce: over the queries that share a key head: ``max`` or ``sum``.

    Returns:
        ``[b, kv_heads, budget]`` int32: places in ``block_table``, rising, filled up with -1. Of
        two pages that score the same the older is taken.

    Raises:
        ValueError: pages without bounds; a wrong dtype or shape; damaged tables.

    Sources: Tang et al., "Quest", 2024 (flat); Yang et al., "LServe: Efficient Long-sequence LLM
    Serving with Unified Sparse Attention", 2025 (chunks).

    Example:
        >>> dense = openwork.KVFormat(32)
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 1, 200, keys=dense, values=dense, page_size=32, bounds=True)
        >>> tokens = torch.arange(-100.0, 0.0).view(1, 100, 1, 1)
        >>> openwork.ops.kv_append(pages, tokens, tokens)
        >>> openwork.ops.select_pages(torch.full((1, 1, 1, 1), -1.0), pages, 2).tolist()
        [[[0, 3]]]
    """
    op = "select_pages"
    check(method in ("flat", "chunks"), f"{op}: method must be flat or chunks, got {method}")
    check(reduce in ("max", "sum"), f"{op}: reduce must be max or sum, got {reduce}")
    selected: Tensor = _select_pages(
        q, pages.tensors, pages.format, budget, method == "chunks", reduce == "sum"
    )
    return selected


def _check_each_row(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, sizes: PageSizes
) -> int:
    check_defined(op, name, tensor)
    check(tensor.dim() == 3, f"{op}: {name} must be [b, kv_heads, n], got {list(tensor.shape)}")
    n = tensor.shape[2]
    check_operand(op, name, tensor, dtype, [sizes.b, sizes.kv_heads, n])
    return n


@torch.library.register_fake("openwork::kv_compact")
def _kv_compact_fake(
    kept: Tensor, begins: Tensor | None, pages: list[Tensor], format: list[int]
) -> None:
    op = "kv_compact"
    sizes = check_kv_pages(op, pages, format)
    _check_each_row(op, "kept", kept, torch.int32, sizes)
    if begins is not None:
        check_operand(op, "begins", begins, torch.int32, [sizes.b])


@torch.library.register_fake("openwork::kv_merge")
def _kv_merge_fake(
    targets: Tensor,
    own: Tensor,
    indptr: Tensor,
    sources: Tensor,
    weights: Tensor,
    keys: bool,
    values: bool,
    norms: bool,
    pages: list[Tensor],
    format: list[int],
) -> None:
    op = "kv_merge"
    sizes = check_kv_pages(op, pages, format)
    rows = [sizes.b, sizes.kv_heads]
    m = _check_each_row(op, "targets", targets, torch.int32, sizes)
    n = _check_each_row(op, "sources", sources, torch.int32, sizes)
    check_operand(op, "own", own, torch.float32, [*rows, m])
    check_operand(op, "indptr", indptr, torch.int32, [*rows, m + 1])
    check_operand(op, "weights", weights, torch.float32, [*rows, n])


@torch.library.register_fake("openwork::select_pages")
def _select_pages_fake(
    q: Tensor, pages: list[Tensor], format: list[int], budget: int, chunks: bool, sum: bool
) -> Tensor:
    op = "select_pages"
    sizes = check_kv_pages(op, pages, format)
    check(sizes.bounds, f"{op}: pages must keep bounds, got a format without")
    check_float(op, "q", q)
    check(
        q.dtype == sizes.dtype, f"{op}: q must be of the dtype of the pages, got {_name(q.dtype)}"
    )
    b, kv_heads, d = sizes.b, sizes.kv_heads, sizes.keys.d
    check(
        q.dim() == 4
        and q.shape[0] == b
        and q.shape[1] >= 1
        and q.shape[2] >= 1
        and kv_heads >= 1
        and q.shape[2] % kv_heads == 0
        and q.shape[3] == d,
        f"{op}: q must be [b, t, heads, d] with b = {b}, heads a multiple of {kv_heads} and "
        f"d = {d}, got {list(q.shape)}",
    )
    check(1 <= budget <= 2**20, f"{op}: budget must be in 1 .. {2**20}, got {budget}")
    return q.new_empty((b, kv_heads, budget), dtype=torch.int32)
