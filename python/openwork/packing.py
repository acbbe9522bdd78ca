"""Packed weights: tensors, a layout tag, and the logical shape."""

from __future__ import annotations

import string
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from . import _host, _native

_LAYOUTS = _native.layouts()
# Tags of a family begin with its letters: w4_n32k8@1, nm4_n16k8@1.
LOWBIT_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("w"))
SPARSE_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith(("bitmask", "bytes")))
BLOCK_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("blocks"))
COLUMN_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("columns"))
NM_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("nm"))
_POOL = _host.PagePool()
_Weight = TypeVar("_Weight", bound="_Packed")


class _Packed:
    """What the packed weights below, dataclasses all, have in common."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    layout: str
    n: int
    k: int

    @property
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one token reads, where no column is skipped."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def in_huge_pages(self: _Weight) -> _Weight:
        """The same weight in 64-byte aligned memory that is advised for 2 MiB pages.

        Weights made one after another share chunks, so the many small matrices of a model fill
        whole pages. The memory is freed with the last weight of a chunk. A weight on another device
        than a CPU is returned as it is.
        """
        if any(tensor.device.type != "cpu" for tensor in self._tensors().values()):
            return self
        return replace(self, **{name: _to_pool(t) for name, t in self._tensors().items()})

    def to(self: _Weight, device: torch.device | str) -> _Weight:
        """The same weight with its tensors on ``device``."""
        return replace(self, **{name: t.to(device) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class _Grouped(_Packed):
    """A packed weight of codes, ``group_size`` consecutive k of a row to a scale."""

    group_size: int

    @property
    def bits(self) -> int:
        """Bits of a stored value; 0 for the floats of :class:`ColumnWeight`."""
        return value_bits(self.layout)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)


@dataclass(frozen=True)
class PackedWeight(_Grouped):
    """A low-bit weight in the layout the kernels read. Made by :func:`openwork.pack_lowbit`.

    The layout names geometry, not a CPU: a weight packed on any tier runs on every tier. It lives
    in memory only; files hold the canonical form (:mod:`openwork.checkpoint`).

    Attributes:
        packed: ``[ceil(n / 32), k_padded / k_block, 2, lines, 16, 4]`` uint8, panels of 32 outputs
            in two halves; ``k_padded`` is k rounded up to 32, ``(k_block, lines)`` is (16, 1),
            (32, 3), (16, 2), (16, 4) for 2, 3, 4, 8 bits.
        scales: ``[ceil(n / 32), groups, 32]`` float32, float16 or bfloat16.
        zeros: ``[ceil(n / 32), groups, 32]`` uint8, or None: symmetric, zero point
            ``2 ** (bits - 1)``.
        layout: tag such as ``"w4_n32k8@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
        group_size: consecutive k that share a scale: 16, 32, 64, 128, or k.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    layout: str
    n: int
    k: int
    group_size: int

    def __post_init__(self) -> None:
        _check_layout(
            "PackedWeight", self.layout, LOWBIT_LAYOUTS, "; re-pack with openwork.pack_lowbit"
        )


@dataclass(frozen=True)
class SparseWeight(_Packed):
    """A weight of which any elements are stored. Made by :func:`openwork.compress_sparse`.

    A panel is 16 rows, a block of it 64 or 256 columns, ``block_k``. Like every layout these live
    in memory only.

    Attributes:
        index: which columns the values of a row belong to. ``"bitmask_n16k64@1"``:
            ``[ceil(n / 16), ceil(k / 64), 16]`` int64, where bit j of row r says that column
            ``64 b + j`` of row ``16 p + r`` is stored. ``"bytes_n16k256@1"``:
            ``[32 ceil(n / 16) ceil(k / 256) + nnz + 4096]`` uint8, block after block 16 int16
            counts of values of a row, then ``column - 256 b`` of each value; then zeros.
        offsets: ``[ceil(n / 16), ceil(k / block_k)]`` int32: where the values of a block begin.
        values: ``[nnz + 16 block_k]`` float32, bfloat16 or int8: stored elements, block after
            block, in a block row after row; then zeros.
        scales: ``[n]`` float32 that rows are multiplied by, or None.
        layout: tag: ``"bitmask_n16k64@1"`` or ``"bytes_n16k256@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
    """

    index: Tensor
    offsets: Tensor
    values: Tensor
    scales: Tensor | None
    layout: str
    n: int
    k: int

    def __post_init__(self) -> None:
        _check_layout("SparseWeight", self.layout, SPARSE_LAYOUTS)

    @property
    def nnz(self) -> int:
        return self.values.numel() - sparse_padding(self.layout)

    @property
    def density(self) -> float:
        """Stored elements over all."""
        return self.nnz / (self.n * self.k)


@dataclass(frozen=True)
class BlockSparseWeight(_Packed):
    """A weight of which whole square blocks are stored (BSR). Made by
    :func:`openwork.compress_block_sparse`.

    Attributes:
        indptr: ``[ceil(n / block) + 1]`` int32: where the blocks of a row of blocks begin.
        indices: ``[blocks]`` int32: which column of blocks each one is, ascending in a row.
        values: ``[blocks, block, block]`` float32 or bfloat16: column after column of a block, the
            outputs of a column together.
        layout: tag such as ``"blocks_n32k32@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    layout: str
    n: int
    k: int

    def __post_init__(self) -> None:
        _check_layout("BlockSparseWeight", self.layout, BLOCK_LAYOUTS)

    @property
    def block(self) -> int:
        """Rows and columns of a block: 16, 32 or 64."""
        return block_of(self.layout)

    @property
    def density(self) -> float:
        """Stored blocks over all."""
        blocks = -(-self.n // self.block) * -(-self.k // self.block)
        return self.indices.numel() / blocks


@dataclass(frozen=True)
class ColumnWeight(_Grouped):
    """A weight stored column after column, so that a column can be skipped. Made by
    :func:`openwork.pack_columns` and :func:`openwork.pack_lowbit_columns`.

    Attributes:
        columns: ``[k, n]`` float32 or bfloat16, n rounded up to 16; or ``[k, strips, 64]`` uint8,
            codes of 2, 4 or 8 bits in strips of 256, 128 or 64 outputs.
        scales: ``[ceil(k / group_size), n]`` float32, n rounded up to the strip, of codes; or None.
        zeros: ``[ceil(k / group_size), n]`` uint8, or None: symmetric.
        layout: tag such as ``"columns_n16k1@1"`` or ``"columns4_n128k1@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
        group_size: consecutive columns that share a scale; k for floats.
    """

    columns: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    layout: str
    n: int
    k: int
    group_size: int

    def __post_init__(self) -> None:
        _check_layout("ColumnWeight", self.layout, COLUMN_LAYOUTS)


@dataclass(frozen=True)
class NmWeight(_Grouped):
    """An N:M sparse weight in the layout the kernels read. Made by :func:`openwork.compress_nm`.

    Of every M consecutive columns a row keeps at most N. A unit is 32 kept columns of 16 rows; the
    last one is filled up with zeros. The layout names geometry, not a CPU, and lives in memory
    only.

    Attributes:
        values: ``[ceil(n / 16), units, lines, 16, per_lane]``, float32, bfloat16, float16, int8, or
            uint8 with two int4 a byte.
        index: ``[ceil(n / max(vector, 16)), units, log2(M), lanes, 4]`` uint8, the columns of the
            values in their blocks of M; ``lanes`` is 16, 2, 1, 1 for a vector of 1, 8, 16, 32.
        scales: ``[ceil(n / 16), groups, 16]`` float32, float16 or bfloat16, of int8 and int4
            values; else None.
        layout: tag such as ``"nm4_n16k8@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
        pattern: ``(N, M)``.
        vector: consecutive rows that keep the same columns: 1, 8, 16 or 32.
        group_size: consecutive k that share a scale: 32, 64, 128, or k.
    """

    values: Tensor
    index: Tensor
    scales: Tensor | None
    layout: str
    n: int
    k: int
    pattern: tuple[int, int]
    vector: int
    group_size: int

    def __post_init__(self) -> None:
        _check_layout("NmWeight", self.layout, NM_LAYOUTS, "; re-pack with openwork.compress_nm")


def nm_layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.compress_nm` produces for a width of values."""
    for tag in NM_LAYOUTS:
        if tag.startswith(f"nm{bits}_"):
            return tag
    raise ValueError(f"nm_layout_for_bits: bits must be 4, 8, 16 or 32, got {bits}")


def _check_layout(kind: str, layout: str, known: tuple[str, ...], way_out: str = "") -> None:
    if layout not in known:
        raise ValueError(f"{kind}: layout must be one of {', '.join(known)}, got {layout}{way_out}")


def sparse_padding(layout: str) -> int:
    """Zeros after the values of a :class:`SparseWeight`: as many as a block has elements."""
    return 16 * block_of(layout)


def block_of(layout: str) -> int:
    """Columns of a block of a :class:`SparseWeight`'s or :class:`BlockSparseWeight`'s layout."""
    return int(layout[layout.index("k", layout.index("_")) + 1 : layout.index("@")])


def value_bits(layout: str) -> int:
    """The number behind the letters of a tag: 4 of ``"w4_n32k8@1"``; 0 where there is none."""
    return int(layout[: layout.index("_")].lstrip(string.ascii_lowercase) or 0)


def layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.pack_lowbit` produces for a bit width."""
    for tag in LOWBIT_LAYOUTS:
        if tag.startswith(f"w{bits}_"):
            return tag
    raise ValueError(f"layout_for_bits: bits must be 2, 3, 4 or 8, got {bits}")


def _to_pool(tensor: Tensor) -> Tensor:
    copy = torch.from_numpy(_POOL.empty(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
