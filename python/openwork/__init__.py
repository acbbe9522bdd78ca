"""Kernels and algorithms that make compressed language models fast.

Importing the package loads the native library, after which its operators are also at
``torch.ops.openwork``.
"""

from __future__ import annotations

from . import nn, ops
from ._native import info, isa, kernels, layouts, set_isa
from .block_index import BlockIndex
from .kv_format import KVFormat
from .kv_pages import KVPages
from .ops.active import active_linear, pack_columns, pack_lowbit_columns, unpack_columns
from .ops.block_sparse import compress_block_sparse, expand_block_sparse
from .ops.lowbit import lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from .ops.nm import compress_nm, expand_nm, nm_linear
from .ops.sparse import compress_sparse, expand_sparse, sparse_linear
from .packing import BlockSparseWeight, ColumnWeight, NmWeight, PackedWeight, SparseWeight

# These build on the names above.
from . import attention, checkpoint, models, prune, quant  # isort: skip
from .checkpoint import save
from .evaluation import evaluate
from .models import generate, load

__version__ = "0.1.0"

__all__ = [
    "BlockIndex",
    "BlockSparseWeight",
    "ColumnWeight",
    "KVFormat",
    "KVPages",
    "NmWeight",
    "PackedWeight",
    "SparseWeight",
    "active_linear",
    "attention",
    "checkpoint",
    "compress_block_sparse",
    "compress_nm",
    "compress_sparse",
    "evaluate",
    "expand_block_sparse",
    "expand_nm",
    "expand_sparse",
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
    "pack_columns",
    "pack_lowbit",
    "pack_lowbit_columns",
    "prune",
    "quant",
    "quantize_rows",
    "save",
    "set_isa",
    "sparse_linear",
    "unpack_columns",
    "unpack_lowbit",
]
