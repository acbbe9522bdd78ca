"""Generates the tests of a family from its kernel table: there is no second list of kernels."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("openwork._kernels") is None:
    # Wheels leave the module out; a build with OPENWORK_TESTING=ON has it.
    collect_ignore_glob = ["test_*.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes the argument ``entry`` over the table of the module's ``FAMILY``."""
    if "entry" not in metafunc.fixturenames:
        return
    from .tables import runs_here, table

    params = []
    for entry in table(metafunc.module.FAMILY):
        missing = pytest.mark.skipif(not runs_here(entry), reason=f"this CPU has no {entry.tier}")
        params.append(pytest.param(entry, id=f"{entry.name}-{entry.key}", marks=missing))
    metafunc.parametrize("entry", params)
