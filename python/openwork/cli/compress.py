"""``openwork compress``: quantize a model and write it to a directory."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from openwork import checkpoint, quant
from openwork.cli.calibration import calibration_tokens
from openwork.cli.files import check_writable, read_text
from openwork.cli.options import Dtype, ModelPath, Threads, load_model, set_threads
from openwork.models.demo import fetch_text
from openwork.quant import LinearReport, QuantizationReport

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
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 16, 32, 64, 128, or 0 for a row.")
    ] = 128,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Sample text for GPTQ, UTF-8.", show_default="Wikipedia articles"),
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
    """Quantize a model and write a directory that eval, generate and other libraries read."""
    _check_grid(bits, group_size, head_bits)
    _check_out(out, overwrite)
    set_threads(threads)
    # In float32, whatever it is written in: the algorithms and their statistics work in it.
    llama, tokenizer = load_model(model, Dtype.float32)
    tokens = None
    if method is Method.gptq:
        text = fetch_text().calibration if calibration is None else read_text(calibration)
        where = "the demo's text" if calibration is None else str(calibration)
        tokens = calibration_tokens(tokenizer, text, samples, length, where)
    name: Literal["rtn", "gptq"] = "rtn" if method is Method.rtn else "gptq"
    report = quant.quantize_model(
        llama,
        name,
        bits=bits,
        group_size=group_size or None,
        symmetric=symmetric,
        calibration=tokens,
        head_bits=head_bits or None,
        resume_dir=resume if method is Method.gptq else None,
    )
    llama.to(dtype.torch)
    try:
        checkpoint.save(llama, out, source=model if model.is_dir() else None, overwrite=overwrite)
    except OSError as error:
        if error.filename is None and error.strerror:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise
    _print_report(report, quant.model_bytes(llama), out)


def _check_grid(bits: int, group_size: int, head_bits: int) -> None:
    for option, value, allowed in (
        ("--bits", bits, _BITS),
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
    console.print(_errors(report.linears))
    table = Table("", "", show_header=False)
    before = report.model_bytes_before
    written = sum(file.stat().st_size for file in out.iterdir())
    table.add_row("weights before", _megabytes(before))
    table.add_row("weights after", f"{_megabytes(bytes_after)} ({bytes_after / before:.1%})")
    table.add_row("most memory used", _megabytes(report.peak_bytes))
    table.add_row("  of it hidden states", _megabytes(report.hidden_bytes))
    table.add_row("  of it one layer's statistics", _megabytes(report.statistics_bytes))
    table.add_row("written", f"{out}, {_megabytes(written)}")
    console.print(table)


def _errors(linears: tuple[LinearReport, ...]) -> Table:
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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
