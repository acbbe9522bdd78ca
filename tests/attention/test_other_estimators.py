"""Estimators of the literature that are not in the library, made of its parts.

They show that measuring, selecting and listing serve them: antidiagonal scores (XAttention), sorted
hashing with a sampled residual (HyperAttention), and shifted groups (LongLoRA).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from openwork import BlockIndex, ops
from openwork.attention import causal_index

from .dense import attention_weights, check_lists, covered

N, H, G, D, BLOCK = 256, 4, 2, 16, 32
ONE = torch.zeros(H, dtype=torch.int32)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int) -> Tensor:
    """Sums along strided antidiagonals of blocks: ``[1, heads, rows, blocks]``."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    rows, columns = (x[0].transpose(0, 1).unflatten(1, (-1, stride)) for x in (q, k))
    # Query a of a tile meets its key stride - 1 - a.
    sums = torch.einsum("hmsd,hnsd->hmn", rows, columns.flip(2))
    tiles = BLOCK // stride
    return sums.unflatten(1, (-1, tiles)).unflatten(3, (-1, tiles)).sum((2, 4))[None]


@pytest.mark.parametrize("stride", [8, 16])
def test_antidiagonals_touch_every_row_and_column_once(stride: int) -> None:
    """Of each tile; seen by scores that only one query, or one key, has a part in."""
    for place in range(N):
        q, k = torch.ones(1, N, H, 1), torch.ones(1, N, G, 1)
        q[:, place] = 2.0
        scores = antidiagonal_scores(q, k, stride)
        usual = BLOCK * BLOCK / stride
        expected = torch.full((N // BLOCK, N // BLOCK), usual)
        expected[place // BLOCK] += BLOCK / stride
        assert torch.equal(scores[0, 0], expected)
        q[:, place], k[:, place] = 1.0, 2.0
        expected = expected.mT
        assert torch.equal(antidiagonal_scores(q, k, stride)[0, 0], expected)


def test_antidiagonal_scores_become_an_index() -> None:
    q, k = 2 * torch.randn(1, N, H, D), torch.randn(1, N, G, D)
    k[0, 70:75] += 3 * q[0, :, ::2].mean(0)
    scores = antidiagonal_scores(q, k, 8) / (math.sqrt(D) * BLOCK * BLOCK / 8)
    causal = torch.ones(N // BLOCK, N // BLOCK, dtype=torch.bool).tril()
    mass = scores.masked_fill(~causal, -math.inf).softmax(-1)
    densities = []
    for share in (0.3, 0.9, 1.0):
        budgets = torch.full(mass.shape[:-1], share if share < 1 else math.inf).flatten()
        scored = mass.masked_fill(~causal, -math.inf).flatten(0, -2)
        marks = ops.largest(scored, budgets, by_mass=True).view(mass.shape)
        index = ops.block_index(
            _offsets(N), _offsets(N), blocks=marks, windows=ONE + 1, sinks=ONE, block_m=BLOCK,
            block_n=BLOCK,
        )  # fmt: skip
        check_lists(index, [N], [N])
        densities.append(index.density([N], [N]))
    assert densities == sorted(densities) and densities[0] < 0.9
    everything = causal_index([N], block_m=BLOCK, block_n=BLOCK)
    assert torch.equal(index.indices, everything.indices.repeat(H))
    (mass_of_rows,) = covered(index, attention_weights(q, k))
    assert torch.allclose(mass_of_rows, torch.ones(H, N, dtype=torch.float64))


def hyper_parts(
    q: Tensor, k: Tensor, v: Tensor, order_q: Tensor, order_k: Tensor, samples: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Attention to equal buckets, and to samples of the others, as states in q's own order."""
    diagonal = torch.eye(N // BLOCK, dtype=torch.bool).expand(1, H, -1, -1).contiguous()
    options = {"windows": ONE, "sinks": ONE, "causal": False, "block_m": BLOCK, "block_n": BLOCK}
    near = ops.block_index(_offsets(N), _offsets(N), blocks=diagonal, **options)
    marks = torch.zeros(1, H, N, dtype=torch.bool)
    marks[..., samples] = True
    listed = ops.block_index(_offsets(N), _offsets(N), blocks=diagonal, columns=marks, **options)
    check_lists(listed, [N], [N])
    assert listed.column_indptr is not None
    # The single keys alone: an index lists none inside of a listed block.
    far = BlockIndex(
        torch.zeros_like(listed.indptr), near.indices[:0], BLOCK, BLOCK, listed.column_indptr,
        listed.columns,
    )  # fmt: skip
    states = []
    for index in (near, far):
        o, lse = ops.block_attention(
            q[:, order_q], k[:, order_k], v[:, order_k], index, causal=False, return_lse=True
        )
        back = order_q.argsort()
        states.append((o[:, back], lse[:, back]))
    return states[0], states[1]


def test_hashed_blocks_and_a_sampled_residual() -> None:
    q, k, v = torch.randn(1, N, H, D), torch.randn(1, N, G, D), torch.randn(1, N, G, D)
    planes = torch.randn(D, 7)
    codes = 2 ** torch.arange(7)
    order_q, order_k = (
        ((x[0].mean(1) @ planes > 0) * codes).sum(-1).sort(stable=True).indices for x in (q, k)
    )
    dense = ops.block_attention(q, k, v, causal=False, return_lse=True)
    # Two halves of the keys as samples: nothing is left out, and nothing counts twice.
    near, even = hyper_parts(q, k, v, order_q, order_k, torch.arange(0, N, 2))
    _, odd = hyper_parts(q, k, v, order_q, order_k, torch.arange(1, N, 2))
    far = ops.merge_states(*even, *odd)
    o, lse = ops.merge_states(*near, *far)
    assert torch.allclose(o, dense[0], atol=1e-5) and torch.allclose(lse, dense[1], atol=1e-5)
    # Few of them: the mass of the residual is right in the mean.
    mean = torch.zeros_like(far[1])
    draws, count = 300, 64
    for _ in range(draws):
        samples = torch.randperm(N)[:count]
        _, sampled = hyper_parts(q, k, v, order_q, order_k, samples)
        mean += (sampled[1] - math.log(count / N)).exp() / draws
    # Relative to a mass of hundreds of keys; each draw is off by a tenth or so.
    assert ((mean - far[1].exp()) / far[1].exp()).abs().mean() < 0.02


def shifted_groups(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Half of the heads in groups, the other half in groups shifted by half of one."""
    o = []
    halves = zip(q.chunk(2, 2), k.chunk(2, 2), v.chunk(2, 2), strict=True)
    shifted = [size // 2, *[size] * (N // size - 1), size // 2]
    for part, lengths in zip(halves, ([size] * (N // size), shifted), strict=True):
        at = _offsets(*lengths)
        o.append(ops.block_attention_train(*part, cu_seqlens_q=at, cu_seqlens_k=at))
    return torch.cat(o, 2)


def test_shifted_groups_look_at_no_later_token() -> None:
    size = 64
    x = torch.randn(1, N, H, D, requires_grad=True)
    k, v = x[:, :, ::2], x[:, :, 1::2]
    once = shifted_groups(x, k, v, size)
    for i in (0, 31, 32, 63, 64, 100, 255):
        (slope,) = torch.autograd.grad(once[0, i].sum(), x, retain_graph=True)
        reached = slope[0].flatten(1).any(1).nonzero()[:, 0]
        assert reached.max() <= i
        # One layer ends at its group, or at the shifted one.
        assert reached.min() == max(0, min(i // size * size, (i + 32) // size * size - 32))
    mixed = once.flip(2)  # a projection mixes the halves
    twice = shifted_groups(mixed, mixed[:, :, ::2], mixed[:, :, 1::2], size)
    (slope,) = torch.autograd.grad(twice[0, 100].sum(), x)
    assert slope[0].flatten(1).any(1).nonzero().min() < 64  # the second layer sees across groups
