"""N:M sparse weights: compressing, and the linear layer over them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import NM_LAYOUTS, NmWeight, nm_layout_for_bits, value_bits
from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_float,
    check_linear_x,
    check_operand,
    check_shape,
    checked_layout,
    linear_result,
)
from .compute import Compute, check_compute_id, compute_id

# Looked up once: finding an overload by name costs half a microsecond a call.
nm_linear_overload = torch.ops.openwork.nm_linear.default

_PANEL = 16
_UNIT = 32
_MAX_GROUP = 65536
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}
_VALUE_TYPES = {32: torch.float32, 16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}


def _value_type(bits: int, given: torch.dtype) -> torch.dtype:
    """Of ``values``; of 16 bits they may be float16, too."""
    return given if bits == 16 and given == torch.float16 else _VALUE_TYPES[bits]


def compress_nm(
    weight: Tensor,
    pattern: tuple[int, int] = (2, 4),
    *,
    mask: Tensor | None = None,
    vector: int = 1,
    scales: Tensor | None = None,
    bits: int | None = None,
    group_size: int | None = None,
) -> NmWeight:
    """Store only what an N:M mask keeps, for :func:`nm_linear`.

    Of every M consecutive columns each row keeps at most N; the last block may be shorter. With
    ``vector`` V, rows ``V i .. V i + V - 1`` together keep at most N (V:N:M), and share one index.

    Args:
        weight: ``[n, k]`` float32, bfloat16 or float16, kept as they are (float16 multiplies on a
            GPU only); or uint8 codes, each in ``0 .. 2**bits - 1``, of the weight
            ``scales[n, g] * (codes[n, k] - 2**(bits - 1))`` with ``g = k // group_size``, as a
            symmetric :func:`openwork.quant.rtn` makes them.
        pattern: ``(N, M)`` with M = 4, 8, 16 or 32 and N < M.
        mask: ``[n, k]`` bool, true for what is kept, or None: what is not zero is kept.
        vector: 1, 8, 16 or 32.
        scales: of codes: ``[n, ceil(k / group_size)]`` float32, float16 or bfloat16, finite.
        bits: of codes: 4 or 8.
        group_size: of codes: 32, 64, 128, or k, which None stands for.

    Returns:
        A :class:`~openwork.NmWeight` on the device of ``weight``, on a CPU in huge-page memory. It
        takes
        ``N / M * (bits of a value + log2(M) / V)`` bits a weight, and the scales.

    Raises:
        ValueError: a wrong dtype, shape or range, or more kept than the pattern allows.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0, 0.0, 3.0, 1.0, 0.0, 0.0, 0.0]])
        >>> w = openwork.compress_nm(weight, (2, 4))
        >>> openwork.nm_linear(torch.ones(1, 8), w).item()
        6.0
        >>> torch.equal(openwork.expand_nm(w)[0], weight)
        True
    """
    kept, block = pattern
    if bits is None:
        # Codes need `bits`; what the operator then asks for is float32.
        bits = _BITS.get(weight.dtype, 32)
    if group_size is None:
        group_size = weight.shape[-1] if weight.dim() else 0
    values, index, packed_scales = torch.ops.openwork.compress_nm(
        weight, mask, scales, kept, block, vector, bits, group_size
    )
    return NmWeight(
        values,
        index,
        None if scales is None else packed_scales,
        nm_layout_for_bits(bits),
        weight.shape[0],
        weight.shape[1],
        (kept, block),
        vector,
        group_size,
    ).in_huge_pages()


def expand_nm(weight: NmWeight) -> tuple[Tensor, Tensor | None]:
    """The inverse of :func:`compress_nm`: dense, with zeros where nothing is kept.

    Returns:
        ``[n, k]`` of the dtype of the values, or uint8 codes (``2**(bits - 1)`` is zero), and the
        scales ``[n, groups]`` of codes or None.

    Raises:
        ValueError: tensors that do not fit the layout.
    """
    tensors, numbers = nm_arguments(weight, "float")
    dense, scales = torch.ops.openwork.expand_nm(*tensors, *numbers[:-1])
    return dense, None if weight.scales is None else scales


def nm_linear(
    x: Tensor,
    weight: NmWeight,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    *,
    compute: Compute = "float",
) -> Tensor:
    """Multiply by an N:M sparse weight: ``x @ expand(weight).T + bias + add``.

    Executes only the products of kept weights and reads ``weight.nbytes`` bytes of them; one
    rounding to the dtype of x at the end. The result does not depend on the number of threads. That
    of a row may differ in its last bits with the number of rows, which decides on the kernel.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16; made contiguous if it is not.
        weight: from :func:`compress_nm`.
        bias: ``[n]``, dtype of x, or None.
        add: ``[..., n]``, shape and dtype of the result, or None: another term of a sum, added in
            fp32 before rounding. Not modified.
        compute: ``"float"`` multiplies and adds in fp32. ``"int8"``, for int8 and int4 values,
            rounds each row of x to int8 first, as :func:`lowbit_linear` does, and sums exactly in
            int32.

    Returns:
        ``[..., n]``, dtype of x. No gradient (:func:`openwork.ops.nm_linear_ste` has one). An
        infinity or a NaN in a row of x may reach every result of that row, and no other.

    Raises:
        ValueError: a wrong dtype or shape, a layout this build does not read, or float16 values on
            a CPU.

    Example:
        >>> weight = torch.zeros(16, 32)
        >>> weight[:, ::4] = 2.0
        >>> w = openwork.compress_nm(weight, (1, 4))
        >>> openwork.nm_linear(torch.ones(1, 32), w)[0, 0].item()  # 8 columns of 2
        16.0
    """
    tensors, numbers = nm_arguments(weight, compute)
    y: Tensor = nm_linear_overload(x, *tensors, bias, add, *numbers)
    return y


def nm_arguments(
    weight: NmWeight, compute: Compute
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, ...]]:
    """What ``torch.ops.openwork.nm_linear`` takes after x and after add.

    Returns:
        ``(values, index, scales)`` and ``(layout, n, k, N, M, vector, group_size, compute)``.

    Raises:
        ValueError: an unknown ``compute``.
    """
    return (weight.values, weight.index, weight.scales), (
        weight.layout_id,
        weight.n,
        weight.k,
        *weight.pattern,
        weight.vector,
        weight.group_size,
        compute_id("nm_linear", compute),
    )


def _check_geometry(
    op: str, n: int, k: int, kept: int, block: int, vector: int, bits: int, group_size: int
) -> None:
    check(
        block in (4, 8, 16, 32) and 1 <= kept < block,
        f"{op}: pattern must be N:M with M = 4, 8, 16 or 32 and N = 1 .. M - 1, got {kept}:{block}",
    )
    check(vector in (1, 8, 16, 32), f"{op}: vector must be 1, 8, 16 or 32, got {vector}")
    check(
        n >= 1 and k >= 1,
        f"{op}: weight must have at least one row and one column, got n = {n}, k = {k}",
    )
    check(
        n < 2**31 and k < 2**24,
        f"{op}: weight must have fewer than 2^31 rows and 2^24 columns, got n = {n}, k = {k}",
    )
    if bits > 8:
        check(group_size == k, f"{op}: group_size must be k = {k}, got {group_size}")
        return
    check(
        group_size in (32, 64, 128, k),
        f"{op}: group_size must be 32, 64, 128 or k = {k}, got {group_size}",
    )
    check(
        group_size <= _MAX_GROUP,
        f"{op}: one group a row takes k up to {_MAX_GROUP}, got {k}; use a smaller group_size",
    )


def _check_scales_given(op: str, bits: int, scales: Tensor | None) -> None:
    check(
        scales is not None or bits > 8,
        f"{op}: scales must be a tensor for values of 4 and 8 bits, got None",
    )
    check(
        scales is None or bits <= 8,
        f"{op}: scales must be None for values of 16 and 32 bits, got a tensor",
    )


def _packed_shapes(
    n: int, k: int, kept: int, block: int, vector: int, bits: int
) -> tuple[list[int], list[int]]:
    """Of ``values`` and ``index``."""
    units = -(-(-(-k // block) * kept) // _UNIT)
    lanes = {1: 16, 8: 2, 16: 1, 32: 1}[vector]
    per_lane = {32: 1, 16: 2, 8: 4, 4: 4}[bits]
    values = [-(-n // _PANEL), units, bits, _PANEL, per_lane]
    return values, [-(-n // max(vector, _PANEL)), units, block.bit_length() - 1, lanes, 4]


def _check_nm(
    op: str,
    values: Tensor,
    index: Tensor,
    scales: Tensor | None,
    layout: int,
    n: int,
    k: int,
    kept: int,
    block: int,
    vector: int,
    group_size: int,
) -> int:
    """Returns the bits of a value."""
    bits = value_bits(checked_layout(op, layout, NM_LAYOUTS, "compress_nm"))
    _check_geometry(op, n, k, kept, block, vector, bits, group_size)
    value_shape, index_shape = _packed_shapes(n, k, kept, block, vector, bits)
    check_operand(op, "values", values, _value_type(bits, values.dtype), value_shape)
    check_operand(op, "index", index, torch.uint8, index_shape)
    _check_scales_given(op, bits, scales)
    if scales is not None:
        check_float(op, "scales", scales)
        check_shape(op, "scales", scales, [value_shape[0], -(-k // group_size), _PANEL])
        check_contiguous(op, "scales", scales)
    return bits


@torch.library.register_fake("openwork::nm_linear")
def _nm_linear_fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    layout: int,
    n: int,
    k: int,
    kept: int,
    block: int,
    vector: int,
    group_size: int,
    compute: int,
) -> Tensor:
    op = "nm_linear"
    check_linear_x(op, x, k)
    bits = _check_nm(op, values, index, scales, layout, n, k, kept, block, vector, group_size)
    if bits > 8:
        check(
            compute == 0,
            f"{op}: compute must be 0 (float) for values of 16 and 32 bits, got {compute}",
        )
        check(
            values.dtype != torch.float16 or values.device.type != "cpu",
            f"{op}: values must be bfloat16 on the CPU, got float16; a GPU takes both",
        )
    check_compute_id(op, compute)
    return linear_result(op, x, n, bias, add)


@torch.library.register_fake("openwork::compress_nm")
def _compress_nm_fake(
    weight: Tensor,
    mask: Tensor | None,
    scales: Tensor | None,
    kept: int,
    block: int,
    vector: int,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "compress_nm"
    check(bits in _VALUE_TYPES, f"{op}: bits must be 4, 8, 16 or 32, got {bits}")
    value_type = _value_type(bits, weight.dtype)
    check_dtype(op, "weight", weight, torch.uint8 if bits <= 8 else value_type)
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    n, k = weight.shape
    _check_geometry(op, n, k, kept, block, vector, bits, group_size)
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        check_shape(op, "mask", mask, [n, k])
    _check_scales_given(op, bits, scales)
    groups = -(-k // group_size)
    packed_scales = weight.new_empty((0, groups, _PANEL), dtype=torch.float32)
    if scales is not None:
        check_float(op, "scales", scales)
        check_shape(op, "scales", scales, [n, groups])
        packed_scales = scales.new_empty((-(-n // _PANEL), groups, _PANEL))
    values, index = _packed_shapes(n, k, kept, block, vector, bits)
    return (
        weight.new_empty(values, dtype=value_type),
        weight.new_empty(index, dtype=torch.uint8),
        packed_scales,
    )


@torch.library.register_fake("openwork::expand_nm")
def _expand_nm_fake(
    values: Tensor,
    index: Tensor,
    scales: Tensor | None,
    layout: int,
    n: int,
    k: int,
    kept: int,
    block: int,
    vector: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    bits = _check_nm(
        "expand_nm", values, index, scales, layout, n, k, kept, block, vector, group_size
    )
    groups = -(-k // group_size)
    if scales is None:
        flat_scales = values.new_empty((0, groups), dtype=torch.float32)
    else:
        flat_scales = scales.new_empty((n, groups))
    return values.new_empty((n, k), dtype=values.dtype if bits > 8 else torch.uint8), flat_scales
