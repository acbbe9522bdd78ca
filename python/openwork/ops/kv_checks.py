"""Checks of pages as arguments, in the words of csrc/ops/kv_pages.cpp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv_format import CODE_BITS, GROUPS, codes_shape, grid_shape
from .checks import check, check_float, check_operand, dtype_name

_SIDE_INTS = 8
_FORMAT_INTS = 3 + 2 * _SIDE_INTS


@dataclass
class SideSizes:
    d: int
    bits: int
    axis: int = 0
    group_size: int = 0
    window: int = 0
    step: int = 0
    outliers: int = 0
    codebook: bool = False

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    @property
    def tensors(self) -> int:
        return 1 if self.dense else 5 + self.codebook + 2 * (self.outliers > 0)


@dataclass
class PageSizes:
    """What the fake implementations know of a cache."""

    b: int
    kv_heads: int
    max_pages: int
    page_size: int
    dtype: torch.dtype
    keys: SideSizes
    values: SideSizes
    bounds: bool
    positions: bool

    @property
    def max_tokens(self) -> int:
        return self.max_pages * self.page_size


def _check_side(op: str, part: str, numbers: list[int], page_size: int) -> SideSizes:
    d, bits, axis, group, window, step, outliers, codebook = numbers
    check(1 <= d <= 1024, f"{op}: {part} must have d in 1 .. 1024, got {d}")
    check(
        bits in (32, 16, *CODE_BITS),
        f"{op}: {part} must have 32, 16, 8, 4, 3 or 2 bits, got {bits}",
    )
    if bits >= 16:
        return SideSizes(d, bits)
    check(axis in (0, 1), f"{op}: {part} must have axis 0 (channel) or 1 (token), got {axis}")
    if axis == 0:
        check(
            group in GROUPS and page_size % group == 0,
            f"{op}: {part} must have groups of 32, 64 or 128 tokens that divide page_size = "
            f"{page_size}, got {group}",
        )
        check(
            step >= 1 and step % group == 0,
            f"{op}: {part} must have a step of whole groups of {group} tokens, got {step}",
        )
    else:
        check(
            group in (*GROUPS, d),
            f"{op}: {part} must have groups of 32, 64, 128 or d = {d} channels, got {group}",
        )
        check(step >= 1, f"{op}: {part} must have a step of at least 1, got {step}")
    check(
        window >= 0 and max(window, step) < 2**31,
        f"{op}: {part} must have a window of at least 0, and both below 2^31, got window {window} "
        f"and step {step}",
    )
    check(
        0 <= outliers <= d and (outliers == 0 or d <= 256),
        f"{op}: {part} must have 0 .. d outliers, and d up to 256 if any, got {outliers} of "
        f"d = {d}",
    )
    check(
        codebook == 0 or bits <= 4,
        f"{op}: {part} must have at most 4 bits with a codebook, got {bits}",
    )
    return SideSizes(d, bits, axis, group, window, step, outliers, codebook != 0)


class _Reader:
    """Takes the tensors of the list in turn."""

    def __init__(self, op: str, tensors: list[Tensor]) -> None:
        self.op = op
        self.rest = list(tensors)

    def take(self, name: str, dtype: torch.dtype, shape: list[int]) -> Tensor:
        tensor = self.rest.pop(0)
        check_operand(self.op, name, tensor, dtype, shape)
        return tensor


def _size(tensor: Tensor, dim: int, rank: int) -> int:
    return tensor.shape[dim] if tensor.dim() >= rank else 0


def _read_side(
    reader: _Reader, part: str, side: SideSizes, sizes: PageSizes, pages: int, tail_len: int
) -> tuple[int, int]:
    op, rows, dtype = reader.op, [sizes.b, sizes.kv_heads], sizes.dtype
    keys, d, page_size = part == "key", side.d, sizes.page_size
    if side.dense:
        pages = _size(reader.rest[0], 0, 1) if keys else pages
        reader.take(f"{part}_rows", dtype, [pages, page_size, d])
        return pages, tail_len
    reader.take(f"{part}_committed", torch.int32, rows)
    pages = _size(reader.rest[0], 0, 1) if keys else pages
    shape = codes_shape(keys, side.bits, d, page_size)
    reader.take(f"{part}_codes", torch.uint8, [pages, *shape])
    grid = grid_shape(side.axis == 0, side.group_size, d, page_size)
    reader.take(f"{part}_scales", dtype, [pages, *grid])
    reader.take(f"{part}_mins", dtype, [pages, *grid])
    tail_len = tail_len or (_size(reader.rest[0], 2, 4) if reader.rest[0].dim() == 4 else 0)
    reader.take(f"{part}_tail", dtype, [*rows, tail_len, d])
    need = side.window + side.step
    check(
        tail_len >= need,
        f"{op}: {part}_tail must have room for window + step = {need} tokens, got {tail_len}",
    )
    check(
        side.axis == 1 or tail_len % side.group_size == 0,
        f"{op}: {part}_tail must have a multiple of {side.group_size} (group_size) tokens, got "
        f"{tail_len}",
    )
    if side.codebook:
        reader.take(f"{part}_table", torch.float32, [2**side.bits])
    if side.outliers:
        shape = [pages, page_size, side.outliers]
        reader.take(f"{part}_outlier_index", torch.uint8, shape)
        reader.take(f"{part}_outlier_values", dtype, shape)
    return pages, tail_len


def check_kv_pages(op: str, tensors: list[Tensor], numbers: list[int]) -> PageSizes:
    """Checks shapes and dtypes, as the native operators do, and returns the sizes."""
    check(
        len(numbers) == _FORMAT_INTS,
        f"{op}: format must hold {_FORMAT_INTS} numbers, got {len(numbers)}",
    )
    page_size = numbers[0]
    check(page_size in GROUPS, f"{op}: page_size must be 32, 64 or 128, got {page_size}")
    keys = _check_side(op, "keys", numbers[1 : 1 + _SIDE_INTS], page_size)
    values = _check_side(op, "values", numbers[1 + _SIDE_INTS : -2], page_size)
    bounds, positions = numbers[-2] != 0, numbers[-1] != 0
    want = 2 + keys.tensors + values.tensors + 2 * bounds + positions
    check(
        len(tensors) == want,
        f"{op}: pages must hold {want} tensors (of their format), got {len(tensors)}",
    )
    table = tensors[0]
    check(
        table.dim() == 3,
        f"{op}: block_table must be [b, kv_heads, max_pages], got {list(table.shape)}",
    )
    b, kv_heads, max_pages = table.shape
    check(
        max_pages < 2**31 // page_size,
        f"{op}: block_table must have fewer than 2^31 / page_size pages a row, got {max_pages}",
    )
    reader = _Reader(op, tensors)
    reader.take("block_table", torch.int32, [b, kv_heads, max_pages])
    reader.take("lengths", torch.int32, [b, kv_heads])
    floats = tensors[2 if keys.dense else 6]
    check_float(op, "key_rows" if keys.dense else "key_tail", floats)
    dtype = floats.dtype
    bits = 8 * dtype.itemsize
    for part, side in (("keys", keys), ("values", values)):
        check(
            not side.dense or side.bits == bits,
            f"{op}: {part} must have {bits} bits where they are dense {dtype_name(dtype)}, got "
            f"{side.bits}",
        )
    sizes = PageSizes(b, kv_heads, max_pages, page_size, dtype, keys, values, bounds, positions)
    pages, tail_len = _read_side(reader, "key", keys, sizes, 0, 0)
    pages, _ = _read_side(reader, "value", values, sizes, pages, tail_len)
    if bounds:
        for name in ("key_min", "key_max"):
            reader.take(name, dtype, [pages, page_size // 16, keys.d])
    if positions:
        reader.take("positions", torch.int32, [b, kv_heads, sizes.max_tokens])
    return sizes
