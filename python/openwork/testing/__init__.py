"""Operator descriptions shared by the tests and the benchmarks; not used by the library."""

from __future__ import annotations

from . import activations, attention, decoder, lowbit, nm
from .case import Cost, OpCase, Reject, Sample, Workload

CASES: tuple[OpCase, ...] = (
    *lowbit.CASES,
    *activations.CASES,
    *attention.CASES,
    *decoder.CASES,
    *nm.CASES,
)

__all__ = ["CASES", "Cost", "OpCase", "Reject", "Sample", "Workload"]
