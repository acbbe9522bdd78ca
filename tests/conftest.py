"""Seeds, and fixtures that run a test on every tier and on several thread counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import openwork

TIERS = ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-golden",
        action="store_true",
        help="write tests/golden files for layouts that have none yet",
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=TIERS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each tier this CPU has, as the ceiling kernels are chosen under."""
    if TIERS.index(request.param) > TIERS.index(openwork.info().cpu_isa):
        pytest.skip(f"this CPU has no {request.param}")
    before = openwork.isa()
    openwork.set_isa(request.param)
    yield request.param
    openwork.set_isa(before)


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """A count for ``torch.set_num_threads``, already set."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
