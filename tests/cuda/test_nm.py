"""N:M weights on GPUs, emulated or real: packing, fp16 values, and what GPUs ask of operands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import openwork
from openwork.ops import nm_mask
from openwork.testing import CASES
from openwork.testing.case import EPS, Sample
from openwork.testing.nm import make_weight, nm_linear_reference, nm_linear_tolerance

from .devices import emulated_operator, overload

LINEAR = next(case for case in CASES if case.name == "nm_linear")
COMPRESS = next(case for case in CASES if case.name == "compress_nm")
PATTERNS = ((2, 4), (1, 4), (3, 8), (5, 32))


def _check(device: str, x: Tensor, weight: openwork.NmWeight, **options: Any) -> None:
    on_device = overload("nm_linear", device)
    case = replace(
        LINEAR, op=lambda *args, **kwargs: on_device(*LINEAR.raw(Sample("", args, kwargs)))
    )
    case.check(Sample(str(weight.pattern), (x, weight), options))


def test_packed_tensors_equal_the_cpu_bit_for_bit(device: str) -> None:
    on_device = overload("compress_nm", device)
    for sample in COMPRESS.samples():
        raw = COMPRESS.raw(sample)
        for got, want in zip(on_device(*raw), torch.ops.openwork.compress_nm(*raw), strict=True):
            assert got.dtype == want.dtype, sample.name
            assert torch.equal(got, want), sample.name


def test_expanded_tensors_equal_the_cpu_bit_for_bit(device: str) -> None:
    on_device = overload("expand_nm", device)
    for sample in COMPRESS.samples():
        weight = openwork.compress_nm(*sample.args, **sample.kwargs)
        tensors, numbers = openwork.ops.nm.nm_arguments(weight, "float")
        want = torch.ops.openwork.expand_nm(*tensors, *numbers[:-1])
        for one, other in zip(on_device(*tensors, *numbers[:-1]), want, strict=True):
            assert one.dtype == other.dtype, sample.name
            assert torch.equal(one, other), sample.name


@pytest.mark.parametrize("dtype", ["bfloat16", "int4"])
def test_opcheck(dtype: str) -> None:
    weight = make_weight(17, 100, (2, 4), dtype, vector=8, group_size=32)
    tensors, numbers = openwork.ops.nm.nm_arguments(weight, "float")
    expand = emulated_operator("expand_nm")
    torch.library.opcheck(expand, (*tensors, *numbers[:-1]))
    dense, scales = expand(*tensors, *numbers[:-1])
    pack = (dense, None, None if weight.scales is None else scales, 2, 4, 8)
    torch.library.opcheck(emulated_operator("compress_nm"), (*pack, weight.bits, weight.group_size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 16}, "weight must be in 0 .. 15 for 4 bits, got 16"),
        ({"scales": float("inf")}, "scales must be finite, got inf at element 3"),
        ({"scales": float("nan")}, "scales must be finite, got nan at element 3"),
    ],
    ids=["code", "infinite", "nan"],
)
def test_values_that_cannot_be_packed(changes: dict[str, float], message: str, device: str) -> None:
    codes = torch.full((3, 64), 8, dtype=torch.uint8)
    scales = torch.ones(3, 2)
    codes[1, 5] = int(changes.get("codes", 8))
    scales[1, 1] = changes.get("scales", 1.0)
    # Another fault further on is not the one that is named.
    codes[2, 7] = 255 if "codes" in changes else 8
    for compress in (
        overload("compress_nm", device),
        torch.ops.openwork.compress_nm.default,
    ):
        with pytest.raises(ValueError, match=f"^compress_nm: {message}$"):
            compress(codes, None, scales, 2, 4, 1, 4, 32)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fp16_values(pattern: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(37, 136).half()
    mask = nm_mask(weight, pattern)
    packed = openwork.compress_nm(weight, pattern, mask=mask)
    assert packed.values.dtype == torch.float16
    assert torch.equal(openwork.expand_nm(packed)[0], weight * mask)
    for m in (1, 20):
        _check(device, torch.randn(m, 136).to(dtype), packed)


def test_fp16_values_are_for_gpus() -> None:
    packed = openwork.compress_nm(torch.eye(8).half(), (1, 4))
    with pytest.raises(ValueError, match="values must be bfloat16 on the CPU, got float16"):
        openwork.nm_linear(torch.ones(1, 8), packed)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64, 65, 129])
def test_rows_around_the_tiles(m: int, device: str) -> None:
    for dtype, x_type in (("bfloat16", torch.bfloat16), ("int4", torch.float16)):
        for pattern, n in (((2, 4), 129), ((4, 8), 48)):
            weight = make_weight(n, 200, pattern, dtype, group_size=64)
            _check(device, torch.randn(m, 200).to(x_type), weight)


@pytest.mark.parametrize("m", [2, 18])
def test_long_groups_of_int8_are_summed_exactly(m: int, device: str) -> None:
    """The largest sums that a row of 8192 columns has: 4096 products of 127 * 128."""
    k = 8192
    weight = openwork.compress_nm(
        torch.zeros(16, k, dtype=torch.uint8),
        (2, 4),
        mask=nm_mask(torch.ones(16, k)),
        scales=torch.ones(16, 1),
        bits=8,
    )
    x = torch.full((m, k), 127.0)
    x[:, -1] = 1.0  # of a column that is not kept
    y = overload("nm_linear", device)(*LINEAR.raw(Sample("", (x, weight), {"compute": "int8"})))
    assert torch.equal(y, torch.full_like(y, -127.0 * 128 * 4096))


@pytest.mark.parametrize("m", [3, 40])
def test_large_and_small_numbers_keep_their_accuracy(m: int, device: str) -> None:
    for dtype in ("float32", "int8"):
        weight = make_weight(20, 96, (2, 4), dtype, group_size=32)
        x = torch.randn(m, 96) * torch.logspace(-30, 30, m)[:, None]
        _check(device, x, weight)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("m", [3, 40])
def test_one_row_that_is_not_finite_spoils_no_other(value: float, m: int, device: str) -> None:
    weight = make_weight(20, 96, (2, 4), "float32")
    x = torch.randn(m, 96)
    x[1, 5] = value
    y = overload("nm_linear", device)(*LINEAR.raw(Sample("", (x, weight))))
    assert y[[i for i in range(m) if i != 1]].isfinite().all()
    assert not y[1].isfinite().all()


def test_x_need_not_be_aligned(device: str) -> None:
    weight = make_weight(20, 96, (2, 4), "bfloat16")
    x = torch.randn(3 * 96 + 1).bfloat16()[1:].view(3, 96)
    sample = Sample("", (x, weight))
    y = overload("nm_linear", device)(*LINEAR.raw(sample))
    expected = (nm_linear_reference(x, weight),)
    assert ((y.double() - expected[0]).abs() <= nm_linear_tolerance(sample, expected)[0]).all()


@pytest.mark.parametrize("name", ["values", "index", "scales"])
def test_weights_that_are_not_aligned_are_refused(name: str) -> None:
    weight = make_weight(20, 96, (2, 4), "int4", group_size=32)
    tensor = getattr(weight, name)
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    message = f"^nm_linear: {name} must begin at a multiple of 16 bytes"
    with pytest.raises(ValueError, match=message):
        _check("emulated", torch.randn(1, 96), replace(weight, **{name: moved}))


def test_operands_of_several_devices_are_refused() -> None:
    overload("nm_linear", "cuda")
    weight = make_weight(20, 96, (2, 4), "bfloat16").to("cuda")
    elsewhere = replace(weight, index=weight.index.cpu())
    raw = LINEAR.raw(Sample("", (torch.randn(1, 96, device="cuda"), elsewhere)))
    with pytest.raises(ValueError, match="^nm_linear: index must be on the device of x, cuda:0"):
        torch.ops.openwork.nm_linear.default(*raw)


def test_weights_move_between_devices() -> None:
    weight = make_weight(20, 96, (2, 4), "int4", group_size=32)
    moved = weight.to("meta")
    assert {t.device.type for t in (moved.values, moved.index, moved.scales)} == {"meta"}
    assert moved.in_huge_pages() is moved
    assert replace(moved, values=weight.values, index=weight.index, scales=weight.scales) == weight
