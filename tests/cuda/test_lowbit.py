"""Low-bit weights on a GPU, or emulated: every kernel, whole tiles and cut ones, and packing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import openwork
from openwork.testing import CASES, Sample
from openwork.testing.lowbit import make_weight

from .devices import overload

LINEAR = next(case for case in CASES if case.name == "lowbit_linear")
EMBEDDING = next(case for case in CASES if case.name == "lowbit_embedding")
PACK = next(case for case in CASES if case.name == "pack_lowbit")
HALVES = (torch.float16, torch.bfloat16)
# (m, n, k, group_size): up to 8 rows, up to 16, more than a tile of 64. The second and the last of
# each have enough k for tiles to be cut between blocks.
SHAPES = (
    (1, 33, 48, 16),
    (8, 64, 1024, 32),
    (9, 70, 112, 16),
    (16, 130, 576, 128),
    (17, 33, 80, 16),
    (66, 130, 640, 64),
    (65, 20, 800, 800),
)


def _check(device: str, sample: Sample) -> None:
    on_device = overload("lowbit_linear", device)

    def op(*args: Any, **kwargs: Any) -> Any:
        return on_device(*LINEAR.raw(Sample("", args, kwargs)))

    replace(LINEAR, op=op).check(sample)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(shape: tuple[int, int, int, int], symmetric: bool, bits: int, device: str) -> None:
    m, n, k, group_size = shape
    generator = torch.Generator().manual_seed(k)
    weight = make_weight(n, k, bits, group_size, symmetric, torch.float16)
    bias, add = torch.randn(n, generator=generator), torch.randn(m, n, generator=generator)
    for dtype in (torch.float32, *HALVES):
        x = torch.randn(m, k, generator=generator).to(dtype)
        for compute in ("float", "int8"):
            more = {"bias": bias.to(dtype), "add": add.to(dtype), "compute": compute}
            name = f"{compute}-{str(dtype)[6:]}"
            _check(device, Sample(name, (x, weight), more))


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_that_are_not_aligned(dtype: torch.dtype, device: str) -> None:
    weight = make_weight(40, 64, 4, 32, True, torch.float32)
    x = torch.randn(3 * 64 + 1).to(dtype)[1:].view(3, 64)
    _check(device, Sample("shifted", (x, weight)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_cpu_bit_for_bit(bits: int, device: str) -> None:
    """Where the CPU's kernels are exact within a group and groups are added in the same order."""
    weight = make_weight(140, 96, bits, 32, False, torch.bfloat16)
    x = torch.randn(20, 96)
    for compute in ("float", "int8"):
        sample = Sample("", (x, weight), {"compute": compute})
        got = overload("lowbit_linear", device)(*LINEAR.raw(sample))
        assert torch.equal(got, openwork.lowbit_linear(x, weight, compute=compute))


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_at_their_zero_point_are_zero(bits: int, m: int, device: str) -> None:
    zeros = torch.randint(2**bits, (40, 1), dtype=torch.uint8)
    codes = zeros.expand(40, 1600)
    weight = openwork.pack_lowbit(codes, torch.rand(40, 1) + 0.1, zeros, bits=bits, group_size=1600)
    for compute in ("float", "int8"):
        sample = Sample("", (torch.randn(m, 1600), weight), {"compute": compute})
        assert not overload("lowbit_linear", device)(*LINEAR.raw(sample)).any()


@pytest.mark.parametrize("sample", PACK.samples(), ids=lambda s: s.name)
def test_packs_the_same_bytes(sample: Sample, device: str) -> None:
    raw = PACK.raw(sample)
    got: tuple[Tensor, ...] = overload("pack_lowbit", device)(*raw)
    want = torch.ops.openwork.pack_lowbit(*raw)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    codes, scales, zeros = sample.args
    weight = openwork.pack_lowbit(codes, scales, zeros, **sample.kwargs)
    codes_back, scales_back, zeros_back = overload("unpack_lowbit", device)(
        weight.packed, weight.scales, weight.zeros, weight.layout_id, weight.n, weight.k,
        weight.group_size,
    )  # fmt: skip
    assert torch.equal(codes_back, codes)
    assert torch.equal(scales_back, scales)
    assert zeros is None or torch.equal(zeros_back, zeros)


def test_the_first_bad_value_is_named(device: str) -> None:
    pack = overload("pack_lowbit", device)
    codes = torch.zeros(5, 64, dtype=torch.uint8)
    scales = torch.ones(5, 2)
    codes[2, 7], codes[4, 0] = 16, 99
    with pytest.raises(ValueError, match=r"pack_lowbit: codes must be in 0 .. 15 .*, got 16$"):
        pack(codes, scales, None, 4, 32)
    codes.zero_()
    scales[1, 0], scales[3, 1] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"pack_lowbit: scales .* finite, got inf at element 2$"):
        pack(codes, scales, None, 4, 32)
    zeros = torch.full((5, 2), 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"pack_lowbit: zeros must be in 0 .. 15 .*, got 20$"):
        pack(codes, torch.ones(5, 2), zeros, 4, 32)


def test_ids_out_of_range_are_nans(device: str) -> None:
    weight = make_weight(40, 64, 4, 32, True, torch.float32)
    ids = torch.tensor([3, 40, -1, 39, 2**40])
    rows = overload("lowbit_embedding", device)(*EMBEDDING.raw(Sample("", (ids, weight))))
    assert rows.isnan().all(dim=1).tolist() == [False, True, True, False, True]
    assert torch.equal(rows[[0, 3]], openwork.ops.lowbit_embedding(ids[[0, 3]], weight))


@pytest.mark.parametrize("name", ["packed", "scales", "zeros"])
def test_weights_that_are_not_aligned_are_refused(name: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("tensors are aligned anew when they are copied")
    weight = make_weight(40, 64, 4, 32, False, torch.float16)
    tensor = getattr(weight, name)
    shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    sample = Sample("", (torch.randn(2, 64), replace(weight, **{name: shifted})))
    with pytest.raises(ValueError, match=f"lowbit_linear: {name} must begin at a multiple of 16"):
        overload("lowbit_linear", device)(*LINEAR.raw(sample))


def test_operands_on_two_devices_are_refused() -> None:
    overload("lowbit_linear", "cuda")
    weight = make_weight(40, 64, 4, 32, True, torch.float16)
    raw = LINEAR.raw(Sample("", (torch.randn(2, 64).cuda(), weight)))
    with pytest.raises(ValueError, match="packed must be on the device of x, cuda:0, got cpu"):
        torch.ops.openwork.lowbit_linear(*raw)
