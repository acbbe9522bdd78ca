"""CUDA operators where they run: emulated on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import openwork

EMULATED = Path(openwork.__file__).with_name("openwork_emulated.so")


def overload_on(device: str, name: str) -> Callable[..., Any]:
    """The raw operator on ``device``, from and to CPU tensors."""
    if device == "emulated":
        if not EMULATED.is_file():
            pytest.skip("built without OPENWORK_CUDA_EMULATION")
        torch.ops.load_library(str(EMULATED))
        overload = getattr(torch.ops.openwork_emulated, name).default
        return lambda *args: overload(*args)
    if openwork.info().cuda != "loaded" or not torch.cuda.is_available():
        pytest.skip("no GPU, or the CUDA library is not loaded")
    overload = getattr(torch.ops.openwork, name).default

    def on_device(*args: Any) -> Any:
        moved = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), overload(*moved))

    return on_device
