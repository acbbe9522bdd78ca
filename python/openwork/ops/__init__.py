"""Thin wrappers of ``torch.ops.openwork``: docstrings, fake implementations, packed weights."""

from __future__ import annotations

from .. import _native  # noqa: F401  loads the library the overloads are taken from
from .activations import rms_norm, rope, rope_append, silu_mul
from .active import active_linear, pack_columns, pack_lowbit_columns, unpack_columns
from .attention import decode_attention
from .attention_scores import block_means, hierarchical_topk, line_scores
from .block_attention import block_attention
from .block_attention_train import block_attention_train
from .block_index import block_index, largest
from .block_sparse import compress_block_sparse, expand_block_sparse
from .decoder import decoder_layers
from .hadamard import hadamard
from .kv_cache import kv_append, kv_commit, kv_read, kv_rollback, page_bounds
from .kv_policy import kv_compact, kv_evict, kv_merge, select_pages
from .lowbit import lowbit_embedding, lowbit_linear, pack_lowbit, quantize_rows, unpack_lowbit
from .merge_states import merge_states
from .nm import compress_nm, expand_nm, nm_linear
from .nm_mask import nm_mask
from .nm_training import nm_linear_ste, straight_through
from .paged_attention import paged_attention
from .sparse import compress_sparse, expand_sparse, sparse_linear
from .sparse_training import sparse_linear_train, sparse_values_grad, transposed_pattern

__all__ = [
    "active_linear",
    "block_attention",
    "block_attention_train",
    "block_index",
    "block_means",
    "compress_block_sparse",
    "compress_nm",
    "compress_sparse",
    "decode_attention",
    "decoder_layers",
    "expand_block_sparse",
    "expand_nm",
    "expand_sparse",
    "hadamard",
    "hierarchical_topk",
    "kv_append",
    "kv_commit",
    "kv_compact",
    "kv_evict",
    "kv_merge",
    "kv_read",
    "kv_rollback",
    "largest",
    "line_scores",
    "lowbit_embedding",
    "lowbit_linear",
    "merge_states",
    "nm_linear",
    "nm_linear_ste",
    "nm_mask",
    "pack_columns",
    "pack_lowbit",
    "pack_lowbit_columns",
    "page_bounds",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_append",
    "select_pages",
    "silu_mul",
    "sparse_linear",
    "sparse_linear_train",
    "sparse_values_grad",
    "straight_through",
    "transposed_pattern",
    "unpack_columns",
    "unpack_lowbit",
]
