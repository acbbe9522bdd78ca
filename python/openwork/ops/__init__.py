"""Thin wrappers of ``torch.ops.openwork``: docstrings, fake implementations, packed weights."""

from __future__ import annotations

from .. import _native  # noqa: F401  loads the library the overloads are taken from
from .activations import rms_norm, rope, rope_append, silu_mul
from .lowbit import lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit

__all__ = [
    "lowbit_linear",
    "pack_lowbit",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_append",
    "silu_mul",
    "unpack_lowbit",
]
