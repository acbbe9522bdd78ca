"""Modules over the packed formats."""

from __future__ import annotations

from .embedding import LowbitEmbedding
from .linear import LowbitLinear
from .nm_linear import NmLinear

__all__ = ["LowbitEmbedding", "LowbitLinear", "NmLinear"]
