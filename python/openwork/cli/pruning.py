"""``openwork compress --prune``: what its options mean, and its reports."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openwork.cli.error_table import error_table, megabytes
from openwork.models import Llama
from openwork.prune import (
    NM,
    STRUCTURED,
    PruningReport,
    ShapeReport,
    leave_out_zeros,
    prune_model,
)
from openwork.quant import Grid


class PruneMethod(str, Enum):
    """The algorithms of :func:`openwork.prune.prune_model`."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    flap = "flap"
    llm_pruner = "llm_pruner"


class Storage(str, Enum):
    """Whether zeros are stored."""

    auto = "auto"
    sparse = "sparse"
    dense = "dense"


def check_pruning(
    method: PruneMethod | None,
    pattern: str | None,
    sparsity: float | None,
    bits: int | None,
    storage: Storage | None,
) -> None:
    """Refuse options that make no sense together.

    Raises:
        typer.BadParameter: what is wrong.
    """
    if method is None:
        if pattern is not None or sparsity is not None or storage is not None:
            raise typer.BadParameter("--pattern, --sparsity and --storage need --prune")
        return
    if (pattern is None) == (sparsity is None):
        raise typer.BadParameter("--prune needs --pattern or --sparsity, one of them")
    if method.value in STRUCTURED and pattern is not None:
        raise typer.BadParameter(f"--prune {method.value} needs --sparsity, not --pattern")
    if method.value in STRUCTURED and storage is not None:
        raise typer.BadParameter(f"--prune {method.value} leaves no zeros; leave out --storage")
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


def leave_out(
    model: Llama, method: PruneMethod, pattern: str | None, storage: Storage | None
) -> tuple[ShapeReport, ...]:
    """Take the zeros out of a pruned ``model`` where the options, or times, say so."""
    if storage is Storage.dense or method.value in STRUCTURED:
        return ()
    return leave_out_zeros(model, pattern, when="always" if storage is Storage.sparse else "faster")


def print_storage(shapes: tuple[ShapeReport, ...], dtype: str) -> None:
    """A row for each shape: times with activations in ``dtype``, sizes, and what was stored."""
    if not shapes:
        return
    table = Table(
        "shape", "linears", "1 token, dense", "sparse", "128 tokens, dense", "sparse",
        "bytes, dense", "sparse", "recommended", "stored",
        title=f"with zeros (dense) and without (sparse); microseconds of a linear in {dtype}",
    )  # fmt: skip
    for one in shapes:
        times = zip(one.seconds_dense, one.seconds_sparse, strict=True)
        table.add_row(
            f"{one.shape[0]} x {one.shape[1]}",
            str(len(one.names)),
            *(f"{1e6 * seconds:.1f}" for pair in times for seconds in pair),
            megabytes(one.bytes_dense),
            f"{megabytes(one.bytes_sparse)} ({one.bytes_sparse / one.bytes_dense:.0%})",
            one.recommendation,
            "sparse" if one.stored_sparse else "dense",
        )
    console = Console()
    console.print(table)
    zeros = sum(one.bytes_dense for one in shapes)
    held = sum(one.bytes_sparse if one.stored_sparse else one.bytes_dense for one in shapes)
    console.print(f"these linears: {megabytes(zeros)} with zeros, {megabytes(held)} as stored")
    slower = [one for one in shapes if one.recommendation.startswith("dense")]
    if slower:
        console.print(
            f"{len(slower)} of {len(shapes)} shapes are faster dense on this machine; --storage "
            "dense keeps the zeros of all, --storage sparse of none."
        )
