"""CUDA operators against the references: emulated on the CPU, and on a GPU where there is one.

The emulated library is the operators' host code and kernels compiled for the CPU, under
``torch.ops.openwork_emulated``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import openwork
from openwork.testing import CASES, OpCase, Reject
from openwork.testing.case import EPS, Sample

from .devices import overload_on

# Operators with a CUDA implementation.
NAMES = ("quantize_rows", "hadamard", "nm_linear")
COVERED = [case for case in CASES if case.name in NAMES]


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_equals_reference(case: OpCase, device: str) -> None:
    overload = overload_on(device, case.name)

    def op(*args: Any, **kwargs: Any) -> Any:
        return overload(*case.raw(Sample("", args, kwargs)))

    for sample in case.samples():
        replace(case, op=op).check(sample)


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_opcheck(case: OpCase) -> None:
    overload_on("emulated", case.name)
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
        overload_on(device, case.name)(*raw)
    assert reject.message in str(error.value)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256, 257, 4096])
def test_quantize_rows_equals_the_cpu_bit_for_bit(k: int, device: str) -> None:
    overload = overload_on(device, "quantize_rows")
    for dtype in EPS:
        x = (torch.randn(3, k) * torch.logspace(-6, 4, 3)[:, None]).to(dtype)
        for got, want in zip(overload(x), openwork.quantize_rows(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("block", [2**i for i in range(16)])
def test_hadamard_equals_the_cpu_bit_for_bit(block: int, device: str) -> None:
    overload = overload_on(device, "hadamard")
    for dtype in EPS:
        x = torch.randn(2, 3 * max(block, 4)).to(dtype)
        assert torch.equal(overload(x, block), openwork.ops.hadamard(x, block))
