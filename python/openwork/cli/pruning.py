"""``openwork compress --prune``: what its options mean, and its report."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openwork.cli.error_table import error_table, megabytes
from openwork.models import Llama
from openwork.prune import NM, STRUCTURED, PruningReport, prune_model
from openwork.quant import Grid


class PruneMethod(str, Enum):
    """The algorithms of :func:`openwork.prune.prune_model`."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    flap = "flap"
    llm_pruner = "llm_pruner"


def check_pruning(
    method: PruneMethod | None, pattern: str | None, sparsity: float | None, bits: int | None
) -> None:
    """Refuse options that make no sense together.

    Raises:
        typer.BadParameter: what is wrong.
    """
    if method is None:
        if pattern is not None or sparsity is not None:
            raise typer.BadParameter("--pattern and --sparsity need --prune")
        return
    if (pattern is None) == (sparsity is None):
        raise typer.BadParameter("--prune needs --pattern or --sparsity, one of them")
    if method.value in STRUCTURED and pattern is not None:
        raise typer.BadParameter(f"--prune {method.value} needs --sparsity, not --pattern")
    if bits is not None and method is not PruneMethod.sparsegpt:
        raise typer.BadParameter(f"--prune {method.value} does not quantize; leave out --bits")
    if pattern is not None:
        try:
            NM.parse(pattern)
        except ValueError as error:
            raise typer.BadParameter(f"--pattern: {error}") from error


def prune(
    model: Llama,
    method: PruneMethod,
    pattern: str | None,
    sparsity: float | None,
    tokens: Tensor | None,
    grid: Grid | None,
    resume: Path | None,
) -> PruningReport:
    """Prune ``model`` in place as the options say."""
    return prune_model(
        model,
        method.value,
        pattern=pattern,
        sparsity=sparsity,
        calibration=tokens,
        grid=grid,
        resume_dir=resume,
    )


def print_pruning(report: PruningReport, out: Path) -> None:
    """The report as tables: errors of every linear, sizes, memory."""
    console = Console()
    console.print(error_table(report.linears))
    table = Table("", "", show_header=False)
    dense = sum(linear.bytes_dense for linear in report.linears)
    sparse = sum(linear.bytes_sparse for linear in report.linears)
    written = sum(file.stat().st_size for file in out.iterdir())
    table.add_row("weights removed from the layers", f"{report.sparsity:.1%}")
    table.add_row("layers before", megabytes(dense))
    table.add_row("layers without zeros", f"{megabytes(sparse)} ({sparse / dense:.1%})")
    table.add_row("model before", megabytes(report.model_bytes_before))
    table.add_row("model as written", f"{out}, {megabytes(written)}")
    table.add_row("most memory used", megabytes(report.peak_bytes))
    table.add_row("  of it hidden states", megabytes(report.hidden_bytes))
    table.add_row("  of it one layer's statistics", megabytes(report.statistics_bytes))
    console.print(table)
