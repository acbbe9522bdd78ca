"""The tiny model every test here starts from."""

from __future__ import annotations

import pytest

from openwork.models import Llama

from .checkpoints import random_model


@pytest.fixture(scope="session")
def tiny() -> Llama:
    """A model no test may change."""
    return random_model()
