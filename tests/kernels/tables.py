"""Kernel tables as the build reports them."""

from __future__ import annotations

from typing import NamedTuple

import openwork
from openwork import _kernels

TIERS = ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx")


class Entry(NamedTuple):
    """One row of a kernel table; ``key`` is the family's own: what the kernel reads."""

    name: str
    tier: str
    key: int
    max_m: int


def table(family: str) -> list[Entry]:
    """The table of a family, best kernel first."""
    return [Entry(*row) for row in _kernels.kernel_table(family)]


def runs_here(entry: Entry) -> bool:
    return TIERS.index(entry.tier) <= TIERS.index(openwork.info().cpu_isa)
