"""Operator descriptions shared by the tests and the benchmarks; not used by the library."""

from __future__ import annotations

from . import (
    activations,
    active,
    attention,
    block_sparse,
    decoder,
    lowbit,
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
    *decoder.CASES,
    *sparse.CASES,
    *sparse_training.CASES,
    *block_sparse.CASES,
    *active.CASES,
    *nm.CASES,
    *paged_attention.CASES,
)

__all__ = ["CASES", "Cost", "OpCase", "Reject", "Sample", "Workload"]
