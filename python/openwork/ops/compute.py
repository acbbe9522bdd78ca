"""How a linear over codes computes: the modes of lowbit_linear and nm_linear."""

from __future__ import annotations

from typing import Literal

from .checks import check

Compute = Literal["float", "int8"]

_IDS = {"float": 0, "int8": 1}


def compute_id(op: str, compute: Compute) -> int:
    """The number the operators take for a mode.

    Raises:
        ValueError: an unknown ``compute``.
    """
    if compute not in _IDS:
        raise ValueError(f"{op}: compute must be 'float' or 'int8', got {compute!r}")
    return _IDS[compute]


def check_compute_id(op: str, compute: int) -> None:
    check(compute in _IDS.values(), f"{op}: compute must be 0 (float) or 1 (int8), got {compute}")
