"""Compressed caches of keys and values: formats, policies, and :class:`Cache`."""

from __future__ import annotations

from .budgets import keep_adaptive, keep_even
from .eviction import H2O, TOVA, AdaKV, Recency, SnapKV
from .merging import EMS, merge_tokens
from .paging import LServe, Quest
from .policy import Held, KeepAll, Kept, LayerPolicy, PageChoice, Policy, Prompt, State

__all__ = [
    "EMS",
    "H2O",
    "TOVA",
    "AdaKV",
    "Held",
    "KeepAll",
    "Kept",
    "LServe",
    "LayerPolicy",
    "PageChoice",
    "Policy",
    "Prompt",
    "Quest",
    "Recency",
    "SnapKV",
    "State",
    "keep_adaptive",
    "keep_even",
    "merge_tokens",
]
