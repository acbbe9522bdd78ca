"""What is reported of a model's linears as tables, whatever compressed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    cells = {}
    for linear in linears:
        error = linear.weight_error if linear.output_error is None else linear.output_error
        cells[linear.name] = f"{error:.2e}"
    what = "of the output's energy" if measured else "of the weights' energy"
    return layer_table(f"error as a share {what}", cells, " (weights)" if measured else "")


def layer_table(title: str, cells: Mapping[str, str], head_note: str = "") -> Table:
    """A row for each layer, a column for each of its linears; and a row for the head, if it is one.

    Args:
        title: of the table.
        cells: by the names of linears, such as ``"layers.3.attn.qkv"`` or ``"head"``.
        head_note: after the name of the head.
    """
    rows: dict[str, dict[str, str]] = {}
    for name, cell in cells.items():
        owner, _, kind = name.rpartition(".")
        rows.setdefault(owner.split(".")[1] if owner else name, {})[kind] = cell
    kinds = [name.rpartition(".")[2] for name in cells if name.startswith("l")]
    columns = list(dict.fromkeys(kinds))
    table = Table("layer", *columns, title=title)
    for layer, row in rows.items():
        if layer in row:  # the head, which is a layer and a linear
            table.add_row(f"{layer}{head_note}", row[layer])
        else:
            table.add_row(layer, *(row[kind] for kind in columns))
    return table


def megabytes(count: int) -> str:
    """``12.3 MB``."""
    return f"{count / 1e6:.1f} MB"
