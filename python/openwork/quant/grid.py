"""Integer grids: what quantization algorithms produce and files store.

A weight ``W [n, k]`` is cut along ``k`` into groups of ``group_size`` columns (the last one may be
short). Every row of every group has one scale ``s > 0`` and one zero point ``z``::

    code[i, j] = clamp(round(W[i, j] / s) + z, 0, 2**bits - 1)   s, z: row i, j // group_size
    Q(W)[i, j] = s * (code[i, j] - z)                            code = z gives exactly 0

A symmetric grid stores no zero points: ``z = 2**(bits - 1)`` everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Weights worked on at once: temporaries stay in the cache, and small beside the weight.
_CHUNK = 1 << 17

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def symmetric_zero(bits: int) -> int:
    """Zero point of a symmetric grid: ``2**(bits - 1)``."""
    return 1 << (bits - 1)


def group_count(k: int, group_size: int) -> int:
    """Groups in a row: ``ceil(k / group_size)``."""
    return -(-k // group_size)


def resolve_group_size(where: str, bits: int, group_size: int | None, k: int) -> int:
    """Check the format and return the group size to use for rows of ``k`` columns.

    None, and any supported size of at least ``k``, mean one group a row and give ``k``.

    Raises:
        ValueError: bits or group_size are not supported; the message starts with ``where``.
    """
    if bits not in BITS:
        raise ValueError(f"{where}: bits must be one of {_listed(BITS)}, got {bits}")
    if group_size is None or group_size == k:
        return k
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"{where}: group_size must be one of {_listed(GROUP_SIZES)}, k = {k} or None "
            f"(one group a row), got {group_size}"
        )
    return min(group_size, k)


def row_chunks(n: int, k: int) -> list[slice]:
    """Ranges of rows that cover ``n`` rows of ``k`` weights in pieces a cache can hold."""
    step = max(1, _CHUNK // k)
    return [slice(begin, begin + step) for begin in range(0, n, step)]


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """``[n, k] -> [n, groups, group_size]``; a short last group is filled with zeros."""
    n, k = weight.shape
    groups = group_count(k, group_size)
    # Every range contains 0 and 0 is on every grid, so the filler changes no range and no error.
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - k))
    return padded.view(n, groups, group_size)


def expand_groups(values: Tensor, k: int, group_size: int) -> Tensor:
    """``[n, groups] -> [n, k]``: the value of each column's group."""
    return values.repeat_interleave(group_size, dim=1)[:, :k]


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes of ``weight`` on a grid, ``clamp(round(weight / scales) + zeros, 0, 2**bits - 1)``.

    Args:
        weight: float32, any shape.
        scales: float32, broadcasts with ``weight``; values a scale dtype can hold.
        zeros: float32, broadcasts with ``weight``; whole numbers.

    Returns:
        The codes as float32, shape of ``weight``.
    """
    return torch.div(weight, scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


@dataclass(frozen=True)
class Grid:
    """Which grid to round to; the arguments of :func:`rtn` by the same names."""

    bits: int
    group_size: int | None
    symmetric: bool = False
    search: bool = False
    scale_dtype: torch.dtype = torch.float16

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of :func:`rtn` and :func:`gptq`."""
        return asdict(self)

    def options(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"scale_dtype": str(self.scale_dtype).removeprefix("torch.")}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight on an integer grid, in plain arrays: ``scales * (codes - zeros)``.

    Attributes:
        codes: ``[n, k]`` uint8, each below ``2**bits``.
        scales: ``[n, ceil(k / group_size)]`` float16, bfloat16 or float32; finite and above 0.
        zeros: ``[n, ceil(k / group_size)]`` uint8 below ``2**bits``, or None: ``2**(bits - 1)``.
        bits: 2, 3, 4 or 8.
        group_size: 16, 32, 64, 128, or ``k`` (one group a row). The last group may be short.

    Raises:
        ValueError: on construction, if any of the above does not hold.

    Example:
        >>> scales = torch.ones(1, 1, dtype=torch.float16)
        >>> codes = torch.tensor([[0, 8, 15]], dtype=torch.uint8)
        >>> QuantizedTensor(codes, scales, None, bits=4, group_size=3).dequantize()
        tensor([[-8.,  0.,  7.]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        where = "QuantizedTensor"
        _check_codes(where, "codes", self.codes, self.bits)
        n, k = self.codes.shape
        if k == 0:
            raise ValueError(f"{where}: codes must have at least one column, got {[n, k]}")
        if resolve_group_size(where, self.bits, self.group_size, k) != self.group_size:
            raise ValueError(f"{where}: group_size must be at most k = {k}, got {self.group_size}")
        expected = [n, group_count(k, self.group_size)]
        if self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{where}: scales must be float16, bfloat16 or float32, got {self.scales.dtype}"
            )
        _check_shape(where, "scales", self.scales, expected)
        if not bool((torch.isfinite(self.scales) & (self.scales > 0)).all()):
            raise ValueError(f"{where}: scales must be finite and above 0")
        if self.zeros is not None:
            _check_codes(where, "zeros", self.zeros, self.bits)
            _check_shape(where, "zeros", self.zeros, expected)

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """``scales * (codes - zeros)`` as ``[n, k]`` float32; exact for 16-bit scales."""
        result = self.codes.float()
        for rows in row_chunks(self.n, self.k):
            if self.zeros is None:
                result[rows].sub_(symmetric_zero(self.bits))
            else:
                result[rows].sub_(expand_groups(self.zeros[rows], self.k, self.group_size))
            result[rows].mul_(expand_groups(self.scales[rows].float(), self.k, self.group_size))
        return result


def check_weight(where: str, weight: Tensor) -> None:
    """Raise ValueError unless ``weight`` is a non-empty floating-point matrix of finite values."""
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"{where}: weight must be a non-empty [n, k] floating-point tensor, "
            f"got {list(weight.shape)} {weight.dtype}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{where}: weight must be finite, got inf or nan values")


def _check_codes(where: str, name: str, codes: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{where}: bits must be one of {_listed(BITS)}, got {bits}")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(
            f"{where}: {name} must be a 2-d uint8 tensor, got {list(codes.shape)} {codes.dtype}"
        )
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= 2**bits:
        raise ValueError(f"{where}: {name} must be below 2**bits = {2**bits}, got {largest}")


def _check_shape(where: str, name: str, values: Tensor, expected: list[int]) -> None:
    if list(values.shape) != expected:
        raise ValueError(
            f"{where}: {name} must have shape [n, groups] = {expected}, got {list(values.shape)}"
        )


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
