"""``openwork compress``: quantize or prune a model and write it to a directory."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from openwork import checkpoint, quant
from openwork.cli.calibration import calibration_tokens
from openwork.cli.error_table import error_table, megabytes
from openwork.cli.files import check_writable, read_text
from openwork.cli.options import Dtype, ModelPath, Threads, load_model, set_threads
from openwork.cli.pruning import (
    PruneMethod,
    Storage,
    check_pruning,
    leave_out,
    print_pruning,
    print_storage,
    prune,
)
from openwork.models import Llama
from openwork.models.demo import fetch_text
from openwork.quant import Grid, QuantizationReport

_BITS = (2, 3, 4, 8)


class Method(str, Enum):
    """The algorithms of :func:`openwork.quant.quantize_model`."""

    gptq = "gptq"
    rtn = "rtn"


def compress(
    model: ModelPath,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)
    ],
    method: Annotated[
        Method, typer.Option(help="GPTQ looks at sample text; RTN only rounds.")
    ] = Method.gptq,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a weight: 2, 3, 4 or 8.", show_default="4; not quantized with --prune"
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 16, 32, 64, 128, or 0 for a row.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
    ] = False,
    prune_with: Annotated[
        PruneMethod | None,
        typer.Option(
            "--prune",
            help="Remove weights in place of quantizing; sparsegpt does both at once with --bits. "
            "flap and llm_pruner remove whole heads and channels. The head stays as it is.",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Which weights stay: N:M, or V:N:M for V rows alike, such as 2:4."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of weights to remove, in place of --pattern."),
    ] = None,
    storage: Annotated[
        Storage | None,
        typer.Option(
            help="Of pruned weights: without zeros (sparse), with them, or what is faster here.",
            show_default="auto",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Sample text, UTF-8.", show_default="Wikipedia articles"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of the sample text to use.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a piece.")] = 512,
    head_bits: Annotated[
        int,
        typer.Option(
            help="Bits of the output head, rounded; 0 leaves it dense. With 8, an embedding tied "
            "to it is quantized too."
        ),
    ] = 8,
    dtype: Annotated[
        Dtype, typer.Option(help="Type in which weights that stay dense are written.")
    ] = Dtype.bfloat16,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder for intermediate results, to continue from if interrupted."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is there.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Quantize or prune a model and write a directory that eval and generate read."""
    _check_grid(bits, group_size, head_bits)
    check_pruning(prune_with, pattern, sparsity, bits, storage)
    _check_out(out, overwrite)
    set_threads(threads)
    # In float32, whatever it is written in: the algorithms and their statistics work in it.
    llama, tokenizer = load_model(model, Dtype.float32)
    tokens = None
    blind = method is Method.rtn if prune_with is None else prune_with is PruneMethod.magnitude
    if not blind:
        text = fetch_text().calibration if calibration is None else read_text(calibration)
        where = "the demo's text" if calibration is None else str(calibration)
        tokens = calibration_tokens(tokenizer, text, samples, length, where)
    resume = None if blind else resume
    if prune_with is not None:
        grid = None if bits is None else Grid(bits, group_size or None, symmetric)
        pruning = prune(llama, prune_with, pattern, sparsity, tokens, grid, resume)
        shapes = leave_out(llama.to(dtype.torch), prune_with, pattern, storage)
        _save(llama, model, out, dtype, overwrite)
        print_pruning(pruning, out)
        print_storage(shapes, dtype.value)
        return
    report = quant.quantize_model(
        llama,
        "rtn" if method is Method.rtn else "gptq",
        bits=4 if bits is None else bits,
        group_size=group_size or None,
        symmetric=symmetric,
        calibration=tokens,
        head_bits=head_bits or None,
        resume_dir=resume,
    )
    _save(llama, model, out, dtype, overwrite)
    _print_report(report, quant.model_bytes(llama), out)


def _save(llama: Llama, source: Path, out: Path, dtype: Dtype, overwrite: bool) -> None:
    llama.to(dtype.torch)
    try:
        checkpoint.save(llama, out, source=source if source.is_dir() else None, overwrite=overwrite)
    except OSError as error:
        if error.filename is None and error.strerror:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise


def _check_grid(bits: int | None, group_size: int, head_bits: int) -> None:
    for option, value, allowed in (
        ("--bits", 4 if bits is None else bits, _BITS),
        ("--group-size", group_size, (0, 16, 32, 64, 128)),
        ("--head-bits", head_bits, (0, *_BITS)),
    ):
        if value not in allowed:
            listed = ", ".join(map(str, allowed[:-1])) + f" or {allowed[-1]}"
            raise typer.BadParameter(f"{option} must be {listed}, got {value}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Before the work, what :func:`openwork.checkpoint.save` would refuse after it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: a directory expected, got a file")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out}: a new or empty directory expected; or pass --overwrite")
    check_writable(out)


def _print_report(report: QuantizationReport, bytes_after: int, out: Path) -> None:
    console = Console()
    console.print(error_table(report.linears))
    table = Table("", "", show_header=False)
    before = report.model_bytes_before
    written = sum(file.stat().st_size for file in out.iterdir())
    table.add_row("weights before", megabytes(before))
    table.add_row("weights after", f"{megabytes(bytes_after)} ({bytes_after / before:.1%})")
    table.add_row("most memory used", megabytes(report.peak_bytes))
    table.add_row("  of it hidden states", megabytes(report.hidden_bytes))
    table.add_row("  of it one layer's statistics", megabytes(report.statistics_bytes))
    table.add_row("written", f"{out}, {megabytes(written)}")
    console.print(table)
