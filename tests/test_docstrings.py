"""The examples of every docstring run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import openwork

# Runs when imported; not in every build; libraries of operators, which are no Python modules.
_SKIPPED = {"openwork.__main__", "openwork._kernels"} | {
    f"openwork.openwork_{library}" for library in ("cpu", "cuda", "emulated")
}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(openwork.__path__, "openwork.")
    if module.name not in _SKIPPED
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name == "openwork.integrations.transformers":
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    names = {"openwork": openwork, "torch": torch, **vars(module)}
    failed, _ = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [
        t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples
    ]
    assert len(found) > 20
