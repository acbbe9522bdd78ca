"""Checks of the fake implementations, in the words of the native ones (csrc/ops/check.h)."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_float(op: str, name: str, tensor: Tensor) -> None:
    check(
        tensor.dtype in _FLOATS,
        f"{op}: {name} must be float32, bfloat16 or float16, got {_name(tensor.dtype)}",
    )


def check_shape(op: str, name: str, tensor: Tensor, want: list[int]) -> None:
    check(
        list(tensor.shape) == want,
        f"{op}: {name} must have shape {want}, got {list(tensor.shape)}",
    )


def check_dtype(op: str, name: str, tensor: Tensor, want: torch.dtype) -> None:
    check(tensor.dtype == want, f"{op}: {name} must be {_name(want)}, got {_name(tensor.dtype)}")
