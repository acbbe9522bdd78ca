"""The canonical quantized tensor refuses whatever does not fit its description."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.quant import QuantizedTensor
from openwork.quant.grid import BITS, expand_groups, split_groups


def _valid(n: int = 3, k: int = 40, group_size: int = 16, bits: int = 4) -> QuantizedTensor:
    groups = -(-k // group_size)
    return QuantizedTensor(
        codes=torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        scales=torch.rand(n, groups).add(0.5).half(),
        zeros=torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8),
        bits=bits,
        group_size=group_size,
    )


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 70),
    group_size=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_dequantize_is_the_formula(
    n: int, k: int, group_size: int, bits: int, symmetric: bool
) -> None:
    q = _valid(n, k, min(group_size, k), bits)
    if symmetric:
        q = replace(q, zeros=None)
    w = q.dequantize()
    assert w.shape == (n, k)
    assert w.dtype == torch.float32
    for i in range(n):
        for j in range(k):
            group = j // q.group_size
            zero = 2 ** (bits - 1) if q.zeros is None else int(q.zeros[i, group])
            assert float(w[i, j]) == float(q.scales[i, group]) * (int(q.codes[i, j]) - zero)


def test_groups_split_and_expand_with_a_short_last_one() -> None:
    weight = torch.arange(1.0, 11.0).view(1, 10)
    groups = split_groups(weight, 4)
    assert groups.tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]]
    expanded = expand_groups(torch.tensor([[1, 2, 3]]), 10, 4)
    assert expanded.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": 2}, "codes must be below 2**bits = 4"),
        ({"codes": torch.zeros(3, 40)}, "codes must be a 2-d uint8 tensor"),
        ({"codes": torch.zeros(40, dtype=torch.uint8)}, "codes must be a 2-d uint8 tensor"),
        ({"codes": torch.zeros(3, 0, dtype=torch.uint8)}, "at least one column"),
        ({"codes": torch.full((3, 40), 16, dtype=torch.uint8)}, "2**bits = 16, got 16"),
        ({"zeros": torch.full((3, 3), 16, dtype=torch.uint8)}, "zeros must be below 2**bits = 16"),
        ({"zeros": torch.zeros(3, 2, dtype=torch.uint8)}, "zeros must have shape"),
        ({"zeros": torch.zeros(3, 3)}, "zeros must be a 2-d uint8 tensor"),
        ({"scales": torch.ones(3, 2)}, "scales must have shape [n, groups] = [3, 3], got [3, 2]"),
        ({"scales": torch.ones(3, 3).double()}, "scales must be float16, bfloat16 or float32"),
        ({"scales": torch.zeros(3, 3)}, "scales must be finite and above 0"),
        ({"scales": -torch.ones(3, 3)}, "scales must be finite and above 0"),
        ({"scales": torch.full((3, 3), torch.nan)}, "scales must be finite and above 0"),
        ({"scales": torch.full((3, 3), torch.inf)}, "scales must be finite and above 0"),
        ({"group_size": 20}, "group_size must be one of 16, 32, 64, 128, k = 40"),
        ({"group_size": 64}, "group_size must be at most k = 40, got 64"),
        ({"group_size": 0}, "group_size must be one of"),
    ],
)
def test_a_contradiction_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(_valid(), **change)
