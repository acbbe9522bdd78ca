"""ggml's matrix product (``ggml_mul_mat`` on its CPU backend), the kernels of llama.cpp.

Weights lie where llama.cpp would put them: in the CPU_REPACK buffer when ggml has an interleaved
kernel for the type and the CPU, in the plain one otherwise. A sample of several products is one
graph, as in a model, so the cost of starting a graph is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from bench.competitors.ggml_library import ExtraBuffers, InitParameters, library
from bench.problem import Competitor, Prepared, Problem, Variant, uniform_weight
from openwork.cli.llama_cpp import missing

F32 = 0
# bits -> formats of that width (ggml_type). Q4_0 and Q8_0 are symmetric in blocks of 32, Q4_1 is
# asymmetric, the K formats scale blocks of 16 or 32 inside super-blocks of 256.
FORMATS: dict[int, dict[str, int]] = {
    2: {"Q2_K": 10},
    3: {"Q3_K": 11},
    4: {"Q4_0": 2, "Q4_1": 3, "Q4_K": 12, "IQ4_NL": 20, "IQ4_XS": 23},
    8: {"Q8_0": 8},
}


@dataclass
class Graphs:
    """ggml objects of one prepared product; freed together."""

    backend: int
    contexts: list[int]
    buffers: list[int]
    graphs: list[int]
    y: int

    def close(self) -> None:
        lib = library()
        for buffer in self.buffers:
            lib.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            lib.ggml_free(context)
        lib.ggml_backend_free(self.backend)


def _context(tensors: int, graphs: int = 0, nodes: int = 0) -> int:
    """A context that holds descriptions only; data lies in backend buffers."""
    lib = library()
    size = tensors * lib.ggml_tensor_overhead()
    size += graphs * lib.ggml_graph_overhead_custom(nodes, False)
    context = lib.ggml_init(InitParameters(size, None, True))
    if not context:
        raise MemoryError("ggml: out of memory")
    return int(context)


def _repack_buffer_type(device: int) -> int | None:
    """ggml's buffer type for interleaved weights, as llama.cpp finds it."""
    lib = library()
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    types = ExtraBuffers(address)(device)
    index = 0
    while types[index]:
        if lib.ggml_backend_buft_name(types[index]) == b"CPU_REPACK":
            return int(types[index])
        index += 1
    return None


@lru_cache(maxsize=len(FORMATS[4]))
def _quantize(n: int, k: int, ggml_type: int) -> NDArray[np.uint8]:
    lib = library()
    weight = uniform_weight(n, k)
    data = np.empty(n * lib.ggml_row_size(ggml_type, k), np.uint8)
    written = lib.ggml_quantize_chunk(
        ggml_type, weight.ctypes.data, data.ctypes.data, 0, n, k, None
    )
    if written != data.nbytes:
        raise RuntimeError(f"ggml: quantized weight must have {data.nbytes} bytes, got {written}")
    return data


def _build(
    problem: Problem, ggml_type: int, groups: int, calls: int, *, repack: bool
) -> Graphs | None:
    """Weights, inputs and graphs; None when ggml has no interleaved kernel for this type."""
    lib = library()
    count = groups * calls
    backend = lib.ggml_backend_cpu_init()
    lib.ggml_backend_cpu_set_n_threads(backend, problem.threads)
    device = lib.ggml_backend_get_device(backend)
    plain = lib.ggml_backend_get_default_buffer_type(backend)
    buffer_type = _repack_buffer_type(device) if repack else plain
    if buffer_type is None:
        lib.ggml_backend_free(backend)
        return None

    holder = _context(count)
    weights = [
        lib.ggml_new_tensor_2d(holder, ggml_type, problem.k, problem.n) for _ in range(count)
    ]
    # One input and one output per product of a group, shared by all groups.
    work = _context(1 + count, groups, calls + 1)
    x = lib.ggml_new_tensor_2d(work, F32, problem.k, problem.m)
    products = [lib.ggml_mul_mat(work, weight, x) for weight in weights]
    made = Graphs(backend, [holder, work], [], [], products[calls - 1])

    made.buffers.append(lib.ggml_backend_alloc_ctx_tensors_from_buft(holder, buffer_type))
    if repack and not lib.ggml_backend_dev_supports_op(device, products[0]):
        made.close()
        return None
    made.buffers.append(lib.ggml_backend_alloc_ctx_tensors_from_buft(work, plain))
    if not all(made.buffers):
        raise MemoryError("ggml: out of memory")
    data = _quantize(problem.n, problem.k, ggml_type)
    for weight in weights:
        lib.ggml_backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
    lib.ggml_backend_tensor_set(x, problem.x.ctypes.data, 0, problem.x.nbytes)
    for group in range(groups):
        graph = lib.ggml_new_graph_custom(work, calls + 1, False)
        for product in products[group * calls : (group + 1) * calls]:
            lib.ggml_build_forward_expand(graph, product)
        made.graphs.append(graph)
    return made


def _prepare(problem: Problem, ggml_type: int) -> Prepared:
    lib = library()
    weight_bytes = problem.n * lib.ggml_row_size(ggml_type, problem.k)
    groups, calls = problem.plan(weight_bytes)
    made = _build(problem, ggml_type, groups, calls, repack=True)
    if made is None:
        made = _build(problem, ggml_type, groups, calls, repack=False)
    assert made is not None
    graphs, backend, y = made.graphs, made.backend, made.y

    def run(group: int) -> None:
        status = lib.ggml_backend_graph_compute(backend, graphs[group])
        if status != 0:
            raise RuntimeError(f"ggml: graph_compute must return 0, got {status}")

    def output() -> NDArray[np.float32]:
        result = np.empty((problem.m, problem.n), np.float32)
        lib.ggml_backend_tensor_get(y, result.ctypes.data, 0, result.nbytes)
        return result

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=output,
        close=made.close,
    )


def _variants(problem: Problem) -> list[Variant]:
    lib = library()
    return [
        Variant(name, problem.bits, partial(_prepare, problem, ggml_type))
        for name, ggml_type in FORMATS[problem.bits].items()
        if problem.k % lib.ggml_blck_size(ggml_type) == 0
    ]


GGML = Competitor(name="ggml", missing=missing, variants=_variants)
