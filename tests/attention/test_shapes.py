"""Indexes of positions alone, joined heads, and packing of prompts."""

from __future__ import annotations

import pytest
import torch

from openwork.attention import a_shape_index, causal_index, prepack, select_heads

from .dense import check_lists

Q_LENGTHS, K_LENGTHS = [1, 130, 70, 0, 40], [90, 130, 200, 5, 17]


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (128, 48)])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (7, 4), (60, 70), (500, 0)])
def test_a_shape_lists_the_blocks_its_mask_meets(
    block_m: int, block_n: int, window: int, sinks: int
) -> None:
    options = {"window": window, "sinks": sinks, "block_m": block_m, "block_n": block_n}
    index = a_shape_index(Q_LENGTHS, K_LENGTHS, **options)
    check_lists(index, Q_LENGTHS, K_LENGTHS)
    row = 0
    masks = index.to_mask(Q_LENGTHS, K_LENGTHS)
    for sq, sk, listed in zip(Q_LENGTHS, K_LENGTHS, masks, strict=True):
        distance = (sk - sq + torch.arange(sq))[:, None] - torch.arange(sk)
        mask = (distance >= 0) & ((distance < window) | (torch.arange(sk) < sinks))
        assert not (mask & ~listed[0]).any()
        for r in range(0, sq, block_m):
            counted = {int(j) // block_n for j in mask[r : r + block_m].any(0).nonzero()}
            assert int(index.indptr[0, row + 1] - index.indptr[0, row]) == len(counted)
            row += 1


def test_a_window_over_everything_is_dense() -> None:
    index = a_shape_index([300], window=296, sinks=4)
    assert index.density([300], [300]) == 1.0
    assert torch.equal(index.indices, causal_index([300]).indices)


def test_heads_may_differ() -> None:
    index = a_shape_index([200], window=[1, 64, 200], sinks=[0, 1, 0], block_m=16, block_n=16)
    assert index.index_heads == 3
    for x, (window, sinks) in enumerate(((1, 0), (64, 1), (200, 0))):
        one = a_shape_index([200], window=window, sinks=sinks, block_m=16, block_n=16)
        assert torch.equal(index.to_mask([200], [200])[0][x], one.to_mask([200], [200])[0][0])
    with pytest.raises(ValueError, match="sinks must be one number or one for each of 3 heads"):
        a_shape_index([200], window=[1, 2, 3], sinks=[1, 2])
    with pytest.raises(ValueError, match="window must not be negative"):
        a_shape_index([200], window=-1)


def test_select_heads_takes_each_head_from_its_index() -> None:
    lengths = ([33, 70], [40, 70])
    small = {"block_m": 16, "block_n": 16}
    one = a_shape_index(*lengths, window=3, sinks=0, **small)
    many = a_shape_index(*lengths, window=[1, 20, 60, 5], sinks=[9, 0, 0, 30], **small)
    joined = select_heads([one, many], [1, 0, 1, 1])
    check_lists(joined, *lengths)
    sources = [many, one, many, many]
    for s, mask in enumerate(joined.to_mask(*lengths)):
        for x, source in enumerate(sources):
            want = source.to_mask(*lengths)[s]
            assert torch.equal(mask[x], want[x if source is many else 0])


@pytest.mark.parametrize(
    ("choice", "message"), [([0, 2], r"choice must be in 0 \.\. 1"), ([], "choice must be")]
)
def test_select_heads_refuses(choice: list[int], message: str) -> None:
    index = a_shape_index([20])
    with pytest.raises(ValueError, match=f"select_heads: {message}"):
        select_heads([index, index], choice)
    with pytest.raises(ValueError, match="select_heads: indexes must have 1 rows"):
        select_heads([index, a_shape_index([200])], [0, 1])
    with pytest.raises(ValueError, match="select_heads: indexes must have 1 or 2 heads, got 3"):
        select_heads([a_shape_index([20], window=[1, 2, 3])], [0, 0])


@pytest.mark.parametrize("lengths", [[5], [3, 9, 9, 1, 2, 6, 4], [7] * 4, [1, 100, 1, 1]])
def test_prepack_fills_bins_and_gives_every_prompt_back(lengths: list[int]) -> None:
    prompts = [torch.randint(100, (n,)) for n in lengths]
    packed = prepack(prompts)
    assert len(packed.bins) <= len(prompts)
    assert sum(packed.bins) == len(prompts)
    for got, want in zip(packed.unpack(packed.tokens), prompts, strict=True):
        assert torch.equal(got, want)
    for position in packed.unpack(packed.positions):
        assert torch.equal(position, torch.arange(len(position)))
    rows = list(packed.each_bin())
    assert torch.equal(torch.cat([tokens for tokens, _, _ in rows]), packed.tokens)
    for tokens, offsets, positions in rows:
        assert len(tokens) == len(positions) == int(offsets[-1]) <= max(lengths)
        assert int(offsets[0]) == 0
    with pytest.raises(ValueError, match=r"unpack: x must have \d+ rows"):
        packed.unpack(packed.tokens[1:])


def test_packed_attention_equals_that_of_each_prompt() -> None:
    """Masks of an index over packed prompts keep them apart."""
    packed = prepack([torch.arange(n) for n in (30, 70, 12)])
    for _, offsets, _ in packed.each_bin():
        lengths = offsets.diff().tolist()
        for n, mask in zip(lengths, causal_index(lengths).to_mask(lengths, lengths), strict=True):
            assert mask.shape == (1, n, n)
            assert mask[0].tril().equal(torch.ones(n, n, dtype=torch.bool).tril())


def test_prepack_refuses_empty_prompts() -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prepack: prompts must hold at least one token each"):
            prepack(prompts)
