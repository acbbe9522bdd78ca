"""The shared library with ggml's and llama.cpp's C functions, found inside an installed package.

``llama-cpp-python`` compiles llama.cpp on the machine it is installed on and so uses every
instruction the CPU has; ``xllamacpp`` ships a ready wheel that stops at AVX2. The first one found
is taken, and :func:`describe` says which: on a CPU with AVX-512 the wheel took two to three times
as long for a 4-bit product at m = 128.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# package on PyPI -> (module, library inside the module)
LIBRARIES = {
    "llama-cpp-python": ("llama_cpp", "lib/libllama.so"),
    "xllamacpp": ("xllamacpp", "xllamacpp.abi3.so"),
}


class Parameters(ctypes.Structure):
    """A parameter struct of llama.cpp of any version: opaque, filled by the library's own defaults.

    These structs are returned and passed by value and grow from release to release. The callee
    reads and writes only its own size, so a block larger than any of them serves every version;
    the first fields, which have kept their places since 2023, are set through ``as_int32``.
    """

    _fields_ = (("as_int32", c_int32 * 256),)


class InitParameters(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
ExtraBuffers = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)

# name -> (result, arguments); pointers to opaque structs are c_void_p.
SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_init": (c_void_p, (InitParameters,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_nbytes": (c_size_t, (c_void_p,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_get_default_buffer_type": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
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
    "llama_model_quantize": (ctypes.c_uint32, (c_char_p, c_char_p, POINTER(Parameters))),
}


def package() -> str | None:
    """Name of the package that is used, or None if none is installed."""
    return next((name for name, (module, _) in LIBRARIES.items() if find_spec(module)), None)


def missing() -> str | None:
    """Why ggml cannot run here, or None."""
    return None if package() else f"package {' or '.join(LIBRARIES)} is not installed"


@cache
def library() -> ctypes.CDLL:
    """The loaded library with its signatures declared and its log silenced."""
    name = package()
    if name is None:
        raise RuntimeError(str(missing()))
    module, path = LIBRARIES[name]
    # "" only for a package without files, which then fails to load with the path in the message.
    spec = find_spec(module)
    origin = spec.origin if spec and spec.origin else ""
    lib = ctypes.CDLL(str(Path(origin).parent / path))
    for signatures in (SIGNATURES, OPTIONAL_SIGNATURES):
        for function, (result, arguments) in signatures.items():
            if signatures is SIGNATURES or hasattr(lib, function):
                getattr(lib, function).restype = result
                getattr(lib, function).argtypes = arguments
    lib.llama_log_set(_silence(), None)
    lib.llama_backend_init()
    return lib


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
