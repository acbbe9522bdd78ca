"""The bytes of every N:M layout, pinned: see golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import openwork
from openwork import NmWeight
from openwork.ops import nm_mask

FOLDER = Path(__file__).with_name("golden")
N, K, GROUP_SIZE = 33, 72, 32  # three panels, a short last block and group
# One pattern of each block size, with each size of vector.
PATTERNS = {
    "2of4v1": (2, 4, 1),
    "4of8v8": (4, 8, 8),
    "3of16v16": (3, 16, 16),
    "5of32v32": (5, 32, 32),
}


def _bits(tag: str) -> int:
    return int(tag[2 : tag.index("_")])


def _compress(tag: str, arrays: dict[str, Tensor], name: str) -> NmWeight:
    kept, block, vector = PATTERNS[name]
    bits = _bits(tag)
    weight = arrays["weight"].view(torch.bfloat16) if bits == 16 else arrays["weight"]
    ints = {"scales": arrays["scales"], "bits": bits, "group_size": GROUP_SIZE} if bits <= 8 else {}
    return openwork.compress_nm(
        weight, (kept, block), mask=arrays[f"{name}_mask"], vector=vector, **ints
    )


def _stored(weight: NmWeight, name: str) -> dict[str, Tensor]:
    """What a file holds of a packed weight; numpy has no bf16."""
    values = weight.values.view(torch.int16) if weight.bits == 16 else weight.values
    stored = {f"{name}_values": values, f"{name}_index": weight.index}
    if weight.scales is not None:
        stored["packed_scales"] = weight.scales
    return stored


def _write(path: Path, tag: str) -> None:
    bits = _bits(tag)
    rng = np.random.default_rng(bits)
    if bits <= 8:
        weight = torch.from_numpy(rng.integers(0, 1 << bits, (N, K)).astype(np.uint8))
    else:
        weight = torch.from_numpy(rng.integers(-8, 9, (N, K)).astype(np.float32) / 4)
        weight = weight.bfloat16().view(torch.int16) if bits == 16 else weight
    # Powers of two: products with small integers stay exact.
    scales = torch.from_numpy(np.exp2(rng.integers(-3, 4, (N, 3))).astype(np.float16))
    arrays = {"weight": weight, "scales": scales}
    for name, (kept, block, vector) in PATTERNS.items():
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(1.0, K + 1), (N, 1)), axis=1))
        arrays[f"{name}_mask"] = nm_mask(order, (kept, block), vector=vector)
        arrays.update(_stored(_compress(tag, arrays, name), name))
    np.savez_compressed(path, **{key: value.numpy() for key, value in arrays.items()})


@pytest.fixture(params=[tag for tag in openwork.layouts() if tag.startswith("nm")])
def golden(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor]]:
    """A layout's tag and its file's arrays."""
    path = FOLDER / f"{request.param}.npz"
    if not path.exists() and request.config.getoption("--write-golden"):
        _write(path, request.param)
    with np.load(path, allow_pickle=False) as arrays:
        return request.param, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _pinned(tag: str, arrays: dict[str, Tensor], name: str) -> NmWeight:
    kept, block, vector = PATTERNS[name]
    bits = _bits(tag)
    values = arrays[f"{name}_values"]
    return NmWeight(
        values.view(torch.bfloat16) if bits == 16 else values,
        arrays[f"{name}_index"],
        arrays["packed_scales"] if bits <= 8 else None,
        layout=tag,
        n=N,
        k=K,
        pattern=(kept, block),
        vector=vector,
        group_size=GROUP_SIZE if bits <= 8 else K,
    )


def _dense(tag: str, arrays: dict[str, Tensor], name: str) -> Tensor:
    """The weight in float64."""
    bits = _bits(tag)
    weight = arrays["weight"].view(torch.bfloat16) if bits == 16 else arrays["weight"]
    dense = weight.double()
    if bits <= 8:
        group = torch.arange(K) // GROUP_SIZE
        dense = arrays["scales"].double()[:, group] * (dense - 2 ** (bits - 1))
    return dense * arrays[f"{name}_mask"]


@pytest.mark.parametrize("name", PATTERNS)
def test_compressing_gives_the_pinned_bytes(
    golden: tuple[str, dict[str, Tensor]], name: str, isa: str
) -> None:
    tag, arrays = golden
    weight = _compress(tag, arrays, name)
    assert weight.layout == tag
    for key, value in _stored(weight, name).items():
        assert torch.equal(value, arrays[key]), key


@pytest.mark.parametrize("name", PATTERNS)
def test_expanding_the_pinned_bytes(golden: tuple[str, dict[str, Tensor]], name: str) -> None:
    tag, arrays = golden
    weight, scales = openwork.expand_nm(_pinned(tag, arrays, name))
    dense = _dense(tag, arrays, name)
    if scales is not None:
        assert torch.equal(scales, arrays["scales"])
        group = torch.arange(K) // GROUP_SIZE
        weight = scales.double()[:, group] * (weight.double() - 2 ** (_bits(tag) - 1))
    assert torch.equal(weight.double(), dense)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("m", [1, 40])
def test_multiplying_by_the_pinned_bytes(
    golden: tuple[str, dict[str, Tensor]], name: str, isa: str, m: int
) -> None:
    """Every tier computes the same, exact numbers from bytes that another machine packed."""
    tag, arrays = golden
    x = torch.randint(-8, 9, (m, K)).float()
    y = openwork.nm_linear(x, _pinned(tag, arrays, name))
    # Eighths below 2**20: fp32 holds every sum.
    assert torch.equal(y.double(), x.double() @ _dense(tag, arrays, name).T)
