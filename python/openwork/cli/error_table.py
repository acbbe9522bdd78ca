"""Errors of a model's linears as a table, whatever compressed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.table import Table


class LinearError(Protocol):
    """What a report says of a linear."""

    @property
    def name(self) -> str: ...

    @property
    def weight_error(self) -> float: ...

    @property
    def output_error(self) -> float | None: ...


def error_table(linears: Sequence[LinearError]) -> Table:
    """A row for each layer, a column for each of its linears."""
    measured = linears[0].output_error is not None
    what = "of the output's energy" if measured else "of the weights' energy"
    rows: dict[str, dict[str, float]] = {}
    for linear in linears:
        owner, _, kind = linear.name.rpartition(".")
        layer = owner.split(".")[1] if owner else linear.name
        error = linear.weight_error if linear.output_error is None else linear.output_error
        rows.setdefault(layer, {})[kind] = error
    kinds = [linear.name.rpartition(".")[2] for linear in linears if linear.name.startswith("l")]
    columns = list(dict.fromkeys(kinds))
    table = Table("layer", *columns, title=f"error as a share {what}")
    for layer, errors in rows.items():
        if layer in errors:  # the head, which is a layer and a linear
            note = " (weights)" if measured else ""
            table.add_row(f"{layer}{note}", f"{errors[layer]:.2e}")
        else:
            table.add_row(layer, *(f"{errors[kind]:.2e}" for kind in columns))
    return table


def megabytes(count: int) -> str:
    """``12.3 MB``."""
    return f"{count / 1e6:.1f} MB"
