"""Formats of cached keys and values, and the tensors that store them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _host

Axis = Literal["channel", "token"]

GROUPS = (32, 64, 128)
_POOL = _host.PagePool()
# Lines of 16 n x one k_block (csrc/core/kv_pages.h).
_LINES = {8: 4, 4: 2, 3: 3, 2: 1}
CODE_BITS = tuple(_LINES)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class KVFormat:
    """How keys, or values, of a layer are stored.

    A quantized number is ``code * scale + min``, with a codebook ``codebook[code] * scale + min``.
    Tokens wait exactly as they came until ``window + step`` of them are there; then ``step`` at a
    time are quantized. KIVI with groups of 32 and a residual of 128 has keys
    ``KVFormat(2, "channel", 32, step=128)`` and values ``KVFormat(2, "token", 32, window=128)``.

    Attributes:
        bits: 16 or 32: the floats themselves, in float16, bfloat16 or float32; all else is then
            left out. 8, 4, 3 or 2: codes.
        axis: ``channel``: each channel of ``group_size`` tokens has a scale and a min. ``token``:
            each token has them for ``group_size`` channels.
        group_size: 32, 64 or 128; for ``token`` also the number of channels.
        window: newest tokens that are never quantized.
        step: tokens quantized at a time; 0: one group (``channel``) or one token. For ``channel`` a
            multiple of ``group_size``.
        outliers: channels of each token stored exactly: those furthest from their group's mean.
        codebook: None, or ``2 ** bits`` rising numbers, of 2 to 4 bits, that the range of a group
            is mapped to: 0 is its min, 1 its max.

    Raises:
        ValueError: numbers that do not fit each other.

    Sources: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024;
    Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache
    Quantization", 2024 (codebooks, outliers).

    Example:
        >>> openwork.KVFormat(2, "channel", 32, step=128).step
        128
    """

    bits: int
    axis: Axis = "channel"
    group_size: int = 32
    window: int = 0
    step: int = 0
    outliers: int = 0
    codebook: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        op = "KVFormat"
        check(
            self.bits in (32, 16, *CODE_BITS),
            f"{op}: bits must be 32, 16, 8, 4, 3 or 2, got {self.bits}",
        )
        check(
            self.axis in ("channel", "token"),
            f"{op}: axis must be channel or token, got {self.axis}",
        )
        channel = self.axis == "channel"
        check(
            self.group_size in GROUPS or (not channel and self.group_size >= 1),
            f"{op}: group_size must be 32, 64 or 128, got {self.group_size}",
        )
        if self.step == 0:
            object.__setattr__(self, "step", self.group_size if channel else 1)
        check(self.window >= 0, f"{op}: window must be at least 0, got {self.window}")
        check(
            self.step >= 1 and (not channel or self.step % self.group_size == 0),
            f"{op}: step must be at least 1, and whole groups on the channel axis, got {self.step}",
        )
        check(self.outliers >= 0, f"{op}: outliers must be at least 0, got {self.outliers}")
        if self.codebook is not None:
            check(
                self.bits in (4, 3, 2) and len(self.codebook) == 2**self.bits,
                f"{op}: codebook must have 2 ** bits entries, of 2 to 4 bits, got "
                f"{len(self.codebook)} of {self.bits} bits",
            )
            check(
                all(map(math.isfinite, self.codebook))
                and sorted(self.codebook) == [*self.codebook],
                f"{op}: codebook must be finite and rise, got {self.codebook}",
            )

    @property
    def dense(self) -> bool:
        return self.bits >= 16

    def committed_at(
        self, committed: NDArray[np.int64], length: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Tokens in pages once a row of ``length`` tokens has been committed."""
        if self.dense:
            return length
        due = np.maximum(length - committed - self.window, 0)
        after: NDArray[np.int64] = committed + due // self.step * self.step
        return after

    def room(
        self, committed: NDArray[np.int64], length: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Tokens that may be appended before ``places`` in pages are not enough."""
        if self.dense:
            return places - length
        steps = (places - committed) // self.step + 1
        return steps * self.step - 1 + committed + self.window - length


@dataclass(frozen=True)
class KVSide:
    """The storage of keys, or of values, of a layer; layouts in ``csrc/core/kv_pages.h``.

    Attributes:
        rows: dense only: ``[pages, page_size, d]``.
        committed: ``[b, kv_heads]`` int32: tokens in pages.
        codes: uint8: of keys ``[pages, page_size / 32, d_padded / k_block, 2, lines, 16, 4]``, of
            values ``[pages, ceil(d / 32), page_size / k_block, 2, lines, 16, 4]``.
        scales: ``[pages, page_size / group_size, d]`` or ``[pages, ceil(d / group_size),
            page_size]``; ``mins`` alike.
        tail: ``[b, kv_heads, tail_len, d]``: token t that is not in pages at ``t % tail_len``.
        table: ``[2 ** bits]`` float32: the codebook.
        outlier_index: ``[pages, page_size, outliers]`` uint8, ``outlier_values`` alike.
    """

    rows: Tensor | None = None
    committed: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None
    tail: Tensor | None = None
    table: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_values: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that the format has, in the order in which operators take them."""
        return [t for f in fields(self) if (t := getattr(self, f.name)) is not None]

    def pools(self) -> list[Tensor]:
        """Those of which each page has a part."""
        kept = (self.rows, self.codes, self.scales, self.mins, self.outlier_index)
        return [t for t in (*kept, self.outlier_values) if t is not None]


def codes_shape(keys: bool, bits: int, d: int, page_size: int) -> list[int]:
    """Of a page: ``[panels, k blocks, 2 halves, lines, 16 n, 4 bytes]``."""
    n, k = (page_size, d) if keys else (d, page_size)
    return [-(-n // 32), -(-k // (32 if bits == 3 else 16)), 2, _LINES[bits], 16, 4]


def grid_shape(channel: bool, group_size: int, d: int, page_size: int) -> list[int]:
    """Of the scales of a page, on the channel axis or that of tokens."""
    if channel:
        return [page_size // group_size, d]
    return [-(-d // group_size), page_size]


def zero_pool(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written to."""
    memory = torch.from_numpy(_POOL.empty(math.prod(shape) * dtype.itemsize))
    return memory.view(dtype).view(shape)


def new_side(
    part: str, fmt: KVFormat, d: int, rows: tuple[int, int], pages: int, page_size: int,
    tail_len: int, dtype: torch.dtype,
) -> KVSide:  # fmt: skip
    if fmt.dense:
        check(
            fmt.bits == 8 * dtype.itemsize,
            f"KVPages: {part} must have {8 * dtype.itemsize} bits where they are dense "
            f"{str(dtype).removeprefix('torch.')}, got {fmt.bits}",
        )
        return KVSide(rows=zero_pool([pages, page_size, d], dtype))
    check(
        fmt.axis == "token" or page_size % fmt.group_size == 0,
        f"KVPages: page_size must be a multiple of group_size = {fmt.group_size}, got {page_size}",
    )
    check(
        fmt.outliers <= d and (fmt.outliers == 0 or d <= 256),
        f"KVPages: {part} must have 0 .. d outliers, and d up to 256 if any, got {fmt.outliers} "
        f"of d = {d}",
    )
    codes = codes_shape(part == "keys", fmt.bits, d, page_size)
    grid = grid_shape(fmt.axis == "channel", fmt.group_size, d, page_size)
    outliers = [pages, page_size, fmt.outliers]
    return KVSide(
        committed=torch.zeros(rows, dtype=torch.int32),
        codes=zero_pool([pages, *codes], torch.uint8),
        scales=zero_pool([pages, *grid], dtype),
        mins=zero_pool([pages, *grid], dtype),
        tail=torch.zeros((*rows, tail_len, d), dtype=dtype),
        table=None if fmt.codebook is None else torch.tensor(fmt.codebook, dtype=torch.float32),
        outlier_index=zero_pool(outliers, torch.uint8) if fmt.outliers else None,
        outlier_values=zero_pool(outliers, dtype) if fmt.outliers else None,
    )
