"""Loading and running Llama-family models: :func:`load`, :class:`Llama`, :func:`generate`."""

from __future__ import annotations

from pathlib import Path

import torch

from openwork.models.config import LayerShape, Llama3Rope, LlamaConfig
from openwork.models.generation import generate
from openwork.models.gguf import load_gguf
from openwork.models.hf import load_hf, read_json
from openwork.models.kv_cache import KVCache
from openwork.models.llama import DenseLinear, Llama
from openwork.models.tokenizer import Tokenizer

__all__ = [
    "DenseLinear",
    "KVCache",
    "LayerShape",
    "Llama",
    "Llama3Rope",
    "LlamaConfig",
    "Tokenizer",
    "generate",
    "load",
]


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Llama:
    """Load a model and its tokenizer.

    Args:
        path: a GGUF file, or a directory with ``config.json``, ``model.safetensors`` (or shards and
            their index) and ``tokenizer.json``; dense, quantized by :mod:`openwork.checkpoint`, or
            sparse in a format of :mod:`openwork.sparse_bitmask`.
        dtype: of the activations, and of the weights that are neither quantized nor held without
            their zeros.

    Returns:
        The model, in eval mode and without gradients. ``model.tokenizer`` is None where there is
        no tokenizer this package reads.

    Raises:
        OSError: a file is missing or unreadable.
        FormatError: a file is truncated, damaged or inconsistent, or the model is of an
            architecture this decoder does not compute.

    Example:
        >>> model = openwork.load("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
        >>> model.config.layers  # doctest: +SKIP
        30
    """
    path = Path(path)
    if not path.is_dir():
        return load_gguf(path, dtype=dtype)
    values = read_json(path / "config.json")
    if all(values.get(key) is None for key in ("quantization_config", "compression_config")):
        return load_hf(path, dtype=dtype)
    from openwork import checkpoint  # here, since it is built on this package

    return checkpoint.load(path, dtype=dtype)
