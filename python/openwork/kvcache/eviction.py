"""Policies that keep the tokens with the highest scores.

A policy is a score for each token of a prompt, infinite for those that must stay, and a budget;
:class:`AdaKV` shares the budgets of heads out anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openwork.kvcache.budgets import check_floor, keep_adaptive, keep_even, kept_tokens
from openwork.kvcache.policy import Held, Kept, LayerPolicy, Prompt


class Scored(Protocol):
    """A policy made of a score and a budget."""

    @property
    def budget(self) -> int:
        """Tokens of a prompt that a head keeps."""

    def scores(self, prompt: Prompt) -> Tensor:
        """``[b, g, n]`` float32, infinite for tokens that must stay."""


class _Eviction(LayerPolicy):
    """Keeps the highest scores of a prompt, and everything that comes after it."""

    def layer(self, index: int) -> LayerPolicy:
        return self

    def compress(self: Scored, prompt: Prompt) -> Kept | None:
        if prompt.length <= self.budget:
            return None
        return Kept(keep_even(self.scores(prompt), self.budget))


@dataclass(frozen=True)
class Recency(_Eviction):
    """The first and the last tokens, also while decoding (StreamingLLM).

    Attributes:
        sinks: first tokens to keep.
        recent: last tokens to keep.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023. There
    keys are rotated by their place in the cache; give the cache ``rotate="place"`` for that, and
    for texts that are longer than the model's context.
    """

    sinks: int = 4
    recent: int = 508

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                "Recency: sinks of at least 0 and recent of at least 1 expected, got "
                f"{self.sinks} and {self.recent}"
            )

    @property
    def budget(self) -> int:
        return self.sinks + self.recent

    def scores(self, prompt: Prompt) -> Tensor:
        b, g, n = prompt.keys.shape[:3]
        place = torch.arange(n, dtype=torch.float32)
        place[: self.sinks] = torch.inf
        return place.expand(b, g, n)

    def trim(self, held: Held) -> Tensor | None:
        return self.trim_heads(held, torch.zeros(1, held.lengths.shape[1], 1, dtype=torch.bool))

    def trim_heads(self, held: Held, others: Tensor) -> Tensor | None:
        """What is kept of the tokens held, where some heads keep all; None for everything.

        Args:
            held: the tokens.
            others: ``[1, g, 1]`` bool, true for heads that keep all.
        """
        if not bool(((held.lengths > self.budget) & ~others.squeeze(-1)).any()):
            return None
        places = held.places()
        first = torch.arange(places.shape[-1]) < self.sinks
        return (places >= 0) & (first | (places < self.recent) | others)


@dataclass(frozen=True)
class SnapKV(_Eviction):
    """What the last queries of the prompt attend to, and its neighbours (SnapKV).

    The score of a token is the probability that the last ``window`` queries attend to it with,
    summed, averaged over the query heads of its key head, and then over ``pool`` neighbouring
    tokens; the window itself stays.

    Attributes:
        budget: tokens of a prompt that a head keeps, the window among them.
        window: last queries that are asked.
        pool: odd width of the average.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024, which
    has a set for each query head: here the heads of a group share one, so that it frees memory.
    """

    budget: int
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        check_window("SnapKV", self.budget, self.window, self.pool)

    def scores(self, prompt: Prompt) -> Tensor:
        return window_scores(prompt.scores(self.window), self.window, self.pool)


@dataclass(frozen=True)
class TOVA(_Eviction):
    """What the last query of the prompt attends to, in the mean of all heads (TOVA).

    Attributes:
        budget: tokens of a prompt to keep, the same ones in all heads.

    Source: Oren et al., "Transformers are Multi-State RNNs", 2024.
    """

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"TOVA: budget must be at least 1, got {self.budget}")

    def scores(self, prompt: Prompt) -> Tensor:
        scores = prompt.scores(1)
        scores = scores.mean(1, keepdim=True).expand_as(scores).clone()
        scores[..., -1] = torch.inf
        return scores


@dataclass(frozen=True)
class Saliency(_Eviction):
    """What the queries of the prompt that see a token attend to it with, on average (ZipCache).

    A sum over queries favours the first tokens, which more queries see.

    Attributes:
        budget: tokens of a prompt that a head keeps.

    Source: He et al., "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token
    Identification", 2024, which asks a sample of the queries, and holds the other tokens in fewer
    bits: see :class:`~openwork.kvcache.MixedPrecision`.
    """

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"Saliency: budget must be at least 1, got {self.budget}")

    def scores(self, prompt: Prompt) -> Tensor:
        return prompt.scores() / torch.arange(prompt.length, 0, -1)


@dataclass(frozen=True)
class H2O:
    """The tokens all queries so far attend to most, and the last ones, also while decoding (H2O).

    The score of a token is the probability that every query since attended to it with, summed;
    what is evicted loses its score.

    Attributes:
        heavy: tokens a head keeps for their scores.
        recent: last tokens it keeps.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", 2023.
    """

    heavy: int
    recent: int

    def __post_init__(self) -> None:
        if self.heavy < 0 or self.recent < 1:
            raise ValueError(
                "H2O: heavy of at least 0 and recent of at least 1 expected, got "
                f"{self.heavy} and {self.recent}"
            )

    @property
    def budget(self) -> int:
        return self.heavy + self.recent

    def scores(self, prompt: Prompt) -> Tensor:
        scores = prompt.scores().clone()
        scores[..., max(0, prompt.length - self.recent) :] = torch.inf
        return scores

    def layer(self, index: int) -> LayerPolicy:
        return _H2OLayer(self)


class _H2OLayer(LayerPolicy):
    """H2O with the scores of the tokens that are held."""

    stateful = True

    def __init__(self, policy: H2O) -> None:
        self._policy = policy
        self._scores: Tensor | None = None  # [b, g, n], 0 past a head's length

    @property
    def nbytes(self) -> int:
        return 0 if self._scores is None else self._scores.nbytes

    def compress(self, prompt: Prompt) -> Kept | None:
        scores = prompt.scores()
        b, g, n = scores.shape
        mask = self._keep(scores, torch.arange(n - 1, -1, -1).expand(b, g, n))
        own = scores if mask is None else _kept(scores, mask)
        every = [own] if self._scores is None else [self._scores, own]
        most = max(x.shape[-1] for x in every)
        self._scores = torch.cat([F.pad(x, (0, most - x.shape[-1])) for x in every])
        return None if mask is None else Kept(mask)

    def trim(self, held: Held) -> Tensor | None:
        scores = held.scores()
        if self._scores is not None:
            scores = scores + F.pad(self._scores, (0, scores.shape[-1] - self._scores.shape[-1]))
        mask = self._keep(scores, held.places())
        self._scores = scores if mask is None else _kept(scores, mask)
        return mask

    def reorder(self, order: Tensor) -> None:
        if self._scores is not None:
            self._scores = self._scores[order]

    def _keep(self, scores: Tensor, places: Tensor) -> Tensor | None:
        """``places`` of the scores' tokens: see :meth:`Held.places`."""
        if scores.shape[-1] <= self._policy.budget:
            return None
        scores = scores.masked_fill(places < self._policy.recent, torch.inf)
        scores = scores.masked_fill(places < 0, -torch.inf)
        return keep_even(scores, self._policy.budget) & (places >= 0)


def _kept(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores where ``mask [b, g, n]`` is true, then zeros."""
    order = kept_tokens(mask.flatten(0, 1)).view(*mask.shape[:2], -1)
    return F.pad(scores, (0, 1)).gather(-1, order)


@dataclass(frozen=True)
class AdaKV(LayerPolicy):
    """Another policy's scores, with more budget for heads that spread their attention (AdaKV).

    Attributes:
        policy: whose scores and budget; that is the mean over the heads of a layer here.
        floor: share of the budget that every head has for itself.

    Source: see :func:`~openwork.kvcache.keep_adaptive`.
    """

    policy: Scored
    floor: float = 0.2

    def __post_init__(self) -> None:
        check_floor("AdaKV", self.floor)

    def layer(self, index: int) -> LayerPolicy:
        return self

    def compress(self, prompt: Prompt) -> Kept | None:
        if prompt.length <= self.policy.budget:
            return None
        scores = self.policy.scores(prompt)
        return Kept(keep_adaptive(scores, self.policy.budget, self.floor))


def window_scores(scores: Tensor, window: int, pool: int) -> Tensor:
    """Scores averaged over ``pool`` neighbours outside the window, infinite inside.

    Args:
        scores: ``[b, g, n]``.
        window: last tokens.
        pool: odd; tokens outside the range count as 0.
    """
    before = scores[..., : scores.shape[-1] - window]
    if before.shape[-1]:
        before = F.avg_pool1d(before, pool, stride=1, padding=pool // 2)
    return F.pad(before, (0, scores.shape[-1] - before.shape[-1]), value=torch.inf)


def check_window(name: str, budget: int, window: int, pool: int) -> None:
    """Check the numbers of a policy that asks the last queries.

    Raises:
        ValueError: a window that is not inside of the budget, or an even pool.
    """
    if not 1 <= window < budget:
        raise ValueError(f"{name}: window must be in 1 .. budget - 1, got {window} of {budget}")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"{name}: pool must be odd and at least 1, got {pool}")
