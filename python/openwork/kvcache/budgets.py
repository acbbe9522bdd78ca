"""Which tokens of each head to keep, from a score for each of them.

Scores are ``[b, g, n]`` float32: of sequences, key/value heads and tokens. A token that must stay
scores infinity. Of equal scores the earlier token stays.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_even(scores: Tensor, budget: int) -> Tensor:
    """The ``budget`` highest scores of every head.

    Args:
        scores: ``[b, g, n]`` float32.
        budget: tokens a head keeps; all of them if there are no more.

    Returns:
        ``[b, g, n]`` bool, true for ``min(budget, n)`` tokens of each head.

    Raises:
        ValueError: a budget below 1.

    Example:
        >>> keep_even(torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.3, 0.5]]]), 2).int()
        tensor([[[0, 1, 1],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    _check(scores, budget)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :budget]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def keep_adaptive(scores: Tensor, budget: int, floor: float = 0.2) -> Tensor:
    """The highest scores of all heads together, but some of every head (AdaKV).

    A head keeps its ``floor * budget`` highest scores; the rest of the ``g * budget`` tokens of a
    sequence are those of the highest scores left in any head. So a head that spreads its attention
    holds more than one that concentrates it, and the sum is that of :func:`keep_even`.

    Args:
        scores: ``[b, g, n]`` float32, comparable between heads (softmax probabilities are).
        budget: tokens a head keeps on average.
        floor: share of the budget that every head has for itself, 0 to 1.

    Returns:
        ``[b, g, n]`` bool, true for exactly ``g * min(budget, n)`` tokens of each sequence.

    Raises:
        ValueError: a budget below 1, or a floor outside 0 .. 1.

    Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", 2024.

    Example:
        >>> keep_adaptive(torch.tensor([[[0.9, 0.0, 0.1], [0.3, 0.3, 0.4]]]), 2, floor=0.5).sum(-1)
        tensor([[1, 3]])
    """
    _check(scores, budget)
    check_floor("keep_adaptive", floor)
    b, g, n = scores.shape
    budget = min(budget, n)
    own = keep_even(scores, max(1, int(floor * budget)))
    # Ranked twice rather than raised to infinity: scores that must stay are infinite already.
    by_score = scores.reshape(b, g * n).argsort(dim=-1, descending=True, stable=True)
    own_first = own.view(b, g * n).gather(-1, by_score).int()
    order = by_score.gather(-1, own_first.argsort(dim=-1, descending=True, stable=True))
    keep = torch.zeros(b, g * n, dtype=torch.bool)
    return keep.scatter_(-1, order[:, : g * budget], True).view(b, g, n)


def check_floor(name: str, floor: float) -> None:
    """Raises a ValueError for a share outside 0 .. 1."""
    if not 0 <= floor <= 1:
        raise ValueError(f"{name}: floor must be in 0 .. 1, got {floor}")


def kept_tokens(mask: Tensor) -> Tensor:
    """The numbers of the tokens that a mask keeps.

    Args:
        mask: ``[rows, n]`` bool.

    Returns:
        ``[rows, most]`` int64, rising, filled up with n.

    Example:
        >>> kept_tokens(torch.tensor([[True, False, True], [False, True, False]])).tolist()
        [[0, 2], [1, 3]]
    """
    n = mask.shape[-1]
    tokens = torch.arange(n).where(mask, n).sort(-1).values
    return tokens[:, : int(mask.sum(-1).max()) if mask.numel() else 0]


def _check(scores: Tensor, budget: int) -> None:
    if scores.dim() != 3:
        raise ValueError(f"keep: scores must be [b, g, n], got {list(scores.shape)}")
    if budget < 1:
        raise ValueError(f"keep: budget must be at least 1, got {budget}")
