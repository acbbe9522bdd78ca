"""Devices of operators, and the emulation, compiled once a flavour."""

from __future__ import annotations

from pathlib import Path

import pytest

from .emulated_programs import CSRC, compile_emulated


@pytest.fixture(params=("emulated", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    """Of an operator: for ``devices.overload``."""
    return str(request.param)


def _objects(flavour: str, factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / f"emulation-{flavour}"
    if not folder.is_dir():
        folder.mkdir()
        for source in sorted((CSRC / "testing" / "cuda").glob("*.cpp")):
            compile_emulated(flavour, [source], folder / f"{source.stem}.o", "-c")
    return folder


@pytest.fixture(params=("plain", "tsan"))
def flavour(request: pytest.FixtureRequest) -> str:
    """Of a build: what it is checked with."""
    return str(request.param)


@pytest.fixture
def emulation(flavour: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The emulation's objects in that flavour, in a folder of their own."""
    folder = _objects(flavour, tmp_path_factory)
    sources = sorted((CSRC / "testing" / "cuda").glob("*.cpp"))
    return [folder / f"{source.stem}.o" for source in sources]
