"""Kernels and algorithms that make compressed language models fast.

Importing the package loads the native library, after which its operators are also at
``torch.ops.openwork``.
"""

from __future__ import annotations

from . import nn, ops
from ._native import info, isa, kernels, layouts, set_isa
from .ops.lowbit import lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from .ops.nm import compress_nm, expand_nm, nm_linear
from .packing import NmWeight, PackedWeight

# These build on the names above.
from . import checkpoint, models, quant  # isort: skip
from .checkpoint import save
from .evaluation import evaluate
from .models import generate, load

__version__ = "0.1.0"

__all__ = [
    "NmWeight",
    "PackedWeight",
    "checkpoint",
    "compress_nm",
    "evaluate",
    "expand_nm",
    "generate",
    "info",
    "isa",
    "kernels",
    "layouts",
    "load",
    "lowbit_linear",
    "models",
    "nm_linear",
    "nn",
    "ops",
    "pack_lowbit",
    "quant",
    "quantize_rows",
    "save",
    "set_isa",
    "unpack_lowbit",
]
