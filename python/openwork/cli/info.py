"""``openwork info``: the version, the CPU's tier, and the kernels in use."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import openwork
from openwork.models.demo import cache_dir


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the instruction set, kernels and layouts this installation runs on."""
    about = {
        "version": openwork.__version__,
        **openwork.info().as_dict(),
        "cache": str(cache_dir()),
    }
    if as_json:
        print(json.dumps(about, indent=2))
        return
    table = Table("", "", show_header=False, title=f"openwork {about.pop('version')}")
    for name, value in about.items():
        text = "\n".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)
