"""Policies that keep every page and read a few of them at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openwork.kvcache.eviction import Recency
from openwork.kvcache.policy import Held, Kept, LayerPolicy, PageChoice, Prompt


class _PagesLayer(LayerPolicy):
    def __init__(self, pages: PageChoice) -> None:
        self.pages = pages


@dataclass(frozen=True)
class Quest:
    """Read the pages whose bounds allow the highest scores (Quest).

    The bound of some keys is ``sum_d max(q_d kmax_d, q_d kmin_d)`` over the largest and smallest
    value they have in each channel, so none of them scores higher. Quest bounds pages of 16 tokens;
    here a page, which is larger, has the largest bound of its pieces of 16, or with "flat" the
    looser one of all its keys. The newest page is always read.

    Attributes:
        budget: tokens read at a step; whole pages.
        dense_layers: first layers, which read everything.
        reduce: how the query heads of a key head agree on a bound.
        method: of bounding a page.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    2024.
    """

    budget: int
    dense_layers: int = 2
    reduce: Literal["max", "sum"] = "max"
    method: Literal["flat", "chunks"] = "chunks"

    def layer(self, index: int) -> LayerPolicy:
        if index < self.dense_layers:
            return LayerPolicy()
        return _PagesLayer(PageChoice(self.budget, self.reduce, method=self.method))


@dataclass(frozen=True)
class LServe:
    """Streaming heads hold the first and last tokens; the others read some of their pages (LServe).

    A page's bound is the largest of those of its pieces of 16 tokens, and a choice of pages serves
    ``refresh`` steps.

    Attributes:
        retrieval: ``[layers, g]`` bool, true for heads that keep everything; for instance from
            :func:`~openwork.kvcache.retrieval_heads`.
        budget: tokens such a head reads at a step; whole pages.
        sinks, recent: tokens the streaming heads hold.
        refresh: steps that one choice of pages serves.

    Source: Yang et al., "LServe: Efficient Long-sequence LLM Serving with Unified Sparse
    Attention", 2025.
    """

    retrieval: Tensor
    budget: int = 4096
    sinks: int = 128
    recent: int = 256
    refresh: int = 4

    def layer(self, index: int) -> LayerPolicy:
        return _StreamingLayer(self, self.retrieval[index])


class _StreamingLayer(LayerPolicy):
    def __init__(self, policy: LServe, retrieval: Tensor) -> None:
        self.pages = PageChoice(policy.budget, refresh=policy.refresh, method="chunks")
        self._retrieval = retrieval.view(1, -1, 1)
        self._streaming = Recency(policy.sinks, policy.recent)

    def compress(self, prompt: Prompt) -> Kept | None:
        kept = self._streaming.compress(prompt)
        return None if kept is None else Kept(kept.mask | self._retrieval)

    def trim(self, held: Held) -> Tensor | None:
        return trim_streaming(held, self._retrieval, self._streaming)


def trim_streaming(held: Held, retrieval: Tensor, streaming: Recency) -> Tensor | None:
    """What heads that stream keep of the tokens held, and the others all; None for everything.

    Args:
        held: the tokens.
        retrieval: ``[1, g, 1]`` bool, true for heads that keep everything.
        streaming: what the others keep.
    """
    too_long = (held.lengths > streaming.budget) & ~retrieval.squeeze(-1)
    if not bool(too_long.any()):
        return None
    places = held.places()
    first = torch.arange(places.shape[-1]) < streaming.sinks
    return (places >= 0) & (first | (places < streaming.recent) | retrieval)
