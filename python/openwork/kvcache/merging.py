"""Folding tokens that are dropped into tokens that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openwork.kvcache.budgets import keep_even
from openwork.kvcache.eviction import check_window, window_scores
from openwork.kvcache.policy import Kept, LayerPolicy, Prompt


def merge_tokens(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    centres: Tensor,
    merged: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Add each merged token to the centre whose key points most nearly its way.

    With ``C`` a centre and the tokens that go to it, and ``w`` their scores over the sum of them::

        direction = sum_C w k / |k|
        key       = direction / |direction| * sum_C w |k|      value = sum_C w v

    A merged token goes to the centre of the largest cosine if that is above ``threshold``, and
    nowhere otherwise (the zero class), so every head does the same work whatever its keys.

    Args:
        keys: ``[b, g, n, d]``.
        values: ``[b, g, n, dv]``.
        scores: ``[b, g, n]`` float32, not negative; weights of a merge.
        centres: ``[b, g, n]`` bool, the tokens that stay.
        merged: ``[b, g, n]`` bool, of other tokens.
        threshold: -1 to 1; at 1 nothing is merged.

    Returns:
        Keys and values, of which those of centres differ from the arguments.

    Source: Li et al., "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression",
    2024.
    """
    to, is_to = _places(centres)
    source, is_source = _places(merged)
    if to.shape[-1] == 0 or source.shape[-1] == 0:
        return keys, values
    norms = keys.float().norm(dim=-1)
    directions = F.normalize(keys.float(), dim=-1)
    cosines = _rows(directions, source) @ _rows(directions, to).transpose(-1, -2)
    cosine, nearest = cosines.clamp(max=1).masked_fill(~is_to.unsqueeze(-2), -2).max(-1)
    zero_class = to.shape[-1]
    nearest = nearest.where(is_source & (cosine > threshold), zero_class)

    tokens = torch.cat((to, source), dim=-1)
    group = torch.cat((torch.arange(zero_class).expand_as(to), nearest), dim=-1)
    # Scores of 0 would leave a centre without a direction.
    weight = scores.gather(-1, tokens).clamp(min=torch.finfo(torch.float32).tiny)
    parts = torch.cat((directions, norms.unsqueeze(-1), values.float()), dim=-1)
    parts = torch.cat((_rows(parts, tokens), torch.ones_like(weight).unsqueeze(-1)), dim=-1)
    parts = parts * weight.unsqueeze(-1)
    sums = parts.new_zeros(*to.shape[:-1], zero_class + 1, parts.shape[-1])
    sums.scatter_add_(-2, group.unsqueeze(-1).expand_as(parts), parts)
    sums = sums[..., :zero_class, :]
    mean = sums[..., :-1] / sums[..., -1:]
    d = keys.shape[-1]
    new_keys = F.normalize(mean[..., :d], dim=-1) * mean[..., d : d + 1]

    # A centre alone stays as it is, to the last bit.
    joined = torch.zeros_like(is_to).new_zeros(*to.shape[:-1], zero_class + 1)
    joined = joined.scatter_(-1, nearest, True)[..., :zero_class] & is_to
    return _replaced(keys, to, new_keys, joined), _replaced(values, to, mean[..., d + 1 :], joined)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``mask [b, g, n]`` is true, in order: ``[b, g, most]``, and which of them are real."""
    most = int(mask.sum(-1).max()) if mask.numel() else 0
    order = mask.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
    return order, mask.gather(-1, order)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """``x [b, g, n, d]`` at ``places [b, g, m]``."""
    return x.gather(-2, places.unsqueeze(-1).expand(*places.shape, x.shape[-1]))


def _replaced(x: Tensor, places: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """A copy of ``x`` with ``rows`` at those ``places`` where ``mask`` is true."""
    index = places.unsqueeze(-1).expand(*places.shape, x.shape[-1])
    rows = rows.to(x.dtype).where(mask.unsqueeze(-1), _rows(x, places))
    return x.scatter(-2, index, rows)


@dataclass(frozen=True)
class EMS(LayerPolicy):
    """The highest scores stay, the next ones are folded into them, the rest goes (EMS).

    The score of a token is the larger of what the last ``window`` queries and what all queries of
    the prompt attend to it with, the second scaled to the mean of the first; both are averaged over
    ``pool`` neighbours. ``budget`` tokens of each head stay, the window among them;
    ``merge_ratio * budget`` more are merged by :func:`merge_tokens`.

    Attributes:
        budget: tokens of a prompt that a head keeps.
        merge_ratio: tokens that are merged, of the budget.
        threshold: cosine of keys above which two tokens may merge.
        window, pool: see :class:`~openwork.kvcache.SnapKV`.

    Source: see :func:`merge_tokens`; thresholds and ratios are left to the user there and here.
    """

    budget: int
    merge_ratio: float = 1.0
    threshold: float = 0.6
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        check_window("EMS", self.budget, self.window, self.pool)
        if self.merge_ratio < 0 or not -1 <= self.threshold <= 1:
            raise ValueError(
                "EMS: merge_ratio of at least 0 and threshold in -1 .. 1 expected, got "
                f"{self.merge_ratio} and {self.threshold}"
            )

    def layer(self, index: int) -> LayerPolicy:
        return self

    def scores(self, prompt: Prompt) -> Tensor:
        """``[b, g, n]`` float32, infinite in the window."""
        local, every = prompt.scores(self.window), prompt.scores()
        tiny = torch.finfo(torch.float32).tiny
        before = slice(None, prompt.length - self.window)
        scale = local[..., before].mean(-1, keepdim=True) / every[..., before].mean(
            -1, keepdim=True
        ).clamp(min=tiny)
        return window_scores(torch.maximum(local, every * scale), self.window, self.pool)

    def compress(self, prompt: Prompt) -> Kept | None:
        if prompt.length <= self.budget:
            return None
        scores = self.scores(prompt)
        centres = keep_even(scores, self.budget)
        # Ranked from here on: those that stay come first, since they score highest.
        merged = keep_even(scores, self.budget + round(self.merge_ratio * self.budget)) & ~centres
        # The window is infinite for the ranking alone: there it takes up tokens like any other.
        weights = scores.where(scores.isfinite(), prompt.scores(self.window))
        keys, values = merge_tokens(
            prompt.keys, prompt.values, weights, centres, merged, self.threshold
        )
        return Kept(centres, keys, values)
