"""Costs and times to rates and shares of the roof.

roof time   = max(bytes / read rate, operations / peak of the unit)
share       = roof time / measured time
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.machine import Peaks


@dataclass(frozen=True)
class Rates:
    """GB/s, GFLOP/s (operations of any unit) and share of the roof of one measured time."""

    gb_s: float
    gflop_s: float
    roof_share: float
    bound: str


def roof_seconds(bytes_moved: float, ops: float, unit: str, peaks: Peaks) -> float:
    """Least time the machine needs for ``bytes_moved`` bytes and ``ops`` operations of ``unit``."""
    return max(bytes_moved / peaks.read_rate(), ops / peaks.ops_rate(unit))


def rates(bytes_moved: float, ops: float, unit: str, seconds: float, peaks: Peaks) -> Rates:
    """What ``seconds`` mean; ``bound`` says which of the two roofs is the lower one."""
    roof = roof_seconds(bytes_moved, ops, unit, peaks)
    return Rates(
        gb_s=bytes_moved / seconds / 1e9,
        gflop_s=ops / seconds / 1e9,
        roof_share=roof / seconds,
        bound="memory" if roof == bytes_moved / peaks.read_rate() else unit,
    )
