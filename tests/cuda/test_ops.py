"""CUDA operators against the references: emulated on the CPU, and on a GPU where there is one.

The emulated library is the operators' host code and kernels compiled for the CPU, under
``torch.ops.openwork_emulated``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import openwork
from openwork.testing import CASES, OpCase, Reject
from openwork.testing.case import EPS, Sample

# Operators with a CUDA implementation.
NAMES = ("quantize_rows", "hadamard")
COVERED = [case for case in CASES if case.name in NAMES]
EMULATED = Path(openwork.__file__).with_name("openwork_emulated.so")


def _case(name: str) -> OpCase:
    return next(case for case in COVERED if case.name == name)


def _overload(case: OpCase, device: str) -> Callable[..., Any]:
    """The raw operator on ``device``, from and to CPU tensors."""
    if device == "emulated":
        if not EMULATED.is_file():
            pytest.skip("built without OPENWORK_CUDA_EMULATION")
        torch.ops.load_library(str(EMULATED))
        overload = getattr(torch.ops.openwork_emulated, case.name).default
        return lambda *args: overload(*args)
    if openwork.info().cuda != "loaded" or not torch.cuda.is_available():
        pytest.skip("no GPU, or the CUDA library is not loaded")
    overload = getattr(torch.ops.openwork, case.name).default

    def on_device(*args: Any) -> Any:
        moved = tree_map_only(torch.Tensor, lambda t: t.cuda(), args)
        return tree_map_only(torch.Tensor, lambda t: t.cpu(), overload(*moved))

    return on_device


@pytest.fixture(params=("emulated", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_equals_reference(case: OpCase, device: str) -> None:
    overload = _overload(case, device)

    def op(*args: Any, **kwargs: Any) -> Any:
        return overload(*case.raw(Sample("", args, kwargs)))

    for sample in case.samples():
        replace(case, op=op).check(sample)


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_opcheck(case: OpCase) -> None:
    _overload(case, "emulated")
    # The fake implementation is registered for the real operator.
    overload = getattr(torch.ops.openwork_emulated, case.name).default
    for sample in case.samples()[::9]:
        torch.library.opcheck(overload, case.raw(sample), test_utils="test_schema")


@pytest.mark.parametrize(
    ("case", "reject"),
    [pytest.param(c, r, id=f"{c.name}-{r.name}") for c in COVERED for r in c.rejects()],
)
def test_bad_input_is_refused_in_the_same_words(case: OpCase, reject: Reject, device: str) -> None:
    raw = case.raw(Sample(reject.name, reject.args, reject.kwargs))
    with pytest.raises(ValueError, match=f"^{case.name}: ") as error:
        _overload(case, device)(*raw)
    assert reject.message in str(error.value)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256, 257, 4096])
def test_quantize_rows_equals_the_cpu_bit_for_bit(k: int, device: str) -> None:
    overload = _overload(_case("quantize_rows"), device)
    for dtype in EPS:
        x = (torch.randn(3, k) * torch.logspace(-6, 4, 3)[:, None]).to(dtype)
        for got, want in zip(overload(x), openwork.quantize_rows(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("block", [2**i for i in range(16)])
def test_hadamard_equals_the_cpu_bit_for_bit(block: int, device: str) -> None:
    overload = _overload(_case("hadamard"), device)
    for dtype in EPS:
        x = torch.randn(2, 3 * max(block, 4)).to(dtype)
        assert torch.equal(overload(x, block), openwork.ops.hadamard(x, block))
