"""How good a model is on a text: perplexity, closeness to another model, passkey retrieval."""

from __future__ import annotations

from .passkey import Passkey, finds, passkeys
from .perplexity import EvalResult, Reference, Window, evaluate, predictions, windows

__all__ = [
    "EvalResult",
    "Passkey",
    "Reference",
    "Window",
    "evaluate",
    "finds",
    "passkeys",
    "predictions",
    "windows",
]
