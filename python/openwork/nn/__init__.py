"""Modules over the packed formats."""

from __future__ import annotations

from .embedding import LowbitEmbedding
from .linear import LowbitLinear
from .nm_linear import NmLinear
from .sparse import ActiveLinear, LowRankLinear, SparseLinear, SparseLowRankLinear, SumLinear

__all__ = [
    "ActiveLinear",
    "LowRankLinear",
    "LowbitEmbedding",
    "LowbitLinear",
    "NmLinear",
    "SparseLinear",
    "SparseLowRankLinear",
    "SumLinear",
]
