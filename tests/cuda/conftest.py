"""Devices of operators, and programs of the emulation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .emulated_programs import Program, Workshop


@pytest.fixture(params=("emulated", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    """Of an operator: for ``devices.overload``."""
    return str(request.param)


@pytest.fixture(scope="session")
def workshop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workshop]:
    """Where the programs of all tests are being built."""
    workshop = Workshop(tmp_path_factory.mktemp("workshop"))
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    programs = [call.params.get("program") for call in calls]
    workshop.begin(program for program in programs if isinstance(program, Program))
    yield workshop
    workshop.end()
