"""``python -m bench run | table | plot | compare | peaks``."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import openwork
from bench import end_to_end, gpu, report, suite
from bench.problem import CheckError
from bench.report import Row, duration
from bench.stage import Stage, measure_host, on_gpu, on_host
from openwork.timing import MIN_ROUNDS, MIN_SECONDS

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(stderr=True, soft_wrap=True)
CORES = os.cpu_count() or 1


class Device(str, Enum):
    """Where operators run."""

    cpu = "cpu"
    cuda = "cuda"


Threads = Annotated[int, typer.Option(min=1, help="Threads of every contender.")]
Files = Annotated[list[Path], typer.Argument(help="Result files of `run --json`.")]


def _writable(path: Path) -> bool:
    """Whether a result file can be made: asked before measuring, not after an hour."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return not path.is_dir() and os.access(path.parent, os.W_OK)


def _print_row(row: Row) -> None:
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["speedup"].items())
    share = f"{row['roof_share']:.0%} of the {row['bound']} roof"
    console.print(
        f"    {duration(row['median_s'])} +- {duration(row['iqr_s'])}, {row['gb_s']:.1f} GB/s, "
        f"{row['gflop_s']:.0f} GFLOP/s, {share}; {ratios}",
        highlight=False,
    )


def _refuse(*reasons: tuple[bool, str]) -> None:
    """End with the first message whose condition holds."""
    for wrong, message in reasons:
        if wrong:
            console.print(f"[red]bench: {message}", highlight=False)
            raise typer.Exit(2)


def _with_kernels(items: list[suite.Item]) -> list[suite.Item]:
    """Those whose operator is implemented for GPUs; the others are named."""
    lacking = [op for op in dict.fromkeys(i.case.name for i in items) if not gpu.has_kernel(op)]
    for op in lacking:
        console.print(f"[yellow]skipped {op}: it has no kernel for GPUs")
    return [item for item in items if item.case.name not in lacking]


def _save(json: Path | None, stage: Stage, rows: list[Row]) -> None:
    stage.about.peaks = stage.peaks.summary()
    if json is not None:
        about = stage.about.to_json()
        report.write(json, about, suite.add_rates(rows, stage.tier, stage.peaks))


def _run_model(
    model: Path, settings: suite.Settings, stage: Stage, done: Callable[[Row], None]
) -> list[str]:
    """Time a model end to end; the error, if there is one."""
    console.print(f"[dim]end to end[/] {model.name}")
    try:
        for row in end_to_end.run(
            model,
            threads=settings.threads,
            rounds=settings.rounds,
            seconds=settings.seconds,
            stream=stage.stream,
            console=console,
        ):
            console.print(report.row_id(row["op"], row["params"]))
            done(row)
    except (CheckError, ValueError, RuntimeError, OSError) as error:
        return [f"{end_to_end.OP}: {error}"]
    return []


@app.command()
def run(
    select: Annotated[
        str,
        typer.Option(
            help="Words that must match the operator or a key=value of the workload, with shell "
            'wildcards: "lowbit_linear m=1 bits=[34]".'
        ),
    ] = "",
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    threads: Threads = CORES,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each.")] = MIN_ROUNDS,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Least time measured of each.")
    ] = MIN_SECONDS,
    against: Annotated[
        list[str] | None, typer.Option(help="Only this competitor; may be repeated.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='GGUF file: also time it end to end (alone with --select "end_to_end").',
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="What runs the operators.")] = Device.cpu,
    list_only: Annotated[bool, typer.Option("--list", help="Print what would run.")] = False,
) -> None:
    """Check and time workloads against their competitors, in turns, in one process."""
    on_cpu = device is Device.cpu
    selected = list(suite.items(select, threads) if on_cpu else suite.gpu_items(select))
    whole_model = model if not select or select == end_to_end.OP else None
    if list_only:
        for item in selected:
            print(item.name)
        return
    no_gpu = None if on_cpu else gpu.missing()
    _refuse(
        (no_gpu is not None, f"--device cuda needs a GPU and the CUDA operators: {no_gpu}"),
        (not on_cpu and model is not None, "--model runs on the CPU only"),
        (
            not selected and whole_model is None,
            f"--select {select!r} matches no workload; see --list ({end_to_end.OP} needs --model)",
        ),
        (json is not None and not _writable(json), f"--json {json} cannot be written"),
    )
    stage = on_host(threads) if on_cpu else on_gpu()
    selected = selected if on_cpu else _with_kernels(selected)
    for text in stage.about.warnings:
        console.print(f"[yellow]{text}")
    settings = suite.Settings(
        threads=threads,
        cold_bytes=stage.cold_bytes,
        rounds=rounds,
        seconds=seconds,
        against=frozenset(against) if against else None,
        device=stage.device,
    )
    rows: list[Row] = []

    def done(row: Row) -> None:
        rows.append(row)
        _print_row(suite.add_rates([row], stage.tier, stage.peaks)[0])
        # After every row: a run of an hour that is interrupted keeps what it measured.
        _save(json, stage, rows)

    failures = suite.run(selected, settings, stage.peaks, stage.stream, console, done)
    if whole_model is not None:
        failures += _run_model(whole_model, settings, stage, done)
    # Roofs of both ends of the run: a machine that was slow at the start must not flatter us.
    stage.peaks.extend(stage.measure())
    _save(json, stage, rows)
    print(report.markdown(suite.add_rates(rows, stage.tier, stage.peaks)))
    for failure in failures:
        console.print(f"[red]{failure}")
    if failures:
        raise typer.Exit(1)


@app.command()
def table(
    files: Files,
    select: Annotated[str, typer.Option(help="Only these rows; see run.")] = "",
) -> None:
    """Print result files as markdown."""
    for path in files:
        about, rows = _read(path)
        chosen = [
            row for row in rows if report.matches(select, report.row_id(row["op"], row["params"]))
        ]
        print(report.markdown(chosen))
        print()
        print(report.machine_line(about))


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="Result file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG to write.")] = Path(
        "bench.png"
    ),
    against: Annotated[
        str | None,
        typer.Option(help="Draw the time of sparse over this competitor's against the density."),
    ] = None,
) -> None:
    """Draw the roofline and the share of the roof against m, or where sparse beats dense."""
    from bench.plot import draw, draw_crossover

    about, rows = _read(file)
    try:
        if against is None:
            draw(about, rows, output)
        else:
            draw_crossover(rows, against, output)
    except ValueError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    console.print(f"wrote {output}")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Result file of the old state.")],
    after: Annotated[Path, typer.Argument(help="Result file of the new state.")],
) -> None:
    """Print the ratio of the times of every row two files share; above 1 is faster now."""
    pairs = report.compare(_read(before)[1], _read(after)[1])
    if not pairs:
        console.print("[red]bench: the files share no row")
        raise typer.Exit(1)
    out = Table("row", "before", "after", "before / after", "beyond noise")
    for name, old, new, ratio, beyond in pairs:
        out.add_row(
            name,
            duration(old["median_s"]),
            duration(new["median_s"]),
            f"{ratio:.3f}",
            "yes" if beyond else "",
        )
    Console().print(out)


@app.command()
def peaks(threads: Threads = CORES) -> None:
    """Measure the roofs of this machine."""
    tier = openwork.isa()
    found, warning = measure_host(threads, tier)
    out = Table(f"{threads} threads, {tier}", "best", "median")
    for name, value in found.summary().items():
        if isinstance(value, dict):
            out.add_row(name, f"{value['best']:.1f}", f"{value['median']:.1f}")
    Console().print(out)
    if warning:
        console.print(f"[yellow]{warning}")


def _read(path: Path) -> tuple[dict[str, object], list[Row]]:
    try:
        return report.read(path)
    except report.ResultError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
