"""Modules over the packed formats."""

from __future__ import annotations

from .embedding import LowbitEmbedding
from .linear import LowbitLinear
from .sparse import ActiveLinear, LowRankLinear, SparseLinear, SparseLowRankLinear, SumLinear

__all__ = [
    "ActiveLinear",
    "LowRankLinear",
    "LowbitEmbedding",
    "LowbitLinear",
    "SparseLinear",
    "SparseLowRankLinear",
    "SumLinear",
]
