"""``openwork eval-context``: what attending to less costs on long prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from openwork.cli.context_methods import Contender, Family, contenders, profile
from openwork.cli.context_report import Row, draw, from_json, row, to_json
from openwork.cli.files import check_writable, read_text, write_file
from openwork.cli.options import Dtype, ModelPath, RunDtype, Threads, load_model, set_threads
from openwork.evaluation.long_context import Outcome, Sample, samples, with_caches, with_policies
from openwork.evaluation.passkey import passkeys
from openwork.models import Llama, Tokenizer
from openwork.models.demo import fetch_text

# Tokens scored after each prompt of text.
FOLLOWING = 64
_ANSWER = 5
_COLUMNS = (
    TextColumn("{task.description:<44}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


def evaluate_context(
    model: ModelPath,
    family: Annotated[
        Family,
        typer.Option(help="Sparse prefill, tokens a cache keeps or reads, or how it stores them."),
    ] = Family.attention,
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", min=256, help="Tokens of prompt and text; more than once for "
                     "several.", show_default="2048 and 4096"),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Pieces of text to score on.")] = 3,
    keys: Annotated[
        int, typer.Option("--passkeys", min=0, help="Passkeys to ask for, at equal depths.")
    ] = 3,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to score on, UTF-8; its second half is calibrated on.",
                     show_default="Wikipedia articles"),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="Only methods whose name holds this, such as KIVI; more than once for "
                     "several.", show_default="all"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also draw a plot, a PNG.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", dir_okay=False, help="Also write JSON to this file; its rows of "
                     "other methods and lengths stay, and are drawn too."),
    ] = None,
    dtype: RunDtype = Dtype.float32,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:  # fmt: skip
    """Measure what sparse attention or a compressed cache costs on long prompts."""
    for target in (plot, output):
        if target is not None:
            check_writable(target)
    set_threads(threads)
    llama, tokenizer = load_model(model, dtype)
    sizes = lengths or [2048, 4096]
    context = llama.config.context_length
    if max(sizes) > context:
        raise typer.BadParameter(f"--length must be at most {context} for {model}, got {sizes}")
    prose, calibration = _texts(tokenizer, text)
    rows: list[Row] = []
    for length in sizes:
        known = profile(llama, family, calibration, length)
        chosen = [c for c in contenders(family, known, length) if _selected(c, select)]
        asked = [*_passkeys(tokenizer, prose, length, keys)]
        tokens = torch.tensor(tokenizer.encode(prose[: 12 * texts * length]))
        pieces = samples(tokens, texts, length - FOLLOWING, FOLLOWING)
        rows += _measure(llama, family, length, chosen, pieces, asked)
        if not as_json:
            _print(rows, family, length)
    if output is not None and output.exists():
        new = {(r.method, r.setting, r.length) for r in rows}
        before = from_json(output.read_bytes())
        rows = [r for r in before if (r.method, r.setting, r.length) not in new] + rows
    if as_json:
        print(to_json(rows).decode(), end="")
    if output is not None:
        write_file(output, to_json(rows))
    if plot is not None:
        write_file(plot, draw(rows, family.value))


def _selected(contender: Contender, select: Sequence[str] | None) -> bool:
    return not select or any(part in contender.method for part in select)


def _texts(tokenizer: Tokenizer, path: Path | None) -> tuple[str, Tensor]:
    """Prose to score on, and tokens to calibrate on."""
    if path is None:
        text = fetch_text()
        return text.evaluation, torch.tensor(tokenizer.encode(text.calibration[:100_000]))
    whole = read_text(path)
    half = len(whole) // 2
    return whole[:half], torch.tensor(tokenizer.encode(whole[half:]))


def _passkeys(tokenizer: Tokenizer, prose: str, length: int, count: int) -> Iterator[Sample]:
    depths = [(i + 0.5) / count for i in range(count)]
    prose = prose[: 12 * count * length]
    for passkey in passkeys(tokenizer, prose, length - _ANSWER, depths):
        yield Sample.of(passkey)


def _measure(
    model: Llama,
    family: Family,
    length: int,
    chosen: Sequence[Contender],
    pieces: Sequence[Sample],
    asked: Sequence[Sample],
) -> list[Row]:
    """A row for each contender and one for the dense model, which is the first."""
    named = {f"{c.method}, {c.setting}": c for c in chosen}
    outcomes: dict[str, tuple[list[Outcome], list[Outcome]]] = defaultdict(lambda: ([], []))
    with Progress(*_COLUMNS) as bar:
        total = (len(pieces) + len(asked)) * (len(named) + 1)
        task = bar.add_task(f"{length} tokens", total=total)
        for i, sample in enumerate((*pieces, *asked)):
            for name, outcome in _outcomes(model, family, sample, named):
                outcomes[name][i >= len(pieces)].append(outcome)
                bar.update(task, advance=1, description=f"{length} tokens: {name}")
    dense, _ = outcomes["dense"]
    settings = {"dense": ("dense", "")} | {n: (c.method, c.setting) for n, c in named.items()}
    return [
        row(*settings[name], length, dense, scored, found)
        for name, (scored, found) in outcomes.items()
    ]


def _outcomes(
    model: Llama, family: Family, sample: Sample, named: dict[str, Contender]
) -> Iterator[tuple[str, Outcome]]:
    made = {name: contender.make for name, contender in named.items()}
    if family is Family.attention:
        policies = {name: make() for name, make in made.items()}
        return with_policies(model, sample, policies)  # type: ignore[arg-type]
    return with_caches(model, sample, made)  # type: ignore[arg-type]


def _print(rows: Sequence[Row], family: Family, length: int) -> None:
    cost = "density" if family is Family.attention else "bytes/token"
    table = Table(title=f"{length} tokens", box=box.SIMPLE_HEAD, pad_edge=False)
    measures = ("perplexity", "KL", "same", "passkeys", "ms")
    for name in ("method", "setting", cost, *measures):
        left = name in ("method", "setting")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for r in rows:
        if r.length == length:
            shown = f"{r.cost:.3f}" if family is Family.attention else f"{r.cost:.0f}"
            table.add_row(
                r.method, r.setting, shown, f"{r.ppl:.4g}",
                f"{r.kl:.4f}", f"{r.agreement:.0%}", f"{r.found}/{r.asked}",
                f"{1e3 * r.seconds:.1f}",
            )  # fmt: skip
    console = Console()
    # Figures that are cut say nothing; a terminal may fold the lines of a wider table.
    console.width = max(console.width, 110)
    console.print(table)
