"""Costs and times to rates and shares of the roof.

roof time   = max(bytes / read rate, operations / peak of the unit)
share       = roof time / measured time

The read rate of a machine that is shared drifts by a third within minutes, so each row brings its
own: the median of streaming reads that took turns with the row's contenders.
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


def roof_seconds(bytes_moved: float, ops: float, read_rate: float, ops_rate: float) -> float:
    """Least time for ``bytes_moved`` bytes and ``ops`` operations at these rates per second."""
    return max(bytes_moved / read_rate, ops / ops_rate)


def rates(
    bytes_moved: float, ops: float, unit: str, seconds: float, read_rate: float, peaks: Peaks
) -> Rates:
    """What ``seconds`` mean; ``bound`` says which of the two roofs is the lower one."""
    roof = roof_seconds(bytes_moved, ops, read_rate, peaks.ops_rate(unit))
    return Rates(
        gb_s=bytes_moved / seconds / 1e9,
        gflop_s=ops / seconds / 1e9,
        roof_share=roof / seconds,
        bound="memory" if roof == bytes_moved / read_rate else unit,
    )
