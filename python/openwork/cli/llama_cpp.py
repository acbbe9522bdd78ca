"""llama.cpp on a model file, by the C functions of whichever package brings them.

``llama-cpp-python`` compiles llama.cpp on the machine it is installed on and so uses every
instruction the CPU has; ``xllamacpp`` ships a ready wheel that stops at AVX2. The first one found
is taken, and :func:`build` says which: on a CPU with AVX-512 the wheel took two to three times as
long for a 4-bit product at m = 128.

All calls come from the thread that runs our models. torch and llama.cpp share one OpenMP library,
which keeps a pool of threads for each caller and stops spinning between parallel regions for good
once the pools hold more threads than there are cores. With llama.cpp's server, which computes in a
thread of its own, our decoding fell from 204 to 90 tokens a second on two cores, and its own with
it; called from here, it uses the threads that torch uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_uint32, c_void_p
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from openwork.throughput import DECODE, PREFILL, Engine

NAME = "llama.cpp"

# package on PyPI -> (module, library inside the module, what it is compiled for)
LIBRARIES = {
    "llama-cpp-python": ("llama_cpp", "lib/libllama.so", "native"),
    "xllamacpp": ("xllamacpp", "xllamacpp.abi3.so", "AVX2 wheel"),
}


class Parameters(ctypes.Structure):
    """A parameter struct of llama.cpp of any version: opaque, filled by the library's own defaults.

    These structs are returned and passed by value and grow from release to release. The callee
    reads and writes only its own size, so a block larger than any of them serves every version;
    the first fields, which have kept their places since 2023, are set through ``as_int32``.
    """

    _fields_ = (("as_int32", c_int32 * 256),)


# Positions in llama_context_params {n_ctx, n_batch, ...}, in 32-bit words.
N_CTX, N_BATCH = 0, 1
# The same in llama_model_quantize_params {nthread, ftype, output_type, embedding_type,
# allow_requantize}.
QUANTIZE_THREADS, QUANTIZE_FORMAT, ALLOW_REQUANTIZE = 0, 1, 4

# What its quantizer writes here: format -> (llama_ftype, bits of the weights).
FORMATS: dict[str, tuple[int, int]] = {
    "Q4_0": (2, 4),
    "Q4_1": (3, 4),
    "IQ4_NL": (25, 4),
    "Q4_K_M": (15, 4),
    "Q8_0": (7, 8),
    "BF16": (32, 16),
}
# The 4-bit one that `python -m bench` found the fastest in both phases.
FASTEST = "Q4_0"

LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

# name -> (result, arguments); pointers to opaque structs are c_void_p.
SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (Parameters, ()),
    "llama_context_default_params": (Parameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, Parameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, Parameters)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_get_one": (Parameters, (c_void_p, c_int32)),
    "llama_decode": (c_int32, (c_void_p, Parameters)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
}
# Not exported by every package.
OPTIONAL_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "llama_model_quantize_default_params": (Parameters, ()),
    "llama_model_quantize": (c_uint32, (c_char_p, c_char_p, POINTER(Parameters))),
}


def package() -> str | None:
    """Name of the package that is used, or None if none is installed."""
    return next((name for name, (module, *_) in LIBRARIES.items() if find_spec(module)), None)


def missing() -> str | None:
    """Why llama.cpp cannot run here, or None."""
    return None if package() else f"package {' or '.join(LIBRARIES)} is not installed"


def build() -> str:
    """What is measured, such as ``"llama.cpp (native)"``, or why nothing is."""
    name = package()
    return str(missing()) if name is None else f"{NAME} ({LIBRARIES[name][2]})"


@cache
def library() -> ctypes.CDLL:
    """The loaded library with its signatures declared and its log silenced.

    Raises:
        RuntimeError: no package brings one.
        OSError: it cannot be loaded.
    """
    name = package()
    if name is None:
        raise RuntimeError(str(missing()))
    module, path, _ = LIBRARIES[name]
    # "" only for a package without files, which then fails to load with the path in the message.
    spec = find_spec(module)
    origin = spec.origin if spec and spec.origin else ""
    lib = ctypes.CDLL(str(Path(origin).parent / path))
    declare(lib, SIGNATURES)
    exported = {name: types for name, types in OPTIONAL_SIGNATURES.items() if hasattr(lib, name)}
    declare(lib, exported)
    lib.llama_log_set(_silence(), None)
    lib.llama_backend_init()
    return lib


def declare(lib: ctypes.CDLL, signatures: dict[str, tuple[object, tuple[object, ...]]]) -> None:
    """Tell ctypes what functions take and return; see ``SIGNATURES``."""
    for function, (result, arguments) in signatures.items():
        getattr(lib, function).restype = result
        getattr(lib, function).argtypes = arguments


@cache
def _silence() -> Callable[..., None]:
    # Cached: the library keeps the pointer for ever, so the callback must live as long.
    return LogCallback(lambda level, text, user: None)


def describe() -> str:
    """Package, version and the instruction sets ggml was compiled for."""
    name = package()
    if name is None:
        return str(missing())
    features = library().llama_print_system_info().decode()
    enabled = [part.split("=")[0].strip() for part in features.split("|") if "= 1" in part]
    return f"{name} {version(name)} ({' '.join(enabled).removeprefix('CPU : ')})"


def can_requantize() -> bool:
    """Whether the installed package exports llama.cpp's quantizer."""
    return hasattr(library(), "llama_model_quantize")


def requantize(source: Path, target: Path, file_format: str, threads: int) -> None:
    """Write ``source`` to ``target`` with its weights in ``file_format`` (a key of FORMATS).

    Raises:
        RuntimeError: it cannot be read or written.
    """
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
        raise RuntimeError(f"{NAME}: cannot write {source.name} as {file_format}: {status}")


class Session:
    """A loaded model with a cache for ``max_tokens`` tokens. No sampling: the tokens are given.

    Raises:
        RuntimeError: the file cannot be loaded, or there is no memory for the cache.
    """

    def __init__(self, path: Path, *, threads: int, max_tokens: int) -> None:
        lib = library()
        self._lib = lib
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"{NAME}: cannot load {path.name}")
        parameters = lib.llama_context_default_params()
        parameters.as_int32[N_CTX] = max_tokens
        parameters.as_int32[N_BATCH] = max_tokens
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            lib.llama_model_free(self._model)
            raise RuntimeError(f"{NAME}: cannot make a context of {max_tokens} tokens")
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def prefill(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """From an empty cache, evaluate ``tokens`` in one call; logits [vocabulary] of the last."""
        self._clear()
        self._evaluate(tokens.astype(np.int32))
        return self.logits()

    def decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """From an empty cache, evaluate ``tokens`` one by one; logits [vocabulary] of the last."""
        self._clear()
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

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def _evaluate(self, tokens: NDArray[np.int32]) -> None:
        batch = self._lib.llama_batch_get_one(tokens.ctypes.data, len(tokens))
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"{NAME}: llama_decode must return 0, got {status}")


def engine(path: Path) -> Engine:
    """llama.cpp with ``path`` loaded, on as many threads as torch uses."""
    session = Session(path, threads=torch.get_num_threads(), max_tokens=max(PREFILL, DECODE))
    return Engine(
        prefill=lambda tokens: session.prefill(tokens.numpy()),
        decode=lambda tokens: session.decode(tokens.numpy()),
    )
