"""``openwork compress --prune``: what its options mean, and its reports."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openwork.cli.linear_tables import error_table, layer_table, megabytes
from openwork.cli.options import Dtype, in_dtype
from openwork.models import Llama
from openwork.prune import (
    NM,
    STRUCTURED,
    PruningReport,
    ShapeReport,
    evopress,
    global_magnitude,
    leave_out_zeros,
    prune_model,
)
from openwork.prune.storage import codes_without_zeros
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


class Allocation(str, Enum):
    """How the weights to remove are dealt to the linears."""

    uniform = "uniform"
    one_threshold = "global"
    evopress = "evopress"


# Share that every linear keeps under one threshold.
_FLOOR = 0.1


def check_pruning(
    method: PruneMethod | None,
    pattern: str | None,
    sparsity: float | None,
    allocation: Allocation | None,
    grid: Grid | None,
    storage: Storage | None,
) -> None:
    """Refuse options that make no sense together; ``grid`` is None without ``--bits``.

    Raises:
        typer.BadParameter: what is wrong.
    """
    if method is None:
        if any(option is not None for option in (pattern, sparsity, allocation, storage)):
            raise typer.BadParameter(
                "--pattern, --sparsity, --allocation and --storage need --prune"
            )
        return
    if (pattern is None) == (sparsity is None):
        raise typer.BadParameter("--prune needs --pattern or --sparsity, one of them")
    if method.value in STRUCTURED and pattern is not None:
        raise typer.BadParameter(f"--prune {method.value} needs --sparsity, not --pattern")
    if allocation is not None and (pattern is not None or method.value in STRUCTURED):
        what = "--pattern" if pattern is not None else f"--prune {method.value}"
        raise typer.BadParameter(f"--allocation is for --sparsity of single weights, not {what}")
    if method.value in STRUCTURED and storage is not None:
        raise typer.BadParameter(f"--prune {method.value} leaves no zeros; leave out --storage")
    if grid is not None and method is not PruneMethod.sparsegpt:
        raise typer.BadParameter(f"--prune {method.value} does not quantize; leave out --bits")
    try:
        parsed = None if pattern is None else NM.parse(pattern)
    except ValueError as error:
        raise typer.BadParameter(f"--pattern: {error}") from error
    if storage is Storage.sparse and grid is not None and not _may_leave_out(parsed, grid):
        raise typer.BadParameter(f"--storage sparse: {_CODES_WITH_ZEROS}")


# Of a grid and a pattern of which _may_leave_out is false.
_CODES_WITH_ZEROS = (
    "of --bits, only 4 and 8 with --symmetric, groups of 32 or more and a pattern N:M or V:N:M, "
    "M = 4, 8, 16 or 32 and V = 8, 16 or 32, have a form without zeros"
)


def _may_leave_out(pattern: NM | None, grid: Grid) -> bool:
    return pattern is not None and codes_without_zeros(
        pattern, grid.bits, grid.group_size, grid.symmetric
    )


def prune(
    model: Llama,
    method: PruneMethod,
    pattern: str | None,
    sparsity: float | None,
    allocation: Allocation | None,
    tokens: Tensor | None,
    grid: Grid | None,
    resume: Path | None,
) -> PruningReport:
    """Prune ``model`` in place as the options say."""
    shares: float | dict[str, float] | None = sparsity
    if sparsity is not None and allocation is Allocation.one_threshold:
        weights = {
            name: getattr(parent, attribute).weight for name, parent, attribute in model.linears()
        }
        shares = global_magnitude(weights, sparsity, floor=min(_FLOOR, 1 - sparsity))
    elif sparsity is not None and tokens is not None and allocation is Allocation.evopress:
        shares = evopress(model, method.value, sparsity, tokens).sparsity
    return prune_model(
        model,
        method.value,
        pattern=pattern,
        sparsity=shares,
        calibration=tokens,
        grid=grid,
        resume_dir=resume,
    )


def print_pruning(report: PruningReport, out: Path, dtype: Dtype) -> None:
    """The report as tables: errors of every linear, sizes, memory.

    Args:
        report: of a model in float32.
        out: the directory it was written to,
        dtype: in this type, which the size before is given in, too.
    """
    console = Console()
    console.print(error_table(report.linears))
    shares = {linear.name: f"{linear.sparsity:.1%}" for linear in report.linears}
    if len(set(shares.values())) > 1:
        console.print(layer_table("share of the weights removed", shares))
    table = Table("", "", show_header=False)
    before = in_dtype(report.model_bytes_before, dtype)
    written = sum(file.stat().st_size for file in out.iterdir())
    table.add_row("weights removed from the layers", f"{report.sparsity:.1%}")
    table.add_row(f"model before, in {dtype.value}", megabytes(before))
    table.add_row("model as written", f"{out}, {megabytes(written)} ({written / before:.1%})")
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


def print_storage(
    shapes: tuple[ShapeReport, ...], storage: Storage | None, grid: Grid | None, dtype: Dtype
) -> None:
    """A row for each shape: times with activations in ``dtype``, sizes, and what was stored."""
    if not shapes:
        if grid is not None and storage is not Storage.dense:
            Console().print(f"Zeros are stored: {_CODES_WITH_ZEROS}.")
        return
    table = Table(
        "shape", "linears", "1 token, dense", "sparse", "128 tokens, dense", "sparse",
        "bytes, dense", "sparse", "recommended", "stored",
        title=f"with zeros (dense) and without (sparse); microseconds of a linear in {dtype.value}",
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
