"""Sparse attention: estimators that choose keys, policies for models, and packing of prompts.

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
  hash, so that equal buckets lie on the diagonal, listed as ``blocks`` over the reordered tensors;
  sampled keys are ``columns`` of another index, with the columns of a row's own blocks taken out,
  both with ``causal=False``. The two parts are two calls, the second with the logarithm of the
  sampled share taken from its lse, and :func:`openwork.ops.merge_states` joins them;
- shifted groups (LongLoRA) are sequences of their own: ``cu_seqlens`` of groups of G tokens for one
  half of the heads, and of ``G / 2, G, ..., G, G / 2`` for the other; no index at all.

Positions are aligned at the end of the keys (query i of sq is at ``sk - sq + i``), all lengths are
allowed, scores are float32, and nothing is kept between calls.

A policy (:class:`Policy`) is what a model attends by in long prompts, once :func:`enable` turned it
on: a mask that follows from positions, or an estimator with its options.
"""

from __future__ import annotations

from .block_topk import block_topk_index
from .enable import Prefill, Report, disable, enable, measure_crossover
from .estimated import BlockTopK, Estimated, FlexPrefill, HiP, VerticalSlash
from .flexprefill import flexprefill_index
from .hip import hip_index
from .minference import HeadPattern, MInference, search_patterns
from .packed import packed_hidden
from .policy import AShape, Dense, LMInfinite, LServe, Policy, Visited, lambda_density
from .prepack import Prepacked, prepack
from .probe import each_layer, row_lse
from .shapes import a_shape_index, causal_index, select_heads
from .vertical_slash import vertical_slash_index

__all__ = [
    "AShape",
    "BlockTopK",
    "Dense",
    "Estimated",
    "FlexPrefill",
    "HeadPattern",
    "HiP",
    "LMInfinite",
    "LServe",
    "MInference",
    "Policy",
    "Prefill",
    "Prepacked",
    "Report",
    "VerticalSlash",
    "Visited",
    "a_shape_index",
    "block_topk_index",
    "causal_index",
    "disable",
    "each_layer",
    "enable",
    "flexprefill_index",
    "hip_index",
    "lambda_density",
    "measure_crossover",
    "packed_hidden",
    "prepack",
    "row_lse",
    "search_patterns",
    "select_heads",
    "vertical_slash_index",
]
