"""Dense packing of small integers, against its definition and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork import bitstream
from openwork.bitstream import pack_words, unpack_words, word_count


def _random(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)


@given(
    n=st.integers(1, 4),
    k=st.integers(1, 100),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=100, deadline=None)
def test_a_row_is_one_little_endian_number(n: int, k: int, bits: int, seed: int) -> None:
    values = _random(n, k, bits, seed)
    words = pack_words(values, bits)
    assert words.dtype == torch.int32
    assert list(words.shape) == [n, word_count(k, bits)]
    for row, packed in zip(values.tolist(), words.tolist(), strict=True):
        number = sum(value << (bits * i) for i, value in enumerate(row))
        stored = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed))
        assert stored == number
    assert torch.equal(unpack_words(words, bits, k), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_values(bits: int) -> None:
    for value in (0, 2**bits - 1):
        values = torch.full((3, 33), value, dtype=torch.uint8)
        assert torch.equal(unpack_words(pack_words(values, bits), bits, 33), values)


def test_pieces_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = _random(50, 37, 3)
    words = pack_words(values, 3)
    transposed = values.t().contiguous().t()
    monkeypatch.setattr(bitstream, "_PIECE", 500)
    assert torch.equal(pack_words(transposed, 3), words)
    assert torch.equal(unpack_words(words.t().contiguous().t(), 3, 37), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 96, 576])
def test_same_bits_as_compressed_tensors(bits: int, k: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = _random(16, k, bits)
    signed = (values.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(values, bits), helpers.pack_to_int32(signed, bits))
    # Zero points are packed along the other dimension.
    theirs = helpers.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_words(values.t(), bits).t(), theirs)
