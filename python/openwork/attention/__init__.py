"""Sparse attention: estimators that choose keys, and packing of prompts.

An estimator is a function of queries and keys that returns a :class:`openwork.BlockIndex`::

    index = estimator(q, k, budget, scale=, cu_seqlens_q=, cu_seqlens_k=, block_m=, block_n=)
    o = openwork.ops.block_attention(q, k, v, index, causal=True)

and takes three steps, each an operator that handles all heads and sequences at once. What it costs
is the first; what it decides is the second.

1. *measure*: scores of keys, of distances, or of pairs of blocks
   (:func:`~openwork.ops.line_scores`, :func:`~openwork.ops.block_means`,
   :func:`~openwork.ops.hierarchical_topk`);
2. *select*: scores become marks, by number or by mass (:func:`~openwork.ops.largest`);
3. *list*: marks of blocks, columns, slashes, a window and sinks become lists
   (:func:`~openwork.ops.block_index`).

Estimators that measure otherwise keep the last two steps:

- antidiagonal scores (XAttention): sums of strided antidiagonals are one score for each pair of
  blocks; a row's are selected by mass and listed as ``blocks``;
- sorted hashing with a sampled residual (HyperAttention): queries and keys are reordered by their
  hash, so that equal buckets lie on the diagonal, listed as ``blocks`` over the reordered tensors
  (``causal=False``); sampled keys are ``columns``, and since an index lists no column inside of a
  listed block, samples that were attended to are left out. The two parts are two calls, the second
  with ``log(n / samples)`` added to its lse, and :func:`openwork.ops.merge_states` joins them;
- shifted groups (LongLoRA) are sequences of their own: ``cu_seqlens`` of groups of G tokens for one
  half of the heads, and of ``G / 2, G, ..., G, G / 2`` for the other; no index at all.

Positions are aligned at the end of the keys (query i of sq is at ``sk - sq + i``), all lengths are
allowed, scores are float32, and nothing is kept between calls.
"""

from __future__ import annotations

from .block_topk import block_topk_index
from .flexprefill import flexprefill_index
from .hip import hip_index
from .prepack import Prepacked, prepack
from .shapes import a_shape_index, causal_index, select_heads
from .vertical_slash import vertical_slash_index

__all__ = [
    "Prepacked",
    "a_shape_index",
    "block_topk_index",
    "causal_index",
    "flexprefill_index",
    "hip_index",
    "prepack",
    "select_heads",
    "vertical_slash_index",
]
