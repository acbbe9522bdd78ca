"""Invariants of rounding to nearest."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork.quant import QuantizedTensor, grid, rtn
from openwork.quant.grid import BITS, expand_groups, round_to_grid, symmetric_zero

FORMATS = [
    (bits, group_size, symmetric)
    for bits in BITS
    for group_size in (16, 128, None)
    for symmetric in (False, True)
]


def _weight(n: int = 7, k: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def _grid(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every weight, float64."""
    zeros = torch.full_like(q.scales, symmetric_zero(q.bits)) if q.zeros is None else q.zeros
    return (
        expand_groups(q.scales.double(), q.k, q.group_size),
        expand_groups(zeros.double(), q.k, q.group_size),
    )


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMATS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_half_a_step(
    bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    weight = _weight()
    q = rtn(weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    assert q.scales.dtype == scale_dtype
    assert (q.zeros is None) == symmetric
    step, zero = _grid(q)
    w = weight.double()
    error = (w - q.dequantize().double()).abs()
    # Beyond the first or last code the error grows with the distance; within, it is rounding to
    # the nearest code, and w / s + z in float32 can miss the nearest by an ulp of a code.
    outside = torch.maximum(-zero * step - w, w - (2**bits - 1 - zero) * step).clamp(min=0)
    assert bool((error <= torch.maximum(step / 2, outside) * (1 + 2.0**-14)).all())
    # min and max are in the range but for the rounding of the zero point (half a step) and of the
    # scale (2**bits - 1 steps, each off by half an ulp of the scale dtype).
    slack = 0.5 + (2**bits - 1) * torch.finfo(scale_dtype).eps / 2
    assert bool((outside <= slack * step * (1 + 1e-6)).all())


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMATS)
def test_rounding_a_rounded_weight_changes_nothing(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    q = rtn(_weight(), bits=bits, group_size=group_size, symmetric=symmetric)
    step, zero = _grid(q)
    again = round_to_grid(q.dequantize(), step.float(), zero.float(), bits)
    assert torch.equal(again.to(torch.uint8), q.codes)


# At 8 bit the rounding of a float16 scale moves the last code by up to 1/16, enough to leave it
# unused now and then; the range of the rounded weight is then smaller. At 4 bit it never does here.
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 128, None])
def test_finding_the_grid_again_changes_nothing(bits: int, group_size: int | None) -> None:
    q = rtn(_weight(), bits=bits, group_size=group_size)
    again = rtn(q.dequantize(), bits=bits, group_size=group_size)
    assert torch.equal(again.dequantize(), q.dequantize())


@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    search=st.booleans(),
    scale=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_zero_stays_zero(bits: int, symmetric: bool, search: bool, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(4, 50, generator=generator) + 1) * scale
    weight[torch.rand(4, 50, generator=generator) < 0.3] = 0
    q = rtn(weight, bits=bits, group_size=16, symmetric=symmetric, search=search)
    assert bool((q.dequantize()[weight == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_degenerate_groups(bits: int, symmetric: bool) -> None:
    weight = torch.zeros(4, 48)
    weight[1, 16:32] = 0.75  # constant, above zero
    weight[2, 16:32] = -0.75
    weight[3, 5] = 3.0  # a single spike
    q = rtn(weight, bits=bits, group_size=16, symmetric=symmetric)
    rounded = q.dequantize()
    # An empty group takes the range (-1, +1).
    assert float(q.scales[0, 0]) == float(torch.tensor(2 / (2**bits - 1)).half())
    assert bool((rounded[0] == 0).all())
    assert bool((rounded[weight == 0] == 0).all())
    half_step = expand_groups(q.scales.float(), 48, 16) / 2
    assert bool(((rounded - weight).abs() <= half_step * (1 + 2**bits * 2.0**-11)).all())


def test_scales_never_underflow_to_zero() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q = rtn(torch.full((1, 16), 1e-39), bits=8, group_size=16, scale_dtype=dtype)
        assert float(q.scales) > 0
        assert bool(torch.isfinite(q.dequantize()).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_never_raises_the_searched_error(bits: int, symmetric: bool) -> None:
    # Heavy tails, so that clipping pays.
    weight = _weight(20, 300) ** 3

    def error(q: QuantizedTensor) -> Tensor:
        gap = (weight - q.dequantize()).abs().pow(2.4)
        return torch.nn.functional.pad(gap, (0, 20)).view(20, -1, 64).sum(dim=2)

    plain = rtn(weight, bits=bits, group_size=64, symmetric=symmetric)
    searched = rtn(weight, bits=bits, group_size=64, symmetric=symmetric, search=True)
    assert bool((error(searched) <= error(plain) * (1 + 1e-5)).all())
    assert float(error(searched).sum()) < float(error(plain).sum())


def test_chunks_of_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(20, 100)
    whole = rtn(weight, bits=3, group_size=32, search=True)
    dequantized = whole.dequantize()
    monkeypatch.setattr(grid, "_CHUNK", 300)
    chunked = rtn(weight, bits=3, group_size=32, search=True)
    assert torch.equal(whole.codes, chunked.codes)
    assert torch.equal(whole.scales, chunked.scales)
    assert torch.equal(dequantized, chunked.dequantize())


def test_rows_and_groups_are_independent() -> None:
    weight = _weight(6, 160)
    whole = rtn(weight, bits=4, group_size=32)
    part = rtn(weight[2:4, 64:128], bits=4, group_size=32)
    assert torch.equal(whole.codes[2:4, 64:128], part.codes)
    assert torch.equal(whole.scales[2:4, 2:4], part.scales)


def test_any_layout_and_dtype_of_the_weight() -> None:
    weight = _weight(64, 96)
    expected = rtn(weight.bfloat16().float(), bits=4, group_size=32)
    before = weight.clone()
    for other in (weight.bfloat16(), weight.t().contiguous().t().bfloat16()):
        q = rtn(other, bits=4, group_size=32)
        assert torch.equal(q.codes, expected.codes)
        assert q.codes.is_contiguous()
        assert q.scales.is_contiguous()
    assert torch.equal(weight, before)


def test_group_size_of_at_least_k_is_one_group() -> None:
    assert rtn(_weight(3, 24), bits=4, group_size=64).group_size == 24
    assert rtn(_weight(3, 24), bits=4, group_size=None).group_size == 24


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(4), {}, "rtn: weight must be a non-empty [n, k] floating-point tensor"),
        (torch.ones(0, 4), {}, "rtn: weight must be a non-empty"),
        (torch.ones(4, 4, dtype=torch.int32), {}, "got [4, 4] torch.int32"),
        (torch.full((4, 4), torch.nan), {}, "rtn: weight must be finite"),
        (torch.ones(4, 4), {"bits": 7}, "rtn: bits must be one of 2, 3, 4, 8, got 7"),
        (torch.ones(4, 64), {"group_size": 24}, "rtn: group_size must be one of"),
        (torch.ones(4, 4), {"scale_dtype": torch.int8}, "rtn: scale_dtype must be float16"),
        (torch.full((1, 4), 1e7), {}, "overflows torch.float16; use bfloat16 or float32"),
    ],
)
def test_bad_arguments_are_named(weight: Tensor, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"bits": 4, "group_size": None} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        rtn(weight, **arguments)
