"""``python -m openwork``: the same as the ``openwork`` command."""

from __future__ import annotations

from openwork.cli import app

app(prog_name="openwork")
