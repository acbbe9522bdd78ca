"""Other libraries, one file each; the registry says which of them compete with which operator."""

from __future__ import annotations

from bench.competitors import (
    attention_gradients,
    ggml,
    onnxruntime,
    openwork_dense,
    openwork_int4,
    torch_attention,
    torch_csr,
    torch_dense,
    torch_hadamard,
    torch_int4,
    torch_int8_dynamic,
    torch_sdpa,
    torch_semi_structured,
)
from bench.index_cases import ESTIMATORS, STEERED
from bench.problem import Competitor

# Operator -> its competitors, in the order of result files and tables.
COMPETITORS: dict[str, tuple[Competitor, ...]] = {
    "lowbit_linear": (
        torch_dense.FP32,
        torch_dense.BF16,
        torch_int4.INT4,
        torch_int8_dynamic.INT8_DYNAMIC,
        onnxruntime.ONNXRUNTIME,
        ggml.GGML,
    ),
    "nm_linear": (torch_dense.FP32, torch_dense.BF16, openwork_int4.OPENWORK_INT4),
    "decode_attention": (torch_sdpa.SDPA, torch_sdpa.FOLDED),
    "paged_attention": (torch_sdpa.SDPA, torch_sdpa.FOLDED),
    "block_attention": (torch_attention.SDPA, torch_attention.FLEX),
    "block_attention_backward": (attention_gradients.FORWARD, attention_gradients.SDPA),
    "sparse_linear": (torch_dense.FP32, torch_dense.BF16, torch_csr.CSR),
    "block_sparse_linear": (torch_dense.FP32, torch_dense.BF16, torch_csr.CSR),
    "hadamard": (torch_hadamard.MATMUL, torch_hadamard.BUTTERFLY),
    **dict.fromkeys(ESTIMATORS, (STEERED,)),
    "active_linear": (openwork_dense.DENSE, torch_dense.FP32, torch_dense.BF16),
}

# The same on a GPU.
GPU_COMPETITORS: dict[str, tuple[Competitor, ...]] = {
    "lowbit_linear": (torch_dense.FP16, torch_int4.INT4),
    "nm_linear": (torch_dense.FP16, torch_semi_structured.SEMI_STRUCTURED),
    "hadamard": (torch_hadamard.MATMUL, torch_hadamard.BUTTERFLY),
}
