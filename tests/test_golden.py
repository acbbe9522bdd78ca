"""The bytes of every low-bit layout, pinned: see golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import openwork
from openwork import PackedWeight
from openwork.packing import LOWBIT_LAYOUTS

FOLDER = Path(__file__).with_name("golden")
N, K, GROUP_SIZE = 33, 48, 32  # two panels, a padded k, a short last group


def _write(path: Path, bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (N, K)).astype(np.uint8))
    zeros = torch.from_numpy(rng.integers(0, 1 << bits, (N, 2)).astype(np.uint8))
    # Powers of two: products with small integers stay exact.
    scales = torch.from_numpy(np.exp2(rng.integers(-3, 4, (N, 2))).astype(np.float16))
    weight = openwork.pack_lowbit(codes, scales, zeros, bits=bits, group_size=GROUP_SIZE)
    assert weight.zeros is not None
    np.savez_compressed(
        path,
        codes=codes,
        scales=scales,
        zeros=zeros,
        packed=weight.packed,
        packed_scales=weight.scales,
        packed_zeros=weight.zeros,
    )


@pytest.fixture(params=LOWBIT_LAYOUTS)
def golden(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor]]:
    """A layout's tag and its file's arrays."""
    path = FOLDER / f"{request.param}.npz"
    if not path.exists() and request.config.getoption("--write-golden"):
        _write(path, int(request.param[1]))
    with np.load(path, allow_pickle=False) as arrays:
        return request.param, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _weight(tag: str, arrays: dict[str, Tensor]) -> PackedWeight:
    return PackedWeight(
        arrays["packed"],
        arrays["packed_scales"],
        arrays["packed_zeros"],
        layout=tag,
        n=N,
        k=K,
        group_size=GROUP_SIZE,
    )


def test_packing_gives_the_pinned_bytes(golden: tuple[str, dict[str, Tensor]], isa: str) -> None:
    tag, arrays = golden
    weight = openwork.pack_lowbit(
        arrays["codes"],
        arrays["scales"],
        arrays["zeros"],
        bits=int(tag[1]),
        group_size=GROUP_SIZE,
    )
    assert weight.layout == tag
    assert torch.equal(weight.packed, arrays["packed"])
    assert torch.equal(weight.scales, arrays["packed_scales"])
    assert weight.zeros is not None
    assert torch.equal(weight.zeros, arrays["packed_zeros"])


def test_unpacking_the_pinned_bytes(golden: tuple[str, dict[str, Tensor]], isa: str) -> None:
    tag, arrays = golden
    codes, scales, zeros = openwork.unpack_lowbit(_weight(tag, arrays))
    assert torch.equal(codes, arrays["codes"])
    assert torch.equal(scales, arrays["scales"])
    assert zeros is not None
    assert torch.equal(zeros, arrays["zeros"])


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplying_by_the_pinned_bytes(
    golden: tuple[str, dict[str, Tensor]], isa: str, m: int, dtype: torch.dtype
) -> None:
    """Every tier computes the same, exact numbers from bytes that another machine packed."""
    tag, arrays = golden
    group = torch.arange(K) // GROUP_SIZE
    centered = arrays["codes"].double() - arrays["zeros"].double()[:, group]
    weight = arrays["scales"].double()[:, group] * centered
    x = torch.randint(-8, 9, (m, K)).to(dtype)
    y = openwork.lowbit_linear(x, _weight(tag, arrays), compute="float")
    # At most 48 * 8 * 255 in eighths: below 2**24, so fp32 holds every sum.
    assert torch.equal(y, (x.double() @ weight.T).to(dtype))


def test_no_file_is_left_over() -> None:
    weights = {path.stem for path in FOLDER.glob("*.npz") if not path.stem.startswith("kv")}
    assert weights == set(openwork.layouts())
