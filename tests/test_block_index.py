"""BlockIndex: what it refuses, its mask, and its density against the mask's."""

from __future__ import annotations

import pytest
import torch

from openwork import BlockIndex


def _random_index(q_lengths: list[int], k_lengths: list[int], block_m: int, block_n: int) -> object:
    """Random blocks, and random columns outside of them, for two heads."""
    indptr, indices, column_indptr, columns = [], [], [], []
    for _ in range(2):
        indptr.append([len(indices)])
        column_indptr.append([len(columns)])
        for sq, sk in zip(q_lengths, k_lengths, strict=True):
            for _ in range(0, sq, block_m):
                keep = torch.rand(-(-sk // block_n)) < 0.4
                indices += keep.nonzero().flatten().tolist()
                single = (torch.rand(sk) < 0.1) & ~keep.repeat_interleave(block_n)[:sk]
                columns += single.nonzero().flatten().tolist()
                indptr[-1].append(len(indices))
                column_indptr[-1].append(len(columns))
    as_int = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
    return BlockIndex(
        as_int(indptr), as_int(indices), block_m, block_n, as_int(column_indptr), as_int(columns)
    )


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64), (128, 48)])
def test_density_counts_the_visible_pairs_of_the_mask(block_m: int, block_n: int) -> None:
    q_lengths, k_lengths = [1, 130, 64, 0], [70, 130, 200, 5]
    index = _random_index(q_lengths, k_lengths, block_m, block_n)
    masks = index.to_mask(q_lengths, k_lengths)
    listed = possible = 0
    for mask, sq, sk in zip(masks, q_lengths, k_lengths, strict=True):
        assert mask.shape == (2, sq, sk)
        visible = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
        listed += int((mask & visible).sum())
        possible += 2 * int(visible.sum())
    assert index.density(q_lengths, k_lengths) == listed / possible


def test_density_of_nothing_is_one() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    index = BlockIndex(torch.zeros(3, 1, dtype=torch.int32), empty, 64, 64)
    assert (index.index_heads, index.rows) == (3, 0)
    assert index.density([], []) == 1.0
    assert index.density([0, 0], [0, 9]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 8}, "block_m must be a multiple of 16 in 16 .. 128, got 8"),
        ({"block_n": 144}, "block_n must be a multiple of 16 in 16 .. 128, got 144"),
        ({"indptr": torch.zeros(1, 3)}, "indptr must be int32, got float32"),
        ({"indptr": torch.zeros(3, dtype=torch.int32)}, r"indptr must be \[index_heads, rows \+ 1"),
        ({"indices": torch.zeros(1, 1, dtype=torch.int32)}, r"indices must be \[nnz\], got \[1, 1"),
        ({"columns": None}, "column_indptr and columns must come together"),
        ({"column_indptr": torch.zeros(1, 2, dtype=torch.int32)}, r"must have shape \[1, 3\]"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    none, items = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    right = {"indptr": none, "indices": items, "block_m": 16, "block_n": 16}
    right |= {"column_indptr": none, "columns": items}
    with pytest.raises(ValueError, match=f"^BlockIndex: .*{message}"):
        BlockIndex(**(right | change))


def test_lengths_must_make_the_rows() -> None:
    index = BlockIndex(torch.zeros(1, 3, dtype=torch.int32), torch.zeros(0).int(), 16, 16)
    with pytest.raises(ValueError, match="q_lengths must make 2 blocks of 16 queries, got 3"):
        index.density([33], [33])
