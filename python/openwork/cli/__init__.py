"""The ``openwork`` command; also ``python -m openwork``."""

from __future__ import annotations

from typing import Annotated

import rich
import typer

from openwork.cli import bench, compress, context, demo, evaluate, generate, info
from openwork.cli.errors import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    help="Compress language models, and run and measure them on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the program an error came from.")
    ] = False,
) -> None:
    # Progress bars go to the global console. Standard output is for results alone.
    rich.reconfigure(stderr=True)


app.command()(demo.demo)
app.command()(compress.compress)
app.command(name="eval")(evaluate.evaluate)
app.command(name="eval-context")(context.evaluate_context)
app.command()(generate.generate)
app.command()(info.info)
# Its arguments are those of another program, --help included.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(bench.bench)
