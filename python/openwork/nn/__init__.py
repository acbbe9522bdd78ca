"""Modules over the packed formats."""

from __future__ import annotations

from .embedding import LowbitEmbedding
from .linear import LowbitLinear

__all__ = ["LowbitEmbedding", "LowbitLinear"]
