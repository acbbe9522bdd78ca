"""Packed weights: tensors, a layout tag, and the logical shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _host, _native

_LAYOUTS = _native.layouts()
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
        if self.layout not in _LAYOUTS:
            raise ValueError(
                f"PackedWeight: layout must be one of {', '.join(_LAYOUTS)}, got {self.layout}; "
                "re-pack with openwork.pack_lowbit"
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


def layout_for_bits(bits: int) -> str:
    """The layout tag :func:`openwork.pack_lowbit` produces for a bit width."""
    for tag in _LAYOUTS:
        if tag.startswith(f"w{bits}_"):
            return tag
    raise ValueError(f"layout_for_bits: bits must be 2, 3, 4 or 8, got {bits}")


def _to_pool(tensor: Tensor) -> Tensor:
    copy = torch.from_numpy(_POOL.empty(tensor.nbytes)).view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
