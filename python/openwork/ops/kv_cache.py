"""Operators that fill, read and shorten pages of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv_pages import KVPages
from .checks import check, check_defined, check_float, check_last_stride, check_operand, check_shape
from .checks import dtype_name as _name
from .kv_checks import PageSizes, check_kv_pages

_kv_append = torch.ops.openwork.kv_append.default
_kv_commit = torch.ops.openwork.kv_commit.default
_kv_read = torch.ops.openwork.kv_read.default
_kv_rollback = torch.ops.openwork.kv_rollback.default
_page_bounds = torch.ops.openwork.page_bounds.default


def kv_append(
    pages: KVPages,
    keys: Tensor,
    values: Tensor,
    *,
    counts: Tensor | None = None,
    positions: Tensor | None = None,
    commit: bool = True,
) -> None:
    """Append tokens to every head of every sequence, and quantize those that are due.

    Dense keys and values go to pages. Quantized ones wait in the tail; with ``commit`` the oldest
    are quantized, ``step`` at a time, while ``window + step`` or more wait. Without it, for tokens
    that may be taken back, they stay as they came until :func:`kv_commit`.

    Costs the same at any length: nothing that is held is read but, where bounds are kept, the keys
    of the last 16 tokens.

    Args:
        pages: the cache. **Modified**; takes pages as it needs them.
        keys: ``[b, t, kv_heads, d]``, dtype of the pages, any strides with a last one of 1.
        values: ``[b, t, kv_heads, value_d]`` alike.
        counts: ``[b]`` int32: how many of the t tokens each sequence has; None: all.
        positions: ``[b, t]`` int32 contiguous, if the pages keep positions: the tokens' places in
            the text.
        commit: quantize what is due.

    Raises:
        ValueError: a wrong dtype or shape; more tokens than fit; without ``commit`` more than the
            tail has room for.

    Source: Liu et al., "KIVI", 2024 (when tokens are quantized).

    Example:
        >>> two = openwork.KVFormat(2, "channel", 32)
        >>> pages = openwork.KVPages.allocate(1, 2, 16, 100, keys=two, values=two)
        >>> openwork.ops.kv_append(pages, torch.ones(1, 40, 2, 16), torch.ones(1, 40, 2, 16))
        >>> pages.lengths.tolist(), pages.keys.committed.tolist(), pages.allocated_pages
        ([[40, 40]], [[32, 32]], 2)
    """
    if keys.dim() == 4:
        pages.reserve(keys.shape[1], "kv_append", counts)
    _kv_append(keys, values, counts, positions, commit, pages.tensors, pages.format)


def kv_commit(pages: KVPages) -> None:
    """Quantize the tokens in the tails that are due: all that were appended are here to stay.

    Args:
        pages: the cache. **Modified.**

    Raises:
        ValueError: damaged tables.

    Example:
        >>> four = openwork.KVFormat(4, "token", 16)
        >>> pages = openwork.KVPages.allocate(1, 1, 16, 100, keys=four, values=four, drafts=8)
        >>> draft = torch.ones(1, 5, 1, 16)
        >>> openwork.ops.kv_append(pages, draft, draft, commit=False)
        >>> openwork.ops.kv_rollback(pages, torch.tensor([2], dtype=torch.int32))
        >>> openwork.ops.kv_commit(pages)
        >>> pages.lengths.item(), pages.keys.committed.item()
        (3, 3)
    """
    pages.reserve(0, "kv_commit")
    _kv_commit(pages.tensors, pages.format)


def kv_read(pages: KVPages, begin: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
    """The keys and values that are held, as attention sees them.

    Args:
        pages: the cache.
        begin: first token of each row.
        end: behind the last; None: the longest row's length.

    Returns:
        ``[b, kv_heads, end - begin, d]`` and ``[b, kv_heads, end - begin, value_d]``, dtype of the
        pages; zeros past a row's length. Quantized numbers are ``code * scale + min``, rounded to
        the dtype.

    Raises:
        ValueError: places out of range; damaged tables.

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 4, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32))
        >>> openwork.ops.kv_append(pages, torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
        >>> openwork.ops.kv_read(pages)[0].shape
        torch.Size([1, 1, 3, 4])
    """
    if end is None:
        end = int(pages.lengths.max()) if pages.lengths.numel() else 0
    keys, values = _kv_read(pages.tensors, pages.format, begin, end)
    return keys, values


def kv_rollback(pages: KVPages, drop: Tensor) -> None:
    """Forget the last tokens of each sequence.

    Of a group that was quantized and loses tokens, the others return to the tail as they are read.
    Tokens that were not committed leave no trace.

    Args:
        pages: the cache. **Modified**; pages stay taken until ``pages.trim()``.
        drop: ``[b]`` int32: tokens each sequence loses, at most its shortest head's length.

    Raises:
        ValueError: more tokens than are held; damaged tables.

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 4, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32))
        >>> openwork.ops.kv_append(pages, torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
        >>> openwork.ops.kv_rollback(pages, torch.tensor([2], dtype=torch.int32))
        >>> pages.lengths.item()
        1
    """
    pages.own(int(drop.max()) if drop.numel() and not drop.is_floating_point() else 0)
    _kv_rollback(drop, pages.tensors, pages.format)


def page_bounds(pages: KVPages) -> None:
    """Compute the bounds of all keys in pages anew, after their storage was changed by hand.

    ``key_min[page, i] <= x <= key_max[page, i]`` for the keys of tokens ``16 i .. 16 i + 15``. The
    operators keep them so.

    Args:
        pages: the cache. **Modified.**

    Raises:
        ValueError: pages without bounds; damaged tables.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    2024.

    Example:
        >>> pages = openwork.KVPages.allocate(
        ...     1, 1, 4, 64, keys=openwork.KVFormat(32), values=openwork.KVFormat(32), bounds=True)
        >>> openwork.ops.kv_append(pages, torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
        >>> openwork.ops.page_bounds(pages)
        >>> pages.key_max[0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    _page_bounds(pages.tensors, pages.format)


def _check_tokens(op: str, name: str, x: Tensor, sizes: PageSizes, t: int, d: int) -> None:
    check_defined(op, name, x)
    check_float(op, name, x)
    check(
        x.dtype == sizes.dtype,
        f"{op}: {name} must be of the dtype of the pages, got {_name(x.dtype)}",
    )
    check_shape(op, name, x, [sizes.b, t, sizes.kv_heads, d])
    check_last_stride(op, name, x)


@torch.library.register_fake("openwork::kv_append")
def _kv_append_fake(
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    positions: Tensor | None,
    commit: bool,
    pages: list[Tensor],
    format: list[int],
) -> None:
    op = "kv_append"
    sizes = check_kv_pages(op, pages, format)
    check_defined(op, "keys", keys)
    check(keys.dim() == 4, f"{op}: keys must be [b, t, kv_heads, d], got {list(keys.shape)}")
    t = keys.shape[1]
    _check_tokens(op, "keys", keys, sizes, t, sizes.keys.d)
    _check_tokens(op, "values", values, sizes, t, sizes.values.d)
    if counts is not None:
        check_operand(op, "counts", counts, torch.int32, [sizes.b])
    want = "given, as pages hold them" if sizes.positions else "None, as pages hold none"
    got = "None" if positions is None else "a tensor"
    check((positions is not None) == sizes.positions, f"{op}: positions must be {want}, got {got}")
    if positions is not None:
        check_operand(op, "positions", positions, torch.int32, [sizes.b, t])


@torch.library.register_fake("openwork::kv_commit")
def _kv_commit_fake(pages: list[Tensor], format: list[int]) -> None:
    check_kv_pages("kv_commit", pages, format)


@torch.library.register_fake("openwork::kv_read")
def _kv_read_fake(
    pages: list[Tensor],
    format: list[int],
    begin: int,
    end: int,
) -> tuple[Tensor, Tensor]:
    op = "kv_read"
    sizes = check_kv_pages(op, pages, format)
    check(
        0 <= begin <= end <= sizes.max_tokens,
        f"{op}: begin and end must be in 0 .. {sizes.max_tokens} and rise, got {begin} and {end}",
    )
    shape = (sizes.b, sizes.kv_heads, end - begin)
    like = pages[2 if sizes.keys.dense else 6]
    return like.new_empty((*shape, sizes.keys.d)), like.new_empty((*shape, sizes.values.d))


@torch.library.register_fake("openwork::kv_rollback")
def _kv_rollback_fake(drop: Tensor, pages: list[Tensor], format: list[int]) -> None:
    sizes = check_kv_pages("kv_rollback", pages, format)
    check_operand("kv_rollback", "drop", drop, torch.int32, [sizes.b])


@torch.library.register_fake("openwork::page_bounds")
def _page_bounds_fake(pages: list[Tensor], format: list[int]) -> None:
    sizes = check_kv_pages("page_bounds", pages, format)
    check(sizes.bounds, "page_bounds: pages must keep bounds, got a format without")
