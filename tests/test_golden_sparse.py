"""The bytes of the sparse and column layouts, pinned: see golden/README.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import openwork
from openwork import BlockSparseWeight, ColumnWeight, SparseWeight
from openwork.packing import BLOCK_LAYOUTS, COLUMN_LAYOUTS, block_of, value_bits

FOLDER = Path(__file__).with_name("golden")
N, K, GROUP_SIZE = 70, 90, 32  # no multiple of any tile, a short last group

Weight = SparseWeight | BlockSparseWeight | ColumnWeight
Arrays = dict[str, Tensor]


def _integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(low, high, shape))


def _source(tag: str) -> Arrays:
    """What is packed: small integers, so that every product is exact."""
    bits = value_bits(tag) if tag in COLUMN_LAYOUTS else 0
    if bits:
        groups = -(-K // GROUP_SIZE)
        return {
            "codes": _integers(bits, 0, 2**bits, N, K).to(torch.uint8),
            "scales": torch.exp2(_integers(bits + 1, -3, 4, N, groups).float()),
            "zeros": _integers(bits + 2, 0, 2**bits, N, groups).to(torch.uint8),
        }
    weight = _integers(1, -20, 21, N, K).float()
    if tag in BLOCK_LAYOUTS:
        b = block_of(tag)
        kept = _integers(2, 0, 2, -(-N // b), -(-K // b)) > 0
        each = kept.repeat_interleave(b, 0).repeat_interleave(b, 1)
        return {"weight": weight * each[:N, :K]}
    return {"weight": weight if bits or tag in COLUMN_LAYOUTS else weight * (weight > 5)}


def _pack(tag: str, source: Arrays) -> Weight:
    if tag in BLOCK_LAYOUTS:
        return openwork.compress_block_sparse(source["weight"], block_of(tag))
    if tag not in COLUMN_LAYOUTS:
        return openwork.compress_sparse(source["weight"], layout=tag)
    if value_bits(tag) == 0:
        return openwork.pack_columns(source["weight"])
    return openwork.pack_lowbit_columns(**source, bits=value_bits(tag), group_size=GROUP_SIZE)


def _tensors(weight: Weight) -> Arrays:
    return {f"packed_{k}": v for k, v in vars(weight).items() if isinstance(v, Tensor)}


def _restore(tag: str, arrays: Arrays) -> Weight:
    packed = {k.removeprefix("packed_"): v for k, v in arrays.items() if k.startswith("packed_")}
    if tag in BLOCK_LAYOUTS:
        return BlockSparseWeight(**packed, layout=tag, n=N, k=K)
    if tag not in COLUMN_LAYOUTS:
        return SparseWeight(**packed, scales=None, layout=tag, n=N, k=K)
    group_size = GROUP_SIZE if value_bits(tag) else K
    return ColumnWeight(
        **{"scales": None, "zeros": None, **packed}, layout=tag, n=N, k=K, group_size=group_size
    )


def _dense(arrays: Arrays) -> Tensor:
    if "weight" in arrays:
        return arrays["weight"].double()
    group = torch.arange(K) // GROUP_SIZE
    centered = arrays["codes"].double() - arrays["zeros"].double()[:, group]
    return arrays["scales"].double()[:, group] * centered


@pytest.fixture(params=[tag for tag in openwork.layouts() if not tag.startswith(("w", "nm"))])
def golden(request: pytest.FixtureRequest) -> tuple[str, Arrays]:
    """A layout's tag and its file's arrays."""
    tag = request.param
    path = FOLDER / f"{tag}.npz"
    if not path.exists() and request.config.getoption("--write-golden"):
        source = _source(tag)
        np.savez_compressed(path, **source, **_tensors(_pack(tag, source)))
    with np.load(path, allow_pickle=False) as arrays:
        # The first file calls the index of a sparse weight by what it is in that layout.
        names = {"packed_masks": "packed_index"}
        return tag, {names.get(name, name): torch.from_numpy(arrays[name]) for name in arrays.files}


def test_packing_gives_the_pinned_bytes(golden: tuple[str, Arrays], isa: str) -> None:
    tag, arrays = golden
    source = {name: array for name, array in arrays.items() if not name.startswith("packed_")}
    weight = _pack(tag, source)
    assert weight.layout == tag
    for name, tensor in _tensors(weight).items():
        assert torch.equal(tensor, arrays[name]), name


def test_unpacking_the_pinned_bytes(golden: tuple[str, Arrays], isa: str) -> None:
    tag, arrays = golden
    weight = _restore(tag, arrays)
    unpack: Callable[..., Tensor] = {
        SparseWeight: openwork.expand_sparse,
        BlockSparseWeight: openwork.expand_block_sparse,
        ColumnWeight: openwork.unpack_columns,
    }[type(weight)]
    assert torch.equal(unpack(weight).double(), _dense(arrays))


@pytest.mark.parametrize("m", [1, 40])
def test_multiplying_by_the_pinned_bytes(golden: tuple[str, Arrays], isa: str, m: int) -> None:
    """Every tier computes the same, exact numbers from bytes that another machine packed."""
    tag, arrays = golden
    x = torch.randint(-8, 9, (m, K)).float()
    weight = _restore(tag, arrays)
    if isinstance(weight, ColumnWeight):
        y = openwork.active_linear(x, weight, 2.0)
        x = torch.where(x.abs() > 2, x, 0.0)
    else:
        y = openwork.sparse_linear(x, weight)
    # At most 90 * 8 * 255 in eighths: below 2**24, so fp32 holds every sum.
    assert torch.equal(y.double(), x.double() @ _dense(arrays).T)
