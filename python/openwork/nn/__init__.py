"""Modules over the packed formats."""

from __future__ import annotations

from .linear import LowbitLinear

__all__ = ["LowbitLinear"]
