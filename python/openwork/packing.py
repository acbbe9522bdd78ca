"""Packed weights: tensors, a layout tag, and the logical shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _host, _native

_LAYOUTS = _native.layouts()
# Tags of a family begin with its letters: w4_n32k8@1, nm4_n16k8@1.
_LOWBIT_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("w"))
_NM_LAYOUTS = tuple(tag for tag in _LAYOUTS if tag.startswith("nm"))
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
        if self.layout not in _LOWBIT_LAYOUTS:
            raise ValueError(
                f"PackedWeight: layout must be one of {', '.join(_LOWBIT_LAYOUTS)}, "
                f"got {self.layout}; re-pack with openwork.pack_lowbit"
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
        if self.layout not in _NM_LAYOUTS:
            raise ValueError(
                f"NmWeight: layout must be one of {', '.join(_NM_LAYOUTS)}, got {self.layout}; "
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
    for tag in _NM_LAYOUTS:
        if tag.startswith(f"nm{bits}_"):
            return tag
    raise ValueError(f"nm_layout_for_bits: bits must be 4, 8, 16 or 32, got {bits}")


def layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.pack_lowbit` produces for a bit width."""
    for tag in _LOWBIT_LAYOUTS:
        if tag.startswith(f"w{bits}_"):
            return tag
    raise ValueError(f"layout_for_bits: bits must be 2, 3, 4 or 8, got {bits}")


def _to_pool(tensor: Tensor) -> Tensor:
    copy = torch.from_numpy(_POOL.empty(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
