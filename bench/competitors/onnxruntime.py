"""onnxruntime's ``com.microsoft::MatMulNBits``.

    B     [n, blocks, block_size * bits / 8]  codes, lowest bits first
    zeros [n, ceil(blocks * bits / 8)]        same packing, one row of blocks after the other

``accuracy_level`` 0 multiplies in the type of x, 4 quantizes x to int8. A sample of several
products is one graph with as many nodes, which spares onnxruntime the cost of its own calls. It
also merges constants of equal content, so every node has its rows rotated by its own index: with
equal weights an 8-bit product "read" 142 GB/s from a memory that delivers 55.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from bench.grid import Grid, uniform_grid
from bench.problem import Competitor, Prepared, Problem, Variant

# Widths with a packed CPU kernel; a 3-bit row is compared with the next wider one.
BITS = (2, 4, 8)
DEFAULT_BLOCK = 128


def _missing() -> str | None:
    absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
    return f"package {' and '.join(absent)} is not installed" if absent else None


def _pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the last axis, lowest bits first, the last byte padded with zeros."""
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    lanes = padded.reshape(*padded.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(lanes << shifts, axis=-1)
    return packed


def _model(problem: Problem, grid: Grid, bits: int, block: int, level: int, calls: int) -> bytes:
    """A graph of ``calls`` products of the same x; product i has its rows rotated by i."""
    from onnx import TensorProto, helper, numpy_helper

    blocks = problem.k // block
    # One row per output, so that rotating the rows rotates the outputs.
    tensors: dict[str, NDArray[np.generic]] = {
        "B": _pack_bits(grid.codes.reshape(problem.n, blocks, block), bits),
        "scales": grid.scales,
    }
    if not problem.symmetric:
        tensors["zeros"] = _pack_bits(grid.zeros, bits)
    nodes, weights, outputs = [], [], []
    for index in range(calls):
        names = {name: f"{name}{index}" for name in tensors}
        for name, values in tensors.items():
            rotated = np.roll(values, index, axis=0)
            flat = rotated if name == "B" else rotated.reshape(-1)
            weights.append(numpy_helper.from_array(flat, names[name]))
        nodes.append(helper.make_node(
            "MatMulNBits", ["x", *names.values()], [f"y{index}"], domain="com.microsoft",
            K=problem.k, N=problem.n, bits=bits, block_size=block, accuracy_level=level,
        ))  # fmt: skip
        outputs.append(helper.make_tensor_value_info(
            f"y{index}", TensorProto.FLOAT, [problem.m, problem.n]
        ))  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [problem.m, problem.k])
    graph = helper.make_graph(nodes, "products", [x], outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _prepare(problem: Problem, bits: int, block: int, level: int) -> Prepared:
    import onnxruntime

    grid = uniform_grid(problem.n, problem.k, bits, block, problem.symmetric)
    weight_bytes = problem.n * problem.k * bits // 8 + grid.scales.nbytes
    groups, calls = problem.plan(weight_bytes)
    model = _model(problem, grid, bits, block, level, calls)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Between runs its workers would otherwise spin on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(groups)
    ]
    # Outputs bound once: no allocation and no copy inside the timed call.
    outputs = [np.empty((problem.m, problem.n), np.float32) for _ in range(calls)]
    bindings = []
    for session in sessions:
        binding = session.io_binding()
        binding.bind_cpu_input("x", problem.x)
        for index, y in enumerate(outputs):
            binding.bind_output(f"y{index}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        bindings.append(binding)

    def run(group: int) -> None:
        sessions[group].run_with_iobinding(bindings[group])

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: np.roll(outputs[-1], -(calls - 1), axis=1),
    )


def _variants(problem: Problem) -> list[Variant]:
    bits = min(width for width in BITS if width >= problem.bits)
    block = problem.group_size
    if block & (block - 1) or problem.k % block:
        # Blocks are powers of two that divide k.
        block = next((size for size in (DEFAULT_BLOCK, 64, 32, 16) if problem.k % size == 0), 0)
    if not block:
        return []
    return [
        Variant(f"{bits} bit, g{block}, accuracy_level {level}", bits,
                partial(_prepare, problem, bits, block, level))
        for level in (0, 4)
    ]  # fmt: skip


ONNXRUNTIME = Competitor(name="onnxruntime", missing=_missing, variants=_variants)
