"""Primitives that every method of attending to less is made of: merges, masks, column sums."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork import BlockIndex, KVFormat, KVPages, ops
from openwork.testing.attention import decode_attention_reference
from openwork.testing.block_attention import block_attention_reference, make_operands, visible

State = tuple[Tensor, Tensor]


def _part(q: Tensor, k: Tensor, v: Tensor) -> State:
    return ops.block_attention(q, k, v, causal=False, return_lse=True)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_parts_of_any_partition_in_any_order_are_the_whole(sizes: list[int], random) -> None:  # type: ignore[no-untyped-def]
    n = sum(sizes)
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(1, 3, 4, 16, generator=generator)
    k, v = torch.randn(2, 1, n, 2, 16, generator=generator)
    keys = torch.randperm(n, generator=generator)
    parts = [_part(q, k[:, part], v[:, part]) for part in keys.split(sizes)]
    while len(parts) > 1:  # a tree of merges
        random.shuffle(parts)
        a, b = parts.pop(), parts.pop()
        parts.append(ops.merge_states(*a, *b))
    o, lse = parts[0]
    if n == 0:
        assert (o == 0).all() and (lse == -math.inf).all()
        return
    expected = block_attention_reference(q, k, v, causal=False, return_lse=True)
    assert (o - expected[0]).abs().max() <= 1e-6
    assert (lse - expected[1]).abs().max() <= 1e-5


def test_an_empty_part_changes_no_bit(isa: str) -> None:
    o, lse = torch.randn(2, 5, 3, 64), 40 * torch.randn(2, 5, 3)
    nothing = torch.zeros_like(o), torch.full_like(lse, -math.inf)
    for merged in (
        ops.merge_states(o, lse, *nothing),
        ops.merge_states(*nothing, o, lse),
        ops.merge_states(*ops.merge_states(*nothing, *nothing), o, lse),
    ):
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)
    both = ops.merge_states(*nothing, *nothing)
    assert (both[0] == 0).all() and (both[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_a_mask_hides_change_nothing(isa: str, dtype: torch.dtype) -> None:
    """Listed blocks without a visible key, before, between and after those with some."""
    n, t = 320, 64
    q, k, v = make_operands(1, t, n, 4, 2, 64, 64, dtype)
    blocks = torch.arange(n // 32, dtype=torch.int32)
    every = BlockIndex(torch.tensor([[0, len(blocks)]], dtype=torch.int32), blocks, 64, 32)
    for window, sinks, min_distance in ((70, 0, 0), (70, 3, 0), (0, 0, 150), (200, 40, 130)):
        masks = {"window": window, "sinks": sinks, "min_distance": min_distance}
        hidden = ~visible(t, n, True, window, sinks, min_distance).any(0)
        # Hidden keys that would win by far, if they were looked at.
        loud = k.clone()
        loud[:, hidden] *= 100
        expected = block_attention_reference(q, k, v, return_lse=True, **masks)
        for index in (None, every):
            o, lse, sums = ops.block_attention(
                q, loud, v, index, return_lse=True, scores="all", **masks
            )
            assert (o - expected[0]).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2)
            assert (lse - expected[1]).abs().max() <= 1e-3
            assert (sums[..., hidden] == 0).all()


def test_queries_without_keys_give_nothing(isa: str) -> None:
    q, k, v = make_operands(1, 130, 67, 4, 2, 32, 32, torch.float32)
    o, lse, sums = ops.block_attention(q, k, v, return_lse=True, scores="all")
    assert (o[:, :63] == 0).all() and (lse[:, :63] == -math.inf).all()
    assert lse[:, 63:].isfinite().all() and (o[:, 63:] != 0).any(-1).all()
    assert torch.allclose(sums.sum(-1), torch.full((1, 4), 67.0), rtol=1e-5)


@pytest.mark.parametrize("scores", ["all", 5, "probes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums_add_up_to_the_queries(isa: str, dtype: torch.dtype, scores: object) -> None:
    """Every query has a mass of 1, however it is spread, in packed sequences too."""
    q, k, v = make_operands(1, 200, 200, 6, 2, 64, 64, dtype)
    at = torch.tensor([0, 50, 51, 200], dtype=torch.int32)
    asked = torch.rand(1, 200) < 0.2
    chosen = asked if scores == "probes" else scores
    count = {"all": 200.0, "probes": float(asked.sum())}.get(scores, 5.0 + 1 + 5)  # type: ignore[call-overload]
    sums = ops.block_attention(q, k, v, cu_seqlens_q=at, cu_seqlens_k=at, scores=chosen)[-1]
    # Weights of bfloat16 operands are rounded to it, each on its own.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert torch.allclose(sums.sum(-1), torch.full((1, 6), count), rtol=tolerance)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("h", "g"), [(3, 1), (6, 2), (5, 5), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_every_width_and_group(
    isa: str, d: int, h: int, g: int, dtype: torch.dtype
) -> None:
    """Prefill, decoding, and pages, of the sizes that models have."""
    q, k, v = make_operands(1, 70, 150, h, g, d, d, dtype)
    eps = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    expected = block_attention_reference(q, k, v)[0]
    assert (ops.block_attention(q, k, v) - expected).abs().max() <= 3 * eps
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    q = q[:, -2:].contiguous()
    expected = decode_attention_reference(q, keys, values, 150)
    assert (ops.decode_attention(q, keys, values, 150) - expected).abs().max() <= 3 * eps
    dense = KVFormat(8 * dtype.itemsize)
    pages = KVPages.allocate(1, g, d, 160, keys=dense, values=dense, dtype=dtype)
    ops.kv_append(pages, k, v)
    assert (ops.paged_attention(q, pages) - expected).abs().max() <= 3 * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_of_a_model(isa: str, dtype: torch.dtype) -> None:
    """DeepSeek's sizes: a latent of 512 with 64 rotated dimensions, which every head reads."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 1, 300, 576, generator=generator).to(dtype)
    q = torch.randn(1, 3, 16, 576, generator=generator).to(dtype)
    expected = decode_attention_reference(q, latent, latent[..., :512], 290, 0.1)
    o = ops.decode_attention(q, latent, latent[..., :512], 290, 0.1)
    assert (o - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 2.0**-6)


_COLUMN_SUMS = """
import resource, sys
import torch
from openwork import ops
n = int(sys.argv[1])
q, k = torch.randn(1, n, 2, 32), torch.randn(1, n, 1, 32)
ops.block_attention(q[:, :64], k[:, :64], k[:, :64], scores="all")  # what a first call takes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.block_attention(q, k, k, return_lse=True, scores="all")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_column_sums_take_memory_for_the_tokens_alone() -> None:
    """Of 8192 tokens the attention matrix would take 512 MiB."""
    n = 8192
    run = [sys.executable, "-c", _COLUMN_SUMS, str(n)]
    grown = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    # The inputs again, laid out, the results, and weights of 64 queries.
    assert grown < 16 * n * 4 * 3 * 32
