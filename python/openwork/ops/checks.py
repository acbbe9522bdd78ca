"""Checks of the fake implementations, in the words of the native ones (csrc/ops/check.h)."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .._native import layouts

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_range(op: str, name: str, value: int, least: int, most: int) -> None:
    check(least <= value <= most, f"{op}: {name} must be in {least} .. {most}, got {value}")


def check_defined(op: str, name: str, tensor: Tensor | None) -> None:
    check(tensor is not None, f"{op}: {name} must be a tensor, got None")


def is_float(dtype: torch.dtype) -> bool:
    return dtype in _FLOATS


def check_float(op: str, name: str, tensor: Tensor) -> None:
    check_defined(op, name, tensor)
    check(
        is_float(tensor.dtype),
        f"{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}",
    )


def check_fp32_or_bf16(op: str, name: str, tensor: Tensor) -> None:
    check_defined(op, name, tensor)
    check(
        tensor.dtype in (torch.float32, torch.bfloat16),
        f"{op}: {name} must be float32 or bfloat16, got {dtype_name(tensor.dtype)}",
    )


def check_value_type(op: str, name: str, tensor: Tensor) -> None:
    check_defined(op, name, tensor)
    check(
        tensor.dtype in (torch.float32, torch.bfloat16, torch.int8),
        f"{op}: {name} must be float32, bfloat16 or int8, got {dtype_name(tensor.dtype)}",
    )


def check_shape(op: str, name: str, tensor: Tensor, want: list[int]) -> None:
    check(
        list(tensor.shape) == want,
        f"{op}: {name} must have shape {want}, got {list(tensor.shape)}",
    )


def check_dtype(op: str, name: str, tensor: Tensor, want: torch.dtype) -> None:
    check_defined(op, name, tensor)
    check(
        tensor.dtype == want,
        f"{op}: {name} must be {dtype_name(want)}, got {dtype_name(tensor.dtype)}",
    )


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.is_contiguous(),
        f"{op}: {name} must be contiguous, got strides of a view; call .contiguous()",
    )


def check_last_stride(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
        f"{op}: {name} must have a last stride of 1, got {tensor.stride(-1)}",
    )


def check_scale(op: str, scale: float | None) -> None:
    """Kernels take a float32: a larger number is infinite there."""
    rounded = 0.0 if scale is None else ctypes.c_float(scale).value
    check(math.isfinite(rounded), f"{op}: scale must be finite, got {rounded}")


def check_operand(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape)
    check_contiguous(op, name, tensor)


def check_cache(
    op: str, keys: Tensor, values: Tensor, b: int, d: int, dv: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Returns kv_heads and max_len."""
    check_defined(op, "keys", keys)
    check(keys.dim() == 4, f"{op}: keys must be [b, kv_heads, max_len, d], got {list(keys.shape)}")
    g, max_len = keys.shape[1:3]
    check(max_len < 2**31, f"{op}: keys must have fewer than 2^31 tokens, got {max_len}")
    for name, cache, last in (("keys", keys, d), ("values", values, dv)):
        check_dtype(op, name, cache, dtype)
        check_shape(op, name, cache, [b, g, max_len, last])
        check_last_stride(op, name, cache)
    return g, max_len


def check_position(op: str, max_len: int, t: int, position: int) -> None:
    check(
        0 <= position <= max_len - t,
        f"{op}: position must be in 0 .. {max_len - t} (max_len less the tokens of x), "
        f"got {position}",
    )


def check_result_rank(op: str, x: Tensor) -> None:
    check(
        x.dim() <= MAX_DIM,
        f"{op}: x must have at most {MAX_DIM} dimensions, got {x.dim()}",
    )


def check_weight_size(op: str, n: int, k: int) -> None:
    check(
        n >= 1 and k >= 1,
        f"{op}: weight must have at least one row and one column, got n = {n}, k = {k}",
    )
    check(
        n < 2**31 and k < 2**31,
        f"{op}: weight must have fewer than 2^31 rows and columns, got n = {n}, k = {k}",
    )


def checked_layout(op: str, layout: int, known: tuple[str, ...], maker: str) -> str:
    """The tag with the id ``layout``, one of a family's."""
    tags = layouts()
    check(
        0 <= layout < len(tags) and tags[layout] in known,
        f"{op}: layout must be one this build reads, got id {layout}; "
        f"re-pack with openwork.{maker}",
    )
    return tags[layout]


def check_linear_x(op: str, x: Tensor, k: int) -> None:
    check_float(op, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] == k,
        f"{op}: x must have last dimension k = {k} (from weight), got {list(x.shape)}",
    )


def linear_result(op: str, x: Tensor, n: int, bias: Tensor | None, add: Tensor | None) -> Tensor:
    """The result ``[..., n]`` of x ``[..., k]``, once bias and add fit it."""
    if bias is not None:
        check_operand(op, "bias", bias, x.dtype, [n])
    check_result_rank(op, x)
    if add is not None:
        check_operand(op, "add", add, x.dtype, [*x.shape[:-1], n])
    return x.new_empty((*x.shape[:-1], n))
