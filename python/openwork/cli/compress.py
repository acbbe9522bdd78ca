"""``openwork compress``: quantize or prune a model and write it to a directory."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openwork import checkpoint, quant
from openwork.cli.calibration import calibration_tokens
from openwork.cli.compress_options import (
    AllocationOption,
    Bits,
    Calibration,
    DenseDtype,
    GroupSize,
    HeadBits,
    Length,
    Method,
    MethodOption,
    Out,
    Overwrite,
    PatternOption,
    PruneWith,
    Resume,
    Samples,
    Sparsity,
    StorageOption,
    Symmetric,
)
from openwork.cli.files import check_writable, read_text
from openwork.cli.linear_tables import error_table, megabytes
from openwork.cli.options import (
    Dtype,
    ModelPath,
    Threads,
    in_dtype,
    load_model,
    set_threads,
)
from openwork.cli.pruning import (
    Allocation,
    PruneMethod,
    check_pruning,
    leave_out,
    print_pruning,
    print_storage,
    prune,
)
from openwork.models import Llama, Tokenizer
from openwork.models.demo import fetch_text
from openwork.quant import Grid, QuantizationReport

_BITS = (2, 3, 4, 8)


def compress(
    model: ModelPath,
    out: Out,
    method: MethodOption = Method.gptq,
    bits: Bits = None,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    prune_with: PruneWith = None,
    pattern: PatternOption = None,
    sparsity: Sparsity = None,
    allocation: AllocationOption = None,
    storage: StorageOption = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    length: Length = 512,
    head_bits: HeadBits = 8,
    dtype: DenseDtype = Dtype.bfloat16,
    resume: Resume = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
) -> None:
    """Quantize or prune a model and write a directory that eval and generate read."""
    _check_grid(bits, group_size, head_bits)
    grid = Grid(4 if bits is None else bits, group_size or None, symmetric)
    joint = None if bits is None else grid
    check_pruning(prune_with, pattern, sparsity, allocation, joint, storage)
    _check_out(out, overwrite)
    set_threads(threads)
    # In float32, whatever it is written in: the algorithms and their statistics work in it.
    llama, tokenizer = load_model(model, Dtype.float32)
    tokens = None
    blind = method is Method.rtn if prune_with is None else prune_with is PruneMethod.magnitude
    if blind and allocation is not Allocation.evopress:
        resume = None
    else:
        tokens = _sample_tokens(tokenizer, calibration, samples, length)
    if prune_with is not None:
        pruning = prune(llama, prune_with, pattern, sparsity, allocation, tokens, joint, resume)
        shapes = leave_out(llama.to(dtype.torch), prune_with, pattern, storage)
        _save(llama, model, out, dtype, overwrite)
        print_pruning(pruning, out, dtype)
        print_storage(shapes, storage, joint, dtype)
        return
    report = quant.quantize_model(
        llama,
        "rtn" if method is Method.rtn else "gptq",
        **grid.arguments(),
        calibration=tokens,
        head_bits=head_bits or None,
        resume_dir=resume,
    )
    _save(llama, model, out, dtype, overwrite)
    _print_report(report, quant.model_bytes(llama), out, dtype)


def _sample_tokens(
    tokenizer: Tokenizer, calibration: Path | None, samples: int, length: int
) -> Tensor:
    text = fetch_text().calibration if calibration is None else read_text(calibration)
    where = "the demo's text" if calibration is None else str(calibration)
    return calibration_tokens(tokenizer, text, samples, length, where)


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


def _print_report(report: QuantizationReport, bytes_after: int, out: Path, dtype: Dtype) -> None:
    """Of a model in float32 that was written in ``dtype``, which the size before is given in."""
    console = Console()
    console.print(error_table(report.linears))
    table = Table("", "", show_header=False)
    before = in_dtype(report.model_bytes_before, dtype)
    written = sum(file.stat().st_size for file in out.iterdir())
    table.add_row(f"weights before, in {dtype.value}", megabytes(before))
    table.add_row("weights after", f"{megabytes(bytes_after)} ({bytes_after / before:.1%})")
    table.add_row("most memory used", megabytes(report.peak_bytes))
    table.add_row("  of it hidden states", megabytes(report.hidden_bytes))
    table.add_row("  of it one layer's statistics", megabytes(report.statistics_bytes))
    table.add_row("written", f"{out}, {megabytes(written)}")
    console.print(table)
