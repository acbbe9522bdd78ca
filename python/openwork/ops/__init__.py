"""Thin wrappers of ``torch.ops.openwork``: docstrings, fake implementations, packed weights."""

from __future__ import annotations

from .. import _native  # noqa: F401  loads the library the overloads are taken from
from .activations import rms_norm, rope, rope_append, silu_mul
from .attention import decode_attention
from .decoder import decoder_layers
from .lowbit import lowbit_embedding, lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit

__all__ = [
    "decode_attention",
    "decoder_layers",
    "lowbit_embedding",
    "lowbit_linear",
    "pack_lowbit",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_append",
    "silu_mul",
    "unpack_lowbit",
]
