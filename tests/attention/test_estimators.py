"""What estimators promise: coverage, no key twice, planted keys found, limits dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from openwork import BlockIndex
from openwork.attention import (
    block_topk_index,
    flexprefill_index,
    hip_index,
    vertical_slash_index,
)
from openwork.attention.flexprefill import jensen_shannon
from openwork.ops import hierarchical_topk

from .dense import attention_weights, check_lists, covered, listed_mask

Estimator = Callable[..., BlockIndex]
ESTIMATORS: dict[str, Estimator] = {
    "vertical-slash": lambda q, k, **o: vertical_slash_index(
        q, k, 20, 24, probes=16, sinks=2, window=8, **o
    ),
    "block-topk": lambda q, k, **o: block_topk_index(q, k, 2, **o),
    "flexprefill": lambda q, k, **o: flexprefill_index(q, k, 0.8, min_budget=16, **o),
    "flexprefill-aware": lambda q, k, **o: flexprefill_index(
        q, k, 0.8, tau=0.9, min_budget=16, **o
    ),
    "hip": lambda q, k, **o: hip_index(q, k, 2, window=20, sinks=1, **o),
}
SMALL = {"block_m": 16, "block_n": 16}


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _pair(
    b: int, sq: int, sk: int, h: int = 4, g: int = 2, d: int = 16, size: float = 2.0
) -> tuple[Tensor, Tensor]:
    return torch.randn(b, sq, h, d) * size, torch.randn(b, sk, g, d)


def _same(a: BlockIndex, b: BlockIndex) -> bool:
    pairs = [(a.indptr, b.indptr), (a.indices, b.indices)]
    if a.columns is not None and b.columns is not None:
        assert a.column_indptr is not None and b.column_indptr is not None
        pairs += [(a.column_indptr, b.column_indptr), (a.columns, b.columns)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("b", "sq", "sk"),
    [(1, 1, 1), (1, 5, 5), (2, 100, 100), (1, 33, 150), (1, 64, 64), (1, 40, 17), (1, 0, 9)],
)
@pytest.mark.parametrize("tile", [(16, 16), (32, 64)])
def test_any_length(name: str, b: int, sq: int, sk: int, tile: tuple[int, int]) -> None:
    q, k = _pair(b, sq, sk)
    index = ESTIMATORS[name](q, k, block_m=tile[0], block_n=tile[1])
    check_lists(index, [sq] * b, [sk] * b)
    assert index.index_heads == 4
    weights = attention_weights(q, k)
    for w, mask in zip(weights, listed_mask(index, weights), strict=True):
        # Every query that sees a key has its own listed.
        own = w[0].new_zeros(sq, sk, dtype=torch.bool)
        for i in range(max(0, sq - sk), sq):
            own[i, sk - sq + i] = True
        assert not (own & ~mask).any()
        # Nothing entirely behind a block of queries.
        rows = torch.arange(sq) // tile[0] * tile[0] + tile[0] - 1 + sk - sq
        assert not (mask & (torch.arange(sk) // tile[1] * tile[1] > rows[:, None])).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_packed_sequences_are_estimated_alone(name: str) -> None:
    q_lengths, k_lengths = [50, 1, 0, 37], [50, 80, 4, 60]
    q, k = _pair(1, sum(q_lengths), sum(k_lengths))
    lengths = {"cu_seqlens_q": _offsets(*q_lengths), "cu_seqlens_k": _offsets(*k_lengths)}
    index = ESTIMATORS[name](q, k, **lengths, **SMALL)
    check_lists(index, q_lengths, k_lengths)
    masks = index.to_mask(q_lengths, k_lengths)
    q_parts, k_parts = q.split(q_lengths, dim=1), k.split(k_lengths, dim=1)
    for q_s, k_s, mask in zip(q_parts, k_parts, masks, strict=True):
        alone = ESTIMATORS[name](q_s, k_s, **SMALL)
        assert torch.equal(alone.to_mask([q_s.shape[1]], [k_s.shape[1]])[0], mask)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_views_dtypes_and_threads_change_nothing(name: str) -> None:
    q, k = _pair(2, 70, 70)
    q, k = q.bfloat16(), k.bfloat16()
    want = ESTIMATORS[name](q.float(), k.float(), **SMALL)
    cache = k.transpose(1, 2).contiguous().transpose(1, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert _same(ESTIMATORS[name](q, cache, **SMALL), want)
    finally:
        torch.set_num_threads(before)
    assert _same(ESTIMATORS[name](q, k, **SMALL), want)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scale_is_honoured(name: str) -> None:
    q, k = _pair(1, 90, 90)
    scaled = ESTIMATORS[name](q, k, scale=-0.5, **SMALL)
    assert _same(scaled, ESTIMATORS[name](-2 * q, k, scale=0.25, **SMALL))


@pytest.mark.parametrize("lines", [(200, 1), (1, 200)])
def test_vertical_slash_of_all_lines_is_dense(lines: tuple[int, int]) -> None:
    q, k = _pair(2, 130, 200)
    index = vertical_slash_index(q, k, *lines, sinks=1, window=1)
    assert index.density([130] * 2, [200] * 2) == 1.0


def test_vertical_slash_keeps_sinks_and_the_nearest_whatever_they_score() -> None:
    q, k = _pair(1, 300, 300)
    k[:, :4] -= 4 * q[:, -64:].mean(1).view(1, 1, 2, 2, 16).mean(3)  # nobody likes the first keys
    index = vertical_slash_index(q, k, 12, 20, sinks=4, window=16, **SMALL)
    (mask,) = index.to_mask([300], [300])
    distance = torch.arange(300)[:, None] - torch.arange(300)
    assert mask[:, (distance >= 0) & (distance < 16)].all()
    assert mask[:, 16:, :4].all()
    alone = vertical_slash_index(q, k, 4, 16, sinks=4, window=16, **SMALL)
    (mask,) = alone.to_mask([300], [300])
    # Nothing else has a place: blocks that hold none of the 16 distances, nor one of the 4 keys.
    rows, blocks = torch.arange(300)[:, None] // 16, torch.arange(300) // 16
    assert not mask[:, (rows - blocks > 1) & (torch.arange(300) >= 16)].any()


def test_vertical_slash_finds_planted_lines() -> None:
    q, k = _pair(1, 300, 300, h=2, g=1, d=32, size=0.1)
    k[0, 77] += 3.0  # a column that all queries like
    q += 2.0
    distance = 90  # a diagonal: query p has the key at p - distance
    q[0, distance:, 1] = 40.0 * k[0, :-distance, 0] / k[0, :-distance, 0].norm(dim=-1, keepdim=True)
    index = vertical_slash_index(q, k, 8, 16, sinks=4, window=8, **SMALL)
    mask = index.to_mask([300], [300])[0]
    assert mask[0, 77:, 77].all()
    for p in range(distance, 300):
        assert mask[1, p, p - distance]
    assert index.density([300], [300]) < 0.6


@pytest.mark.parametrize("name", ESTIMATORS)
def test_error_is_bounded_by_the_mass_left_out(name: str) -> None:
    q, k = _pair(1, 150, 150)
    v = torch.randn(150, 4, 8).double()
    index = ESTIMATORS[name](q, k, **SMALL)
    (weights,) = attention_weights(q, k)
    (mask,) = listed_mask(index, [weights])
    (mass,) = covered(index, [weights])
    sparse = weights * mask / (weights * mask).sum(-1, keepdim=True)
    error = torch.einsum("hij,jhd->hid", sparse - weights, v).abs().amax(-1)
    bound = 2 * (1 - mass) * v.abs().amax(dim=(0, 2))[:, None]
    assert (error <= bound + 1e-12).all()


def test_block_topk_lists_the_best_visible_blocks() -> None:
    q, k = _pair(1, 170, 170)
    top = 3
    index = block_topk_index(q, k, top, **SMALL)
    (mask,) = index.to_mask([170], [170])
    for x in range(4):
        keys = k[0, :, x // 2].split(16)
        for r, queries in enumerate(q[0, :, x].split(16)):
            scores = torch.stack([queries.mean(0) @ c.mean(0) for c in keys[: r + 1]])
            want = set(scores.topk(min(top, r + 1)).indices.tolist()) | {r}
            assert set((mask[x, r * 16].nonzero().flatten() // 16).tolist()) == want


def test_flexprefill_covers_gamma_of_the_measured_queries() -> None:
    q, k = _pair(1, 200, 230, size=3.0)
    (weights,) = attention_weights(q, k)
    densities = []
    for tau in (0.0, 0.9):  # no head is query-aware, most are
        listed: list[Tensor] = []
        for gamma in (0.3, 0.6, 0.9, 0.99, 1.0):
            index = flexprefill_index(q, k, gamma, tau=tau, probes=16, min_budget=16, **SMALL)
            (mass,) = covered(index, [weights])
            assert (mass[:, -16:].mean(1) >= gamma - 1e-5).all()  # what fp32 measures
            listed.append(index.to_mask([200], [230])[0])
            densities.append(index.density([200], [230]))
        for less, more in pairwise(listed):
            assert not (less & ~more).any()
        assert densities[-1] == 1.0
        assert densities[-5] < 0.9


def test_flexprefill_budgets_limit_blocks() -> None:
    q, k = _pair(1, 256, 256, size=0.1)
    free = flexprefill_index(q, k, 0.9, tau=0.0, **SMALL)
    capped = flexprefill_index(q, k, 0.9, tau=0.0, min_budget=16, max_budget=32, **SMALL)
    assert capped.density([256], [256]) < free.density([256], [256])
    # Two columns, two diagonals, the first block and the own.
    assert int(capped.indptr.diff(dim=1).max()) <= 6
    full = flexprefill_index(q, k, 0.0, tau=0.0, min_budget=256, **SMALL)
    assert full.density([256], [256]) == 1.0
    with pytest.raises(ValueError, match=r"flexprefill_index: gamma must be in 0 \.\. 1, got 1.5"):
        flexprefill_index(q, k, 1.5)


def test_jensen_shannon_distance_is_bounded() -> None:
    p = torch.rand(50, 9).softmax(-1)
    sharp = torch.eye(9)[torch.arange(50) % 9]
    for a, b in ((p, p), (p, sharp), (sharp, sharp.roll(1, 0)), (sharp, sharp)):
        distance = jensen_shannon(a, b).sqrt()
        assert not distance.isnan().any()
        assert (distance >= 0).all() and (distance <= math.sqrt(math.log(2)) + 1e-6).all()
    assert torch.allclose(jensen_shannon(sharp, sharp.roll(1, 0)), torch.tensor(2.0).log())
    assert jensen_shannon(p, p).abs().max() < 1e-6


def _stepped(groups: int, size: int, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that score alike in runs of `size`; the score of each run."""
    scores = torch.randperm(groups).float()
    k = (scores.repeat_interleave(size)[:, None] / d).expand(-1, d).reshape(1, -1, 1, d)
    return torch.ones(1, groups * size, 1, d), k.contiguous(), scores


def test_hip_recovers_the_best_blocks_where_neighbours_score_alike() -> None:
    for _ in range(20):
        q, k, scores = _stepped(groups=8, size=64)
        # After them comes a block that is not searched, that of the queries.
        n = k.shape[1] + 16
        q, k = torch.ones(1, n, 1, 8), torch.cat((k, torch.zeros(1, 16, 1, 8)), 1)
        windows = torch.ones(1, dtype=torch.int32)
        blocks, _ = hierarchical_topk(q[:, -16:], k, windows, 8, block_m=16, block_n=16)
        # Runs of 4 blocks, groups of 4: the best two runs are the 8 best blocks.
        want = {int(b) * 4 + i for b in scores.topk(2).indices for i in range(4)}
        assert set(blocks[0, 0, 0].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("top", [1, 3, 8])
def test_hip_evaluates_few_blocks_and_is_dense_below_its_budget(top: int) -> None:
    q, k = _pair(1, 400, 400)
    windows = torch.full((4,), 20, dtype=torch.int32)
    blocks, scored = hierarchical_topk(q, k, windows, top, **SMALL)
    for r in range(blocks.shape[2]):
        candidates = max(r * 16 - 20 + 1, 0) // 16
        assert (blocks[0, :, r].sum(-1) == min(top, candidates)).all()
        rounds = math.ceil(math.log2(candidates / top)) if candidates > top else 0
        assert (scored[0, :, r] <= 2 * top * rounds).all()
    assert hip_index(q, k, 25, **SMALL).density([400], [400]) == 1.0


def test_hip_finds_a_planted_needle_more_often_than_chance() -> None:
    found = 0
    trials = 40
    for trial in range(trials):
        q, k = _pair(1, 512, 512, h=1, g=1, size=1.0)
        place = 16 * (trial % 25)
        # A needle of a few blocks, as text is: its neighbours score well too.
        k[0, place : place + 64] += 2.0 * q[0, -16:].mean(1).mean(0)
        k[0, place + 16 : place + 32] += 2.0 * q[0, -16:].mean(1).mean(0)
        blocks, _ = hierarchical_topk(q[:, -16:], k, torch.ones(1, dtype=torch.int32), 4, **SMALL)
        found += bool(blocks[0, 0, 0, place // 16 + 1])
    assert found > 0.5 * trials  # 4 of 31 blocks are 0.13 by chance


def test_numbers_per_head() -> None:
    q, k = _pair(1, 200, 200)
    options: dict[str, Any] = {"sinks": 1, "window": 1, **SMALL}
    index = vertical_slash_index(q, k, [1, 5, 20, 200], [1, 1, 1, 1], **options)
    masks = index.to_mask([200], [200])[0].sum((1, 2))
    assert masks[0] < masks[1] < masks[2] < masks[3]
    with pytest.raises(ValueError, match="verticals must be one number or one for each of 4"):
        vertical_slash_index(q, k, [1, 2])
