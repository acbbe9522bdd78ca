"""Masked attention in float64, pair by pair: what an index leaves out is counted here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openwork import BlockIndex
from openwork.testing.attention_scores import split


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> list[Tensor]:
    """Causal softmax ``[heads, sq, sk]`` of each sequence; a query without keys has zeros."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    result = []
    for q_s, k_s in zip(split(q, cu_seqlens_q), split(k, cu_seqlens_k), strict=True):
        keys = k_s.double().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        scores = scale * torch.einsum("ihd,jhd->hij", q_s.double(), keys)
        visible = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k_s) - len(q_s))
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        result.append(weights.nan_to_num(0.0))
    return result


def listed_mask(index: BlockIndex, weights: list[Tensor]) -> list[Tensor]:
    """``[index_heads, sq, sk]`` bool of each sequence."""
    lengths = [w.shape[1:] for w in weights]
    return index.to_mask([sq for sq, _ in lengths], [sk for _, sk in lengths])


def covered(index: BlockIndex, weights: list[Tensor]) -> list[Tensor]:
    """``[heads, sq]``: the mass of each query's listed keys; 1 without keys."""
    sums = []
    for w, mask in zip(weights, listed_mask(index, weights), strict=True):
        sums.append((w * mask).sum(-1) + (w.sum(-1) == 0))
    return sums


def check_lists(index: BlockIndex, q_lengths: list[int], k_lengths: list[int]) -> None:
    """What block_attention asks of an index: in range, increasing, no key twice."""
    assert index.indptr[0, 0] == 0
    assert index.indptr[-1, -1] == len(index.indices)
    sizes = [
        sk for sq, sk in zip(q_lengths, k_lengths, strict=True) for _ in range(0, sq, index.block_m)
    ]
    for x in range(index.index_heads):
        if x:
            assert index.indptr[x, 0] == index.indptr[x - 1, -1]
        for r, sk in enumerate(sizes):
            row = index.indices[index.indptr[x, r] : index.indptr[x, r + 1]]
            assert (row.diff() > 0).all()
            assert ((row >= 0) & (row * index.block_n < sk)).all()
            if index.column_indptr is not None and index.columns is not None:
                begin, end = index.column_indptr[x, r : r + 2]
                single = index.columns[begin:end]
                assert (single.diff() > 0).all()
                assert ((single >= 0) & (single < sk)).all()
                assert not torch.isin(single // index.block_n, row).any()
