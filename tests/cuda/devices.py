"""Operators with a CUDA implementation, on a GPU or emulated.

The emulated library is the operators' host code and kernels compiled for the CPU, under
``torch.ops.openwork_emulated``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import openwork

EMULATED = Path(openwork.__file__).with_name("openwork_emulated.so")


def built(name: str) -> Path:
    """The library of the package, or the program of the build, of this name; skips without it."""
    if name.endswith(".so"):
        path = Path(openwork.__file__).with_name(name)
    else:
        folder = os.environ.get("OPENWORK_BUILD_DIR")
        if not folder:
            pytest.skip("set OPENWORK_BUILD_DIR to the folder the library was built in")
        path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"built without {name}")
    return path


@cache
def emulated_operator(name: str) -> Any:
    """The overload of the emulated library, with the fake implementation of the real operator."""
    if not EMULATED.is_file():
        pytest.skip("built without OPENWORK_CUDA_EMULATION")
    torch.ops.load_library(str(EMULATED))
    real = getattr(torch.ops.openwork, name).default
    torch.library.register_fake(f"openwork_emulated::{name}", lambda *args: real(*args))
    return getattr(torch.ops.openwork_emulated, name).default


def overload(name: str, device: str) -> Callable[..., Any]:
    """The raw operator on ``device``, "emulated" or "cuda", from and to CPU tensors.

    Skips the test where the device is not there.
    """
    if device == "emulated":
        emulated = emulated_operator(name)
        return lambda *args: emulated(*args)
    if openwork.info().cuda != "loaded" or not torch.cuda.is_available():
        pytest.skip("no GPU, or the CUDA library is not loaded")
    on_gpu = getattr(torch.ops.openwork, name).default

    def through_gpu(*args: Any) -> Any:
        moved = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), on_gpu(*moved))

    return through_gpu
