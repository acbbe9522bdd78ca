"""Low-bit weights: packing, and the linear layer over them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import LOWBIT_LAYOUTS, PackedWeight, layout_for_bits, value_bits
from .checks import (
    MAX_DIM,
    check,
    check_contiguous,
    check_dtype,
    check_float,
    check_linear_x,
    check_operand,
    check_result_rank,
    check_shape,
    check_weight_size,
    checked_layout,
    dtype_name,
    is_float,
    linear_result,
)
from .compute import Compute, check_compute_id, compute_id

# The overloads, looked up once: finding one by name costs half a microsecond a call.
lowbit_linear_overload = torch.ops.openwork.lowbit_linear.default
lowbit_embedding_overload = torch.ops.openwork.lowbit_embedding.default

_PANEL = 32
_HALF = 16
_PAD_K = 32
_MAX_GROUP = 65536


def pack_lowbit(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> PackedWeight:
    """Pack a group-quantized weight for :func:`lowbit_linear`.

    The weight is ``scales[n, g] * (codes[n, k] - zeros[n, g])`` with ``g = k // group_size``. Any
    n and k: rows are padded to 32 and columns to 32; the last group may be shorter.

    Args:
        codes: ``[n, k]`` uint8, each in ``0 .. 2**bits - 1``.
        scales: ``[n, ceil(k / group_size)]`` float32, float16 or bfloat16, finite; kept in its
            dtype.
        zeros: ``[n, ceil(k / group_size)]`` uint8 in ``0 .. 2**bits - 1``, or None: symmetric,
            zero point ``2 ** (bits - 1)``.
        bits: 2, 3, 4 or 8.
        group_size: 16, 32, 64, 128, or k (one group a row, k up to 65536).

    Returns:
        A :class:`~openwork.PackedWeight` of new tensors on the device of ``codes``, on a CPU in
        huge-page memory. It runs on every device that it is moved to.

    Raises:
        ValueError: a wrong dtype, shape, range, or a scale that is not finite.

    Example:
        >>> codes = torch.randint(16, (24, 64), dtype=torch.uint8)
        >>> w = openwork.pack_lowbit(codes, torch.ones(24, 2), bits=4, group_size=32)
        >>> w.layout, w.n, w.k
        ('w4_n32k8@1', 24, 64)
    """
    packed, packed_scales, packed_zeros = torch.ops.openwork.pack_lowbit(
        codes, scales, zeros, bits, group_size
    )
    return PackedWeight(
        packed,
        packed_scales,
        None if zeros is None else packed_zeros,
        layout_for_bits(bits),
        codes.shape[0],
        codes.shape[1],
        group_size,
    ).in_huge_pages()


def unpack_lowbit(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of :func:`pack_lowbit`.

    Returns:
        ``codes [n, k]`` uint8, ``scales [n, groups]`` in the dtype they were packed in, and
        ``zeros [n, groups]`` uint8 or None.

    Raises:
        ValueError: tensors that do not fit the layout.
    """
    codes, scales, zeros = torch.ops.openwork.unpack_lowbit(
        weight.packed,
        weight.scales,
        weight.zeros,
        weight.layout_id,
        weight.n,
        weight.k,
        weight.group_size,
    )
    return codes, scales, None if weight.zeros is None else zeros


def lowbit_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    compute: Compute = "float",
) -> Tensor:
    """Multiply by a group-quantized weight: ``x @ dequantize(weight).T + bias + add``.

    Reads ``weight.nbytes`` bytes of weights; one rounding to the dtype of x at the end. The
    result does not depend on the number of threads.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16; made contiguous if it is not.
        weight: from :func:`pack_lowbit`; any layout this build reads.
        bias: ``[n]``, dtype of x, or None.
        add: ``[..., n]``, shape and dtype of the result, or None: a residual or another term of a
            sum of weights, added in fp32 before rounding. Not modified.
        compute: ``"float"`` multiplies the weight's exact values at fp32 accuracy. ``"int8"``
            rounds each row of x to int8 first, ``x ~ s * round(x / s)`` with
            ``s = max|x| / 127``, and sums exactly in int32; faster for many rows. Values of x so
            small that their whole group is below 2**-100 (int8: row, 2**-120) count as zero.

    Returns:
        ``[..., n]``, dtype of x. No gradient. A row of x that holds an infinity or a NaN gives a
        row of NaNs and infinities.

    Raises:
        ValueError: a wrong dtype or shape, or a layout this build does not read.

    Example:
        >>> codes = torch.full((16, 32), 9, dtype=torch.uint8)
        >>> w = openwork.pack_lowbit(codes, torch.ones(16, 1), bits=4, group_size=32)
        >>> openwork.lowbit_linear(torch.ones(1, 32), w)[0, 0].item()  # 32 * (9 - 8)
        32.0
    """
    tensors, numbers = lowbit_arguments(weight, compute)
    y: Tensor = lowbit_linear_overload(x, *tensors, bias, add, *numbers)
    return y


def lowbit_arguments(
    weight: PackedWeight, compute: Compute
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, int, int, int, int]]:
    """What ``torch.ops.openwork.lowbit_linear`` takes after x and after add.

    Returns:
        ``(packed, scales, zeros)`` and ``(layout, n, k, group_size, compute)``.

    Raises:
        ValueError: an unknown ``compute``.
    """
    return (weight.packed, weight.scales, weight.zeros), (
        weight.layout_id,
        weight.n,
        weight.k,
        weight.group_size,
        compute_id("lowbit_linear", compute),
    )


def lowbit_embedding(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of a group-quantized weight: ``dequantize(weight)[ids]``.

    For an embedding that shares the packed weight of the output head.

    Args:
        ids: ``[...]`` int64, each in ``0 .. n - 1``.
        weight: from :func:`pack_lowbit`.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``[..., k]``: ``scales * (codes - zeros)`` in fp32, rounded once. No gradient.

    Raises:
        ValueError: a wrong dtype, or an id out of range. On a GPU the row of such an id is NaN.

    Example:
        >>> codes = torch.arange(8, 16, dtype=torch.uint8)[:, None].expand(8, 32)
        >>> w = openwork.pack_lowbit(codes, torch.ones(8, 1), bits=4, group_size=32)
        >>> openwork.ops.lowbit_embedding(torch.tensor([3, 7]), w)[:, 0].tolist()
        [3.0, 7.0]
    """
    tensors, numbers = lowbit_arguments(weight, "float")
    y: Tensor = lowbit_embedding_overload(ids, *tensors, *numbers[:4], dtype)
    return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8: ``scales = max_k |x| / 127``, ``codes = round(x * (127 / max))``.

    Rounds to nearest, ties to even. A row of zeros (or below 2**-120) gets scale 0 and codes 0; a
    row with an infinity or a NaN gets scale NaN and codes 0.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16.

    Returns:
        ``codes [..., k]`` int8 in -127 .. 127 and ``scales [...]`` float32.

    Raises:
        ValueError: x has no last dimension or another dtype.

    Example:
        >>> codes, scales = openwork.quantize_rows(torch.tensor([[1.0, -2.0]]))
        >>> codes.tolist()
        [[64, -127]]
    """
    codes, scales = torch.ops.openwork.quantize_rows(x)
    return codes, scales


def _packed_shape(bits: int, n: int, k: int) -> list[int]:
    k_block, lines = (32, 3) if bits == 3 else (16, bits // 2)
    k_padded = -(-k // _PAD_K) * _PAD_K
    return [-(-n // _PANEL), k_padded // k_block, 2, lines, _HALF, 4]


def _groups(op: str, n: int, k: int, group_size: int) -> int:
    check_weight_size(op, n, k)
    check(
        group_size in (16, 32, 64, 128, k),
        f"{op}: group_size must be 16, 32, 64, 128 or k = {k}, got {group_size}",
    )
    check(
        group_size <= _MAX_GROUP,
        f"{op}: one group a row takes k up to {_MAX_GROUP}, got {k}; use a smaller group_size",
    )
    return -(-k // group_size)


@torch.library.register_fake("openwork::lowbit_linear")
def _lowbit_linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    layout: int,
    n: int,
    k: int,
    group_size: int,
    compute: int,
) -> Tensor:
    op = "lowbit_linear"
    check_linear_x(op, x, k)
    check_lowbit(op, packed, scales, zeros, layout, n, k, group_size)
    check_compute_id(op, compute)
    return linear_result(op, x, n, bias, add)


def check_lowbit(
    op: str,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    layout: int,
    n: int,
    k: int,
    group_size: int,
) -> None:
    bits = value_bits(checked_layout(op, layout, LOWBIT_LAYOUTS, "pack_lowbit"))
    groups = _groups(op, n, k, group_size)
    check_dtype(op, "packed", packed, torch.uint8)
    check_shape(op, "packed", packed, _packed_shape(bits, n, k))
    check_contiguous(op, "packed", packed)
    check_float(op, "scales", scales)
    check_shape(op, "scales", scales, [-(-n // _PANEL), groups, _PANEL])
    check_contiguous(op, "scales", scales)
    if zeros is not None:
        check_operand(op, "zeros", zeros, torch.uint8, [-(-n // _PANEL), groups, _PANEL])


@torch.library.register_fake("openwork::lowbit_embedding")
def _lowbit_embedding_fake(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    layout: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    op = "lowbit_embedding"
    check_dtype(op, "ids", ids, torch.int64)
    check(
        ids.dim() < MAX_DIM,
        f"{op}: ids must have fewer than {MAX_DIM} dimensions, got {ids.dim()}",
    )
    check_lowbit(op, packed, scales, zeros, layout, n, k, group_size)
    check(
        is_float(dtype),
        f"{op}: dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}",
    )
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.register_fake("openwork::quantize_rows")
def _quantize_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    op = "quantize_rows"
    check_float(op, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] >= 1,
        f"{op}: x must have a last dimension of at least 1, got {list(x.shape)}",
    )
    check_result_rank(op, x)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("openwork::pack_lowbit")
def _pack_lowbit_fake(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    op = "pack_lowbit"
    check(bits in (2, 3, 4, 8), f"{op}: bits must be 2, 3, 4 or 8, got {bits}")
    check_dtype(op, "codes", codes, torch.uint8)
    check(codes.dim() == 2, f"{op}: codes must be [n, k], got {list(codes.shape)}")
    n, k = codes.shape
    groups = _groups(op, n, k, group_size)
    check_float(op, "scales", scales)
    check_shape(op, "scales", scales, [n, groups])
    if zeros is not None:
        check_dtype(op, "zeros", zeros, torch.uint8)
        check_shape(op, "zeros", zeros, [n, groups])
    panels = -(-n // _PANEL)
    return (
        codes.new_empty(_packed_shape(bits, n, k)),
        scales.new_empty((panels, groups, _PANEL)),
        codes.new_empty((0 if zeros is None else panels, groups, _PANEL)),
    )


@torch.library.register_fake("openwork::unpack_lowbit")
def _unpack_lowbit_fake(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    layout: int,
    n: int,
    k: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_lowbit("unpack_lowbit", packed, scales, zeros, layout, n, k, group_size)
    groups = -(-k // group_size)
    return (
        packed.new_empty((n, k)),
        scales.new_empty((n, groups)),
        packed.new_empty((0 if zeros is None else n, groups)),
    )
