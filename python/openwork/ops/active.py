"""Activation sparsity: weights by column, and the linear that skips columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import layouts
from ..packing import COLUMN_LAYOUTS, ColumnWeight, strip_outputs, value_bits
from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_fp32_or_bf16,
    check_linear_x,
    check_operand,
    check_shape,
    check_weight_size,
    linear_result,
)

active_linear_overload = torch.ops.openwork.active_linear.default

_LAYOUT_OF_BITS = {value_bits(tag): tag for tag in COLUMN_LAYOUTS}


def pack_columns(weight: Tensor) -> ColumnWeight:
    """Store a dense weight column after column for :func:`active_linear`.

    Args:
        weight: ``[n, k]`` float32 or bfloat16.

    Returns:
        A :class:`~openwork.ColumnWeight` of new tensors in huge-page memory.

    Raises:
        ValueError: a wrong dtype or shape.

    Example:
        >>> w = openwork.pack_columns(torch.randn(20, 30))
        >>> list(w.columns.shape), w.layout
        ([30, 32], 'columns_n16k1@1')
    """
    op = "pack_columns"
    check_fp32_or_bf16(op, "weight", weight)
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    n, k = weight.shape
    check_weight_size(op, n, k)
    columns = torch.nn.functional.pad(weight.T, (0, -n % 16)).contiguous()
    return ColumnWeight(columns, None, None, _LAYOUT_OF_BITS[0], n, k, k).in_huge_pages()


def pack_lowbit_columns(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
) -> ColumnWeight:
    """Store a group-quantized weight column after column for :func:`active_linear`.

    The weight is that of :func:`pack_lowbit`, ``scales[n, g] * (codes[n, k] - zeros[n, g])`` with
    ``g = k // group_size``.

    Args:
        codes: ``[n, k]`` uint8, each in ``0 .. 2**bits - 1``.
        scales: ``[n, ceil(k / group_size)]`` float32, float16 or bfloat16; kept as float32.
        zeros: ``[n, ceil(k / group_size)]`` uint8 in ``0 .. 2**bits - 1``, or None: symmetric,
            zero point ``2 ** (bits - 1)``.
        bits: 2, 3, 4 or 8.
        group_size: 16, 32, 64, 128, or k.

    Returns:
        A :class:`~openwork.ColumnWeight` of new tensors in huge-page memory.

    Raises:
        ValueError: a wrong dtype, shape or range.

    Example:
        >>> codes = torch.randint(16, (24, 64), dtype=torch.uint8)
        >>> w = openwork.pack_lowbit_columns(codes, torch.ones(24, 2), bits=4, group_size=32)
        >>> list(w.columns.shape), w.layout
        ([64, 1, 64], 'columns4_n128k1@1')
    """
    op = "pack_lowbit_columns"
    columns = torch.ops.openwork.pack_code_columns(codes, bits)
    n, k = codes.shape
    check(
        group_size in (16, 32, 64, 128, k),
        f"{op}: group_size must be 16, 32, 64, 128 or k = {k}, got {group_size}",
    )
    groups = -(-k // group_size)
    check(scales.is_floating_point(), f"{op}: scales must be floats, got {scales.dtype}")
    check_shape(op, "scales", scales, [n, groups])
    if zeros is not None:
        check_dtype(op, "zeros", zeros, torch.uint8)
        check_shape(op, "zeros", zeros, [n, groups])
        check(
            not bool((zeros.int() >= 2**bits).any()),
            f"{op}: zeros must be in 0 .. {2**bits - 1} for {bits} bits, got one above",
        )

    def by_group(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor.T, (0, -n % strip_outputs(bits))).contiguous()

    return ColumnWeight(
        columns,
        by_group(scales.float()),
        None if zeros is None else by_group(zeros),
        _LAYOUT_OF_BITS[bits],
        n,
        k,
        group_size,
    ).in_huge_pages()


def unpack_columns(weight: ColumnWeight) -> Tensor:
    """The dense weight: the inverse of :func:`pack_columns`, or the values of the codes.

    Returns:
        ``[n, k]``, in the dtype of the columns, or float32 for codes.

    Raises:
        ValueError: tensors that do not fit the layout.

    Example:
        >>> w = torch.randn(20, 30)
        >>> torch.equal(openwork.unpack_columns(openwork.pack_columns(w)), w)
        True
    """
    if weight.scales is None:
        return weight.columns[:, : weight.n].T.contiguous()
    codes = torch.ops.openwork.unpack_code_columns(weight.columns, weight.bits, weight.n)
    group = torch.arange(weight.k) // weight.group_size
    zeros: Tensor | int = 2 ** (weight.bits - 1)
    if weight.zeros is not None:
        zeros = weight.zeros[:, : weight.n].T.float()[:, group]
    dense: Tensor = weight.scales[:, : weight.n].T[:, group] * (codes.float() - zeros)
    return dense


def active_linear(
    x: Tensor,
    weight: ColumnWeight,
    threshold: float,
    bias: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Multiply by the columns of a weight that large activations meet.

    ``y = sum over k with |x[k]| > threshold of x[k] * w[:, k]``, plus bias and add: the activation
    sparsity of TEAL (arXiv:2408.14690) and CATS (arXiv:2404.08763), whose thresholds are quantiles
    of ``|x|`` on calibration data. The bytes of other columns are not read, so a token costs its
    share of active elements. With a threshold of 0 it is the dense product; at any threshold it
    equals, to the last bit, the dense product of x with the other elements set to 0.

    Each row of x chooses for itself, and rows are taken one after another: for a single token.

    Args:
        x: ``[..., k]`` float32, bfloat16 or float16. A NaN is active.
        weight: from :func:`pack_columns` or :func:`pack_lowbit_columns`.
        threshold: at least 0, in units of x.
        bias: ``[n]``, dtype of x, or None.
        add: ``[..., n]``, shape and dtype of the result, or None. Not modified.

    Returns:
        ``[..., n]``, dtype of x. No gradient. It does not depend on the number of threads.

    Raises:
        ValueError: a wrong dtype or shape, a layout this build does not read, or a threshold that
            is negative or NaN.

    Example:
        >>> w = openwork.pack_columns(torch.ones(3, 4))
        >>> openwork.active_linear(torch.tensor([1.0, -0.1, 0.2, -2.0]), w, 0.5).tolist()
        [-1.0, -1.0, -1.0]
    """
    y: Tensor = active_linear_overload(
        x,
        weight.columns,
        weight.scales,
        weight.zeros,
        bias,
        add,
        threshold,
        weight.layout_id,
        weight.n,
        weight.k,
        weight.group_size,
    )
    return y


def _check_columns(
    op: str,
    columns: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    layout: int,
    n: int,
    k: int,
    group_size: int,
) -> None:
    tags = layouts()
    got = tags[layout] if 0 <= layout < len(tags) else f"id {layout}"
    check(got in COLUMN_LAYOUTS, f"{op}: layout must be one of columns, got {got}")
    bits = value_bits(got)
    check_weight_size(op, n, k)
    sizes = (16, 32, 64, 128, k) if bits else (k,)
    text = f"16, 32, 64, 128 or k = {k}" if bits else f"k = {k}"
    check(group_size in sizes, f"{op}: group_size must be {text}, got {group_size}")
    strip = strip_outputs(bits)
    n_padded = -(-n // strip) * strip
    if bits == 0:
        check_fp32_or_bf16(op, "columns", columns)
        check_shape(op, "columns", columns, [k, n_padded])
        check_contiguous(op, "columns", columns)
        check(
            scales is None and zeros is None,
            f"{op}: scales and zeros must be None for columns of floats, got a tensor",
        )
        return
    check_operand(op, "columns", columns, torch.uint8, [k, n_padded // strip, 64])
    check(scales is not None, f"{op}: scales must be a tensor for columns of codes, got None")
    assert scales is not None
    groups = -(-k // group_size)
    check_operand(op, "scales", scales, torch.float32, [groups, n_padded])
    if zeros is not None:
        check_operand(op, "zeros", zeros, torch.uint8, [groups, n_padded])


@torch.library.register_fake("openwork::active_linear")
def _active_linear_fake(
    x: Tensor,
    columns: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    threshold: float,
    layout: int,
    n: int,
    k: int,
    group_size: int,
) -> Tensor:
    op = "active_linear"
    check_linear_x(op, x, k)
    _check_columns(op, columns, scales, zeros, layout, n, k, group_size)
    check(threshold >= 0, f"{op}: threshold must be at least 0, got {threshold:g}")
    return linear_result(op, x, n, bias, add)


def _check_code_bits(op: str, bits: int) -> None:
    check(bits in (2, 3, 4, 8), f"{op}: bits must be 2, 3, 4 or 8, got {bits}")


@torch.library.register_fake("openwork::pack_code_columns")
def _pack_code_columns_fake(codes: Tensor, bits: int) -> Tensor:
    op = "pack_code_columns"
    _check_code_bits(op, bits)
    check_dtype(op, "codes", codes, torch.uint8)
    check(codes.dim() == 2, f"{op}: codes must be [n, k], got {list(codes.shape)}")
    n, k = codes.shape
    check_weight_size(op, n, k)
    return codes.new_empty((k, -(-n // strip_outputs(bits)), 64))


@torch.library.register_fake("openwork::unpack_code_columns")
def _unpack_code_columns_fake(columns: Tensor, bits: int, n: int) -> Tensor:
    op = "unpack_code_columns"
    _check_code_bits(op, bits)
    check_dtype(op, "columns", columns, torch.uint8)
    check(columns.dim() == 3, f"{op}: columns must be [k, strips, 64], got {list(columns.shape)}")
    k = columns.shape[0]
    check_weight_size(op, n, k)
    check_shape(op, "columns", columns, [k, -(-n // strip_outputs(bits)), 64])
    check_contiguous(op, "columns", columns)
    return columns.new_empty((n, k))
