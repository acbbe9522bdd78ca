"""Policies that keep every page and read a few of them at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from openwork.attention.policy import retrieval_heads_of
from openwork.kvcache.eviction import Recency
from openwork.kvcache.policy import LayerPolicy, PageChoice
from openwork.kvcache.streaming import StreamingLayer


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

    def __post_init__(self) -> None:
        if self.budget < 1 or self.dense_layers < 0:
            raise ValueError(
                "Quest: budget of at least 1 and dense_layers of at least 0 expected, got "
                f"{self.budget} and {self.dense_layers}"
            )

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

    def __post_init__(self) -> None:
        if self.budget < 1 or self.refresh < 1:
            raise ValueError(
                "LServe: budget and refresh of at least 1 expected, got "
                f"{self.budget} and {self.refresh}"
            )

    def layer(self, index: int) -> LayerPolicy:
        return StreamingLayer(
            retrieval_heads_of("LServe", self.retrieval, index),
            Recency(self.sinks, self.recent),
            PageChoice(self.budget, refresh=self.refresh, method="chunks"),
        )
