"""Packed weights: tensors, a layout tag, and the logical shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _host, _native

_LAYOUTS = _native.layouts()
# Tags of a family begin with its letters: w4_n32k8@1, nm4_n16k8@1.
LOWBIT_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("w"))
BLOCK_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("blocks"))
COLUMN_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("columns"))
NM_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("nm"))
_POOL = _host.PagePool()


@dataclass(frozen=True)
class PackedWeight:
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
        if self.layout not in LOWBIT_LAYOUTS:
            raise ValueError(
                f"PackedWeight: layout must be one of {', '.join(LOWBIT_LAYOUTS)}, got "
                f"{self.layout}; re-pack with openwork.pack_lowbit"
            )

    @property
    def bits(self) -> int:
        return int(self.layout[1 : self.layout.index("_")])

    @property
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one token reads."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.packed.nbytes + self.scales.nbytes + zeros

    def in_huge_pages(self) -> PackedWeight:
        """The same weight in 64-byte aligned memory that is advised for 2 MiB pages.

        Weights made one after another share chunks, so the many small matrices of a model fill
        whole pages. The memory is freed with the last weight of a chunk.
        """
        zeros = None if self.zeros is None else _to_pool(self.zeros)
        return PackedWeight(
            _to_pool(self.packed),
            _to_pool(self.scales),
            zeros,
            self.layout,
            self.n,
            self.k,
            self.group_size,
        )


@dataclass(frozen=True)
class SparseWeight:
    """A weight of which any elements are stored. Made by :func:`openwork.compress_sparse`.

    A panel is 16 rows, a block of it 64 columns. Like every layout this one lives in memory only.

    Attributes:
        masks: ``[ceil(n / 16), ceil(k / 64), 16]`` int64: bit j of row r says that column
            ``64 b + j`` of row ``16 p + r`` is stored.
        offsets: ``[ceil(n / 16), ceil(k / 64)]`` int32: where the values of a block begin.
        values: ``[nnz + 1024]`` float32, bfloat16 or int8: stored elements, block after block, in
            a block row after row; then zeros.
        scales: ``[n]`` float32 that rows are multiplied by, or None.
        layout: tag: ``"bitmask_n16k64@1"``.
        n: rows (outputs) of the weight.
        k: columns (inputs) of the weight.
    """

    masks: Tensor
    offsets: Tensor
    values: Tensor
    scales: Tensor | None
    layout: str
    n: int
    k: int

    def __post_init__(self) -> None:
        _check_layout("SparseWeight", self.layout, ("bitmask_n16k64@1",))

    @property
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def nnz(self) -> int:
        return self.values.numel() - 1024

    @property
    def density(self) -> float:
        """Stored elements over all."""
        return self.nnz / (self.n * self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one token reads."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.masks.nbytes + self.offsets.nbytes + self.values.nbytes + scales

    def in_huge_pages(self) -> SparseWeight:
        """The same weight in huge-page memory; see :meth:`PackedWeight.in_huge_pages`."""
        return replace(
            self,
            masks=_to_pool(self.masks),
            offsets=_to_pool(self.offsets),
            values=_to_pool(self.values),
            scales=None if self.scales is None else _to_pool(self.scales),
        )


@dataclass(frozen=True)
class BlockSparseWeight:
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
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def block(self) -> int:
        """Rows and columns of a block: 16, 32 or 64."""
        return block_of(self.layout)

    @property
    def density(self) -> float:
        """Stored blocks over all."""
        blocks = -(-self.n // self.block) * -(-self.k // self.block)
        return self.indices.numel() / blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one token reads."""
        return self.indptr.nbytes + self.indices.nbytes + self.values.nbytes

    def in_huge_pages(self) -> BlockSparseWeight:
        """The same weight in huge-page memory; see :meth:`PackedWeight.in_huge_pages`."""
        return replace(
            self,
            indptr=_to_pool(self.indptr),
            indices=_to_pool(self.indices),
            values=_to_pool(self.values),
        )


@dataclass(frozen=True)
class ColumnWeight:
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

    @property
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for floats."""
        return column_bits(self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what one token with no zero reads."""
        scales = 0 if self.scales is None else self.scales.nbytes
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.columns.nbytes + scales + zeros

    def in_huge_pages(self) -> ColumnWeight:
        """The same weight in huge-page memory; see :meth:`PackedWeight.in_huge_pages`."""
        return replace(
            self,
            columns=_to_pool(self.columns),
            scales=None if self.scales is None else _to_pool(self.scales),
            zeros=None if self.zeros is None else _to_pool(self.zeros),
        )


@dataclass(frozen=True)
class NmWeight:
    """An N:M sparse weight in the layout the kernels read. Made by :func:`openwork.compress_nm`.

    Of every M consecutive columns a row keeps at most N. A unit is 32 kept columns of 16 rows; the
    last one is filled up with zeros. The layout names geometry, not a CPU, and lives in memory
    only.

    Attributes:
        values: ``[ceil(n / 16), units, lines, 16, per_lane]``, float32, bfloat16, int8, or uint8
            with two int4 a byte.
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
        if self.layout not in NM_LAYOUTS:
            raise ValueError(
                f"NmWeight: layout must be one of {', '.join(NM_LAYOUTS)}, got {self.layout}; "
                "re-pack with openwork.compress_nm"
            )

    @property
    def bits(self) -> int:
        """Of a value: 4, 8, 16 (bfloat16) or 32 (float32)."""
        return int(self.layout[2 : self.layout.index("_")])

    @property
    def layout_id(self) -> int:
        return _LAYOUTS.index(self.layout)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, the index too: what one token reads."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.values.nbytes + self.index.nbytes + scales

    def in_huge_pages(self) -> NmWeight:
        """The same weight in memory that is advised for 2 MiB pages, as for PackedWeight."""
        scales = None if self.scales is None else _to_pool(self.scales)
        return replace(
            self, values=_to_pool(self.values), index=_to_pool(self.index), scales=scales
        )


def nm_layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.compress_nm` produces for a width of values."""
    for tag in NM_LAYOUTS:
        if tag.startswith(f"nm{bits}_"):
            return tag
    raise ValueError(f"nm_layout_for_bits: bits must be 4, 8, 16 or 32, got {bits}")


def _check_layout(kind: str, layout: str, known: tuple[str, ...]) -> None:
    if layout not in known:
        raise ValueError(f"{kind}: layout must be one of {', '.join(known)}, got {layout}")


def block_of(layout: str) -> int:
    """Rows and columns of a block of a :class:`BlockSparseWeight`'s layout."""
    return int(layout[layout.index("k", layout.index("_")) + 1 : layout.index("@")])


def column_bits(layout: str) -> int:
    """Bits of a code of a :class:`ColumnWeight`'s layout; 0 for floats."""
    return int(layout[len("columns") : layout.index("_")] or 0)


def layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.pack_lowbit` produces for a bit width."""
    for tag in LOWBIT_LAYOUTS:
        if tag.startswith(f"w{bits}_"):
            return tag
    raise ValueError(f"layout_for_bits: bits must be 2, 3, 4 or 8, got {bits}")


def _to_pool(tensor: Tensor) -> Tensor:
    copy = torch.from_numpy(_POOL.empty(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
