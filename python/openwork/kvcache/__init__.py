"""Compressed caches of keys and values: formats, policies, and :class:`Cache`."""

from __future__ import annotations

from .budgets import keep_adaptive, keep_even
from .cache import Cache, prefilling, roll_back
from .compression import column_scores
from .eviction import H2O, TOVA, AdaKV, Recency, Saliency, SnapKV
from .formats import Format, kivi
from .kvquant import fit_levels, kvquant, kvquant_each
from .layer import LayerCache
from .merging import EMS, merge_tokens
from .mixed import MixedPrecision
from .paging import LServe, Quest
from .policy import Held, KeepAll, Kept, LayerPolicy, PageChoice, Policy, Prompt, State
from .razor import Compensation, Razor, retrieval_heads

__all__ = [
    "EMS",
    "H2O",
    "TOVA",
    "AdaKV",
    "Cache",
    "Compensation",
    "Format",
    "Held",
    "KeepAll",
    "Kept",
    "LServe",
    "LayerCache",
    "LayerPolicy",
    "MixedPrecision",
    "PageChoice",
    "Policy",
    "Prompt",
    "Quest",
    "Razor",
    "Recency",
    "Saliency",
    "SnapKV",
    "State",
    "column_scores",
    "fit_levels",
    "keep_adaptive",
    "keep_even",
    "kivi",
    "kvquant",
    "kvquant_each",
    "merge_tokens",
    "prefilling",
    "retrieval_heads",
    "roll_back",
]
