"""Heads that hold the first and last tokens, beside heads that hold everything."""

from __future__ import annotations

from torch import Tensor

from openwork.kvcache.eviction import Recency
from openwork.kvcache.policy import Held, Kept, LayerPolicy, PageChoice, Prompt


class StreamingLayer(LayerPolicy):
    """A layer some of whose heads stream.

    Args:
        retrieval: ``[g]`` bool, true for heads that keep everything.
        streaming: what the others keep.
        pages: which pages steps read; None for all.
    """

    def __init__(
        self, retrieval: Tensor, streaming: Recency, pages: PageChoice | None = None
    ) -> None:
        self._retrieval = retrieval.view(1, -1, 1)
        self._streaming = streaming
        self.pages = pages

    def compress(self, prompt: Prompt) -> Kept | None:
        g = prompt.keys.shape[1]
        if self._retrieval.shape[1] != g:
            raise ValueError(f"retrieval of {g} key heads expected, got {self._retrieval.shape[1]}")
        kept = self._streaming.compress(prompt)
        return None if kept is None else Kept(kept.mask | self._retrieval)

    def trim(self, held: Held) -> Tensor | None:
        return self._streaming.trim_heads(held, self._retrieval)
