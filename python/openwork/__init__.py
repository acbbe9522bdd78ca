"""Kernels and algorithms that make compressed language models fast.

Importing the package loads the native library, after which its operators are also at
``torch.ops.openwork``.
"""

from __future__ import annotations

from . import _native, nn, ops
from ._native import info, isa, kernels, layouts, set_isa
from .ops.lowbit import lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from .packing import PackedWeight

__version__ = "0.1.0"

__all__ = [
    "PackedWeight",
    "info",
    "isa",
    "kernels",
    "layouts",
    "lowbit_linear",
    "nn",
    "ops",
    "pack_lowbit",
    "quantize_rows",
    "set_isa",
    "unpack_lowbit",
]
