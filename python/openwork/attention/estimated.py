"""Policies that look at queries and keys before they choose which blocks to visit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from openwork import ops
from openwork.attention.block_topk import block_topk_index
from openwork.attention.flexprefill import flexprefill_index
from openwork.attention.hip import hip_index
from openwork.attention.policy import Visited
from openwork.attention.vertical_slash import vertical_slash_index
from openwork.block_index import BlockIndex


class Estimated:
    """Attends to what :meth:`index` lists."""

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        """What the heads of a layer visit."""
        raise NotImplementedError

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        b, t, n = q.shape[0], q.shape[1], k.shape[1]
        index = self.index(layer, q, k, scale)
        o = ops.block_attention(q, k, v, index, scale=scale)
        return Visited(cast(Tensor, o), index.density([t] * b, [n] * b))


@dataclass(frozen=True)
class VerticalSlash(Estimated):
    """The keys and distances that the last queries attend to most, in every head.

    Attributes:
        verticals, slashes, sinks, window: see :func:`~openwork.attention.vertical_slash_index`.
    """

    verticals: int = 1000
    slashes: int = 6096
    sinks: int = 30
    window: int = 100

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        return vertical_slash_index(
            q, k, self.verticals, self.slashes, sinks=self.sinks, window=self.window, scale=scale
        )


@dataclass(frozen=True)
class BlockTopK(Estimated):
    """The blocks whose mean key is nearest to the mean query, in every head.

    Attributes:
        top, window, sinks: see :func:`~openwork.attention.block_topk_index`.
    """

    top: int = 100
    window: int = 64
    sinks: int = 1

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        return block_topk_index(q, k, self.top, window=self.window, sinks=self.sinks, scale=scale)


@dataclass(frozen=True)
class FlexPrefill(Estimated):
    """As many blocks as hold a share of the attention, of the pattern each head shows.

    Attributes:
        gamma, tau, min_budget: see :func:`~openwork.attention.flexprefill_index`.
        block: queries and keys of a block.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    block: int = 128

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        return flexprefill_index(
            q, k, self.gamma, tau=self.tau, min_budget=self.min_budget, scale=scale,
            block_m=self.block, block_n=self.block,
        )  # fmt: skip


@dataclass(frozen=True)
class HiP(Estimated):
    """The blocks that a tree search finds.

    Attributes:
        top, window, sinks: see :func:`~openwork.attention.hip_index`.
    """

    top: int = 16
    window: int = 256
    sinks: int = 16

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        return hip_index(q, k, self.top, window=self.window, sinks=self.sinks, scale=scale)
