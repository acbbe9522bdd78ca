"""llama.cpp end to end: the same GGUF file, the same tokens, its own best formats.

``requantize`` writes the file's weights in another format with llama.cpp's own quantizer;
:class:`Session` runs one file: ``prefill`` evaluates a prompt at once, ``decode`` evaluates tokens
one by one. No sampling: the tokens are given, so every engine does the same work.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.competitors.ggml_library import library

# Format -> (llama_ftype, bits of its weights). Decoding is compared with the fastest 4-bit one,
# prefill with the fastest of all.
FORMATS: dict[str, tuple[int, int]] = {
    "Q4_0": (2, 4),
    "Q4_1": (3, 4),
    "IQ4_NL": (25, 4),
    "Q4_K_M": (15, 4),
    "Q8_0": (7, 8),
    "BF16": (32, 16),
}

# Positions of the fields used, in 32-bit words: llama_context_params {n_ctx, n_batch, ...} and
# llama_model_quantize_params {nthread, ftype, output_type, embedding_type, allow_requantize}.
N_CTX, N_BATCH = 0, 1
QUANTIZE_THREADS, QUANTIZE_FORMAT, ALLOW_REQUANTIZE = 0, 1, 4


def can_requantize() -> bool:
    """Whether the installed package exports llama.cpp's quantizer."""
    return hasattr(library(), "llama_model_quantize")


def requantize(source: Path, target: Path, file_format: str, threads: int) -> None:
    """Write ``source`` to ``target`` with its weights in ``file_format`` (a key of FORMATS)."""
    lib = library()
    parameters = lib.llama_model_quantize_default_params()
    parameters.as_int32[QUANTIZE_THREADS] = threads
    parameters.as_int32[QUANTIZE_FORMAT] = FORMATS[file_format][0]
    # Four booleans share the word; the first one is the lowest byte.
    parameters.as_int32[ALLOW_REQUANTIZE] |= 1
    status = lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp: cannot write {source.name} as {file_format}: {status}")


class Session:
    """A loaded model with a cache for ``max_tokens`` tokens."""

    def __init__(self, path: Path, *, threads: int, max_tokens: int) -> None:
        lib = library()
        self._lib = lib
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp: cannot load {path.name}")
        parameters = lib.llama_context_default_params()
        parameters.as_int32[N_CTX] = max_tokens
        parameters.as_int32[N_BATCH] = max_tokens
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            lib.llama_model_free(self._model)
            raise RuntimeError(f"llama.cpp: cannot make a context of {max_tokens} tokens")
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def _evaluate(self, tokens: NDArray[np.int32]) -> None:
        batch = self._lib.llama_batch_get_one(tokens.ctypes.data, len(tokens))
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp: llama_decode must return 0, got {status}")

    def prefill(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """From an empty cache, evaluate ``tokens`` in one call; logits [vocabulary] of the last."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        self._evaluate(tokens.astype(np.int32))
        return self.logits()

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """From an empty cache, evaluate ``tokens`` one by one; logits [vocabulary] of the last."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        array = tokens.astype(np.int32)
        for index in range(len(array)):
            self._evaluate(array[index : index + 1])
        return self.logits()

    def logits(self) -> NDArray[np.float32]:
        """Copy of the logits [vocabulary] of the last token evaluated."""
        self._lib.llama_synchronize(self._context)
        row = self._lib.llama_get_logits_ith(self._context, -1)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(row, (self._vocabulary,)).copy()
        return logits

    def close(self) -> None:
        """Free the context and the model."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
