"""``openwork bench``: hands over to the benchmarks of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

import openwork
from openwork.cli.errors import FAILURE


def bench(ctx: typer.Context) -> None:
    """Run the benchmarks of a source checkout; arguments are those of `python -m bench`."""
    root = _checkout()
    if root is None:
        raise FileNotFoundError(
            "bench: the benchmarks are in the source tree and not in the installed package; run "
            "this in a checkout of openwork, with the `bench` extra installed"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "bench", *ctx.args],
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    if done.returncode != 0:
        # A signal is a negative code, which a shell could not see.
        raise typer.Exit(done.returncode if done.returncode > 0 else FAILURE)


def _checkout() -> Path | None:
    """The source tree around the current folder, or the one the package is imported from."""
    here = Path.cwd()
    package = Path(openwork.__file__).parent
    for folder in (here, *here.parents, *package.parents):
        if (folder / "bench" / "__main__.py").is_file() and (folder / "csrc" / "ops").is_dir():
            return folder
    return None
