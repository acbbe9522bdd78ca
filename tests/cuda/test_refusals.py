"""What a GPU's operators refuse beyond what the CPU's do, and how a launch that fails is reported.

An emulated device is as old and as small as environment variables say.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openwork.testing import OpCase

from .devices import emulated_operator
from .test_ops import REFUSING


def _arguments(case: OpCase) -> tuple[Any, ...]:
    """Of the first sample in which no tensor is empty."""
    raws = (case.raw(sample) for sample in case.samples())
    return next(r for r in raws if all(a.numel() for a in r if isinstance(a, Tensor)))


@pytest.mark.parametrize("case", REFUSING, ids=lambda c: c.name)
def test_operands_of_2_to_the_31_elements(case: OpCase) -> None:
    arguments = _arguments(case)
    for i, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            continue
        large = argument.new_zeros(1).expand(2**31)
        message = rf"^{case.name}: \w+ must have fewer than 2\^31 elements on a GPU, got {2**31}$"
        with pytest.raises(ValueError, match=message):
            emulated_operator(case.name)(*arguments[:i], large, *arguments[i + 1 :])


@pytest.mark.parametrize("case", REFUSING, ids=lambda c: c.name)
def test_gpus_that_are_too_old(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENWORK_EMULATED_CAPABILITY", "75")
    message = rf"^{case.name}: \w+ must be on a GPU of compute capability 8.0 or later, got 7.5$"
    with pytest.raises(ValueError, match=message):
        emulated_operator(case.name)(*_arguments(case))


def test_drivers_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    # Minus the error of a driver older than the runtime.
    monkeypatch.setenv("OPENWORK_EMULATED_CAPABILITY", "-35")
    message = "^hadamard: the CUDA runtime must know the device, got CUDA error 35: CUDA driver ver"
    with pytest.raises(RuntimeError, match=message):
        emulated_operator("hadamard")(torch.ones(1, 4), 4)


@pytest.mark.parametrize("case", REFUSING, ids=lambda c: c.name)
def test_launches_that_fail_name_the_kernel(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    # No launch asks for as little shared memory.
    monkeypatch.setenv("OPENWORK_EMULATED_SHARED", "-1")
    message = rf"^{case.name}: kernel \w+ must launch, got CUDA error 1: invalid argument$"
    with pytest.raises(RuntimeError, match=message):
        emulated_operator(case.name)(*_arguments(case))


def test_products_that_need_more_shared_memory_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENWORK_EMULATED_SHARED", "4096")
    case = next(case for case in REFUSING if case.name == "lowbit_linear")
    with pytest.raises(RuntimeError, match="kernel lowbit_gemm_rows must launch"):
        emulated_operator(case.name)(*_arguments(case))


@pytest.mark.parametrize("size", [0, 1])
def test_no_rows(size: int) -> None:
    """No kernel is launched: a grid of no blocks is an error."""
    x = torch.zeros(size, 0, 32)
    codes, scales = emulated_operator("quantize_rows")(x)
    assert codes.shape == x.shape
    assert scales.shape == x.shape[:-1]
    assert emulated_operator("hadamard")(x, 32).shape == x.shape
