"""Thin wrappers of ``torch.ops.openwork``: docstrings, fake implementations, packed weights."""

from __future__ import annotations

from .. import _native  # noqa: F401  loads the library the overloads are taken from
from .activations import rms_norm, rope, rope_append, silu_mul
from .attention import decode_attention
from .decoder import decoder_layers
from .lowbit import lowbit_embedding, lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from .nm import compress_nm, expand_nm, nm_linear
from .nm_training import nm_linear_ste, nm_mask

__all__ = [
    "compress_nm",
    "decode_attention",
    "decoder_layers",
    "expand_nm",
    "lowbit_embedding",
    "lowbit_linear",
    "nm_linear",
    "nm_linear_ste",
    "nm_mask",
    "pack_lowbit",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_append",
    "silu_mul",
    "unpack_lowbit",
]
