"""Errors of the command line: one line that names the thing, and an exit code that is not 0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from openwork.errors import DownloadError, FormatError

# Exit codes: what was asked for cannot be done, and what was asked for makes no sense.
FAILURE, USAGE = 1, 2


class CommandGroup(TyperGroup):
    """The group of all commands; what they raise becomes a line on standard error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # the help text, which is no error
        with _as_one_line(debug="--debug" in args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _as_one_line(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


@contextmanager
def _as_one_line(*, debug: bool) -> Iterator[None]:
    try:
        yield
    # A closed pipe is no error of ours, and the other two already say how to end.
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        console = Console(stderr=True)
        if debug:
            console.print_exception()
        text, code = describe(error)
        # Not wrapped to the terminal, and brackets in file names are not markup.
        console.print(f"openwork: {text}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(code) from error


def describe(error: Exception) -> tuple[str, int]:
    """What to tell the user about ``error`` in one line, and the exit code.

    Example:
        >>> describe(FileNotFoundError(2, "No such file or directory", "model.gguf"))
        ('model.gguf: No such file or directory', 1)
    """
    # typer's own errors, recognized by what they offer: their class depends on typer's version.
    usage = getattr(error, "format_message", None)
    code = FAILURE
    if usage is not None:
        text, code = usage(), USAGE
    elif isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if n is not None]
        text = ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
    elif isinstance(error, MemoryError):
        text = "not enough memory"
    elif isinstance(error, (OSError, ValueError, FormatError, DownloadError)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}; openwork --debug shows where"
    return " ".join(text.split()), code
