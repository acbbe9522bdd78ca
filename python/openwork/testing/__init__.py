"""Operator descriptions shared by the tests and the benchmarks; not used by the library."""

from __future__ import annotations

from . import (
    activations,
    active,
    attention,
    attention_scores,
    block_attention,
    block_attention_train,
    block_index,
    block_sparse,
    decoder,
    hadamard,
    kv_cache,
    kv_policy,
    lowbit,
    merge_states,
    nm,
    paged_attention,
    sparse,
    sparse_training,
)
from .case import Cost, OpCase, Reject, Sample, Workload

CASES: tuple[OpCase, ...] = (
    *lowbit.CASES,
    *activations.CASES,
    *attention.CASES,
    *block_attention.CASES,
    *block_attention_train.CASES,
    *merge_states.CASES,
    *hadamard.CASES,
    *attention_scores.CASES,
    *block_index.CASES,
    *decoder.CASES,
    *sparse.CASES,
    *sparse_training.CASES,
    *block_sparse.CASES,
    *active.CASES,
    *nm.CASES,
    *kv_cache.CASES,
    *kv_policy.CASES,
    *paged_attention.CASES,
)

__all__ = ["CASES", "Cost", "OpCase", "Reject", "Sample", "Workload"]
