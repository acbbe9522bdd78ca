"""``python -m bench run | table | plot | compare | peaks``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import end_to_end, machine, report, suite
from bench.problem import CheckError
from bench.report import Row, duration
from openwork.timing import MIN_ROUNDS, MIN_SECONDS

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(stderr=True, soft_wrap=True)
CORES = os.cpu_count() or 1

Threads = Annotated[int, typer.Option(min=1, help="Threads of every contender.")]
Files = Annotated[list[Path], typer.Argument(help="Result files of `run --json`.")]


def _tier() -> str:
    from openwork import isa

    return str(isa())


def _measure(threads: int, tier: str) -> tuple[machine.Peaks, str | None]:
    """Peaks of ``threads`` threads, and a warning if they did not have a core each."""
    single = machine.measure_peaks(1, tier)
    if threads == 1:
        return single, None
    peaks = machine.measure_peaks(threads, tier)
    return peaks, machine.scaling_warning(single, peaks)


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
    list_only: Annotated[bool, typer.Option("--list", help="Print what would run.")] = False,
) -> None:
    """Check and time workloads against their competitors, in turns, in one process."""
    selected = list(suite.items(select, threads))
    whole_model = model if not select or select == end_to_end.OP else None
    if list_only:
        for item in selected:
            print(item.name)
        return
    if not selected and whole_model is None:
        console.print(
            f"[red]bench: --select {select!r} matches no workload; see --list "
            f"({end_to_end.OP} needs --model)"
        )
        raise typer.Exit(2)
    if json is not None and not _writable(json):
        console.print(f"[red]bench: --json {json} cannot be written")
        raise typer.Exit(2)

    tier = _tier()
    about = machine.describe(tier)
    peaks, warning = _measure(threads, tier)
    about.warnings += [warning] if warning else []
    for text in about.warnings:
        console.print(f"[yellow]{text}")
    settings = suite.Settings(
        threads=threads,
        cold_bytes=suite.cold_bytes(about.last_level_cache, about.memory_bytes),
        rounds=rounds,
        seconds=seconds,
        against=frozenset(against) if against else None,
    )
    rows: list[Row] = []

    def save() -> None:
        about.peaks = peaks.summary()
        if json is not None:
            report.write(json, about.to_json(), suite.add_rates(rows, tier, peaks))

    def done(row: Row) -> None:
        rows.append(row)
        _print_row(suite.add_rates([row], tier, peaks)[0])
        # After every row: a run of an hour that is interrupted keeps what it measured.
        save()

    stream = machine.ReadStream(threads, tier)
    failures = suite.run(selected, settings, peaks, stream, console, done)
    if whole_model is not None:
        console.print(f"[dim]end to end[/] {whole_model.name}")
        try:
            for row in end_to_end.run(
                whole_model,
                threads=threads,
                rounds=rounds,
                seconds=seconds,
                stream=stream,
                console=console,
            ):
                console.print(report.row_id(row["op"], row["params"]))
                done(row)
        except (CheckError, ValueError, RuntimeError, OSError) as error:
            failures.append(f"{end_to_end.OP}: {error}")
    # Roofs of both ends of the run: a machine that was slow at the start must not flatter us.
    peaks.extend(machine.measure_peaks(threads, tier))
    save()
    print(report.markdown(suite.add_rates(rows, tier, peaks)))
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
    tier = _tier()
    found, warning = _measure(threads, tier)
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
