"""Attending to less in long prompts: which policies there are, and what they visit.

A policy takes a layer's rotated queries, keys and values and returns their attention together with
its density, the share of the causal pairs of query and key that it visited. Those of this module
are masks that follow from positions; :mod:`openwork.attention.estimated` has those that look at
queries and keys first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from openwork import ops


class Visited(NamedTuple):
    """Attention of a layer.

    Attributes:
        o: ``[b, t, h, dv]``.
        density: visited pairs over those of dense causal attention, 0 to 1.
    """

    o: Tensor
    density: float


class Policy(Protocol):
    """A way to attend to less."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        """Attend causally, bottom-right.

        Args:
            layer: its number.
            q: ``[b, t, h, d]``, rotated.
            k: ``[b, n, g, d]``, rotated; ``v [b, n, g, dv]``.
            scale: of the scores; None: ``1 / sqrt(d)``.
        """


def check_policy(op: str, policy: object) -> None:
    """Refuse what is no policy for attention, such as one for a cache.

    Raises:
        ValueError: naming ``op``.
    """
    if isinstance(policy, type) or not callable(policy):
        kind = policy if isinstance(policy, type) else type(policy)
        raise ValueError(
            f"{op}: a policy of openwork.attention, such as AShape(), expected, got "
            f"{kind.__module__}.{kind.__name__}{' itself' if kind is policy else ''}"
        )


@dataclass(frozen=True)
class Dense:
    """Everything; to compare with."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        return Visited(cast(Tensor, ops.block_attention(q, k, v, scale=scale)), 1.0)


@dataclass(frozen=True)
class AShape:
    """The first and the last keys: the A-shape of MInference, the mask of StreamingLLM.

    Query ``i`` sees key ``j <= i`` if ``i - j < window`` or ``j < sinks``.

    Attributes:
        sinks: first keys that every query sees.
        window: last keys that a query sees, itself among them.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023. Positions
    stay the original ones here: for rotation by place in the cache, see
    :class:`~openwork.kvcache.Recency`.
    """

    sinks: int = 128
    window: int = 1024

    def __post_init__(self) -> None:
        _check_window("AShape", self.sinks, self.window)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        o = ops.block_attention(q, k, v, window=self.window, sinks=self.sinks, scale=scale)
        density = lambda_density(q.shape[1], k.shape[1], self.sinks, self.window)
        return Visited(cast(Tensor, o), density)


@dataclass(frozen=True)
class LMInfinite:
    """The first and the last keys, the first ones never farther than the window (LM-Infinite).

    The mask of :class:`AShape`; the score of a key behind the window is the one it has at the
    distance ``window``, so no distance the model was not trained on occurs. Two attentions are
    merged: the window, and the sinks outside of it, whose queries are rotated to position
    ``window`` and whose keys to 0.

    Attributes:
        frequencies: ``[d / 2]`` float32, radians a position, from
            :func:`~openwork.models.llama.rope_frequencies`.
        sinks, window: see :class:`AShape`; the window is at most the length of training.

    Source: Han et al., "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language
    Models", 2023.
    """

    frequencies: Tensor
    sinks: int = 16
    window: int = 2048

    def __post_init__(self) -> None:
        _check_window("LMInfinite", self.sinks, self.window)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        t, n = q.shape[1], k.shape[1]
        density = lambda_density(t, n, self.sinks, self.window)
        near = ops.block_attention(q, k, v, window=self.window, scale=scale, return_lse=True)
        if n <= self.window or self.sinks == 0:
            return Visited(near[0], density)
        # Rotations compose: from position i to the window's end, and from j back to 0.
        q = self._rotated(q, self.window - torch.arange(n - t, n))
        sinks = self._rotated(k[:, : self.sinks], -torch.arange(min(self.sinks, n)))
        k = torch.cat((sinks, k[:, self.sinks :]), dim=1)
        far = ops.block_attention(
            q, k, v, window=self.window, sinks=self.sinks, min_distance=self.window, scale=scale,
            return_lse=True,
        )  # fmt: skip
        return Visited(ops.merge_states(*near, *far)[0], density)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = torch.outer(positions.float(), self.frequencies)
        return ops.rope(x, angles.cos(), angles.sin())


@dataclass(frozen=True)
class LServe:
    """Some key heads dense, the others an A-shape: the prefill of LServe and DuoAttention.

    Attributes:
        retrieval: ``[layers, g]`` bool, true for dense heads; for instance from
            :func:`openwork.kvcache.retrieval_heads`.
        sinks, window: of the other heads, see :class:`AShape`.

    Source: Yang et al., "LServe: Efficient Long-sequence LLM Serving with Unified Sparse
    Attention", 2025.
    """

    retrieval: Tensor
    sinks: int = 128
    window: int = 1024

    def __post_init__(self) -> None:
        _check_window("LServe", self.sinks, self.window)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
    ) -> Visited:
        dense = retrieval_heads_of("LServe", self.retrieval, layer)
        b, t, h, d = q.shape
        g = k.shape[2]
        if len(dense) != g:
            raise ValueError(f"LServe: retrieval of {g} key heads expected, got {len(dense)}")
        o = q.new_empty(b, t, g, h // g, v.shape[-1])
        densities = torch.ones(g)
        policies: tuple[tuple[Tensor, Policy], ...] = (
            (dense, Dense()), (~dense, AShape(self.sinks, self.window))
        )  # fmt: skip
        for mask, policy in policies:
            heads = mask.nonzero()[:, 0]
            if len(heads) == 0:
                continue
            own = q.view(b, t, g, h // g, d)[:, :, heads].flatten(2, 3)
            part, density = policy(layer, own, k[:, :, heads], v[:, :, heads], scale=scale)
            o[:, :, heads] = part.view(b, t, len(heads), h // g, -1)
            densities[heads] = density
        return Visited(o.flatten(2, 3), float(densities.mean()))


def retrieval_heads_of(name: str, retrieval: Tensor, layer: int) -> Tensor:
    """The heads of one layer that keep everything.

    Args:
        name: of the policy, for messages.
        retrieval: ``[layers, g]`` bool.
        layer: its number.

    Returns:
        ``[g]`` bool.

    Raises:
        ValueError: another shape or dtype, or too few layers.
    """
    if retrieval.dim() != 2 or retrieval.dtype != torch.bool or len(retrieval) <= layer:
        raise ValueError(
            f"{name}: retrieval must be [layers, g] bool, of more than {layer} layers, got "
            f"{list(retrieval.shape)} {str(retrieval.dtype).removeprefix('torch.')}"
        )
    return retrieval[layer]


def lambda_density(t: int, n: int, sinks: int, window: int) -> float:
    """The share of the causal pairs that a window and sinks leave.

    Args:
        t: queries, the last of ``n`` positions.
        n: keys.
        sinks: first keys that every query sees.
        window: last keys that a query sees.

    Example:
        >>> round(lambda_density(4, 4, sinks=1, window=2), 3)  # 1 + 2 + 3 + 3 of 1 + 2 + 3 + 4
        0.9
    """
    seen = torch.arange(n - t, n) + 1
    visited = seen.clamp(max=window) + (seen - window).clamp(min=0, max=sinks)
    return float(visited.sum() / seen.sum()) if t else 1.0


def _check_window(name: str, sinks: int, window: int) -> None:
    if sinks < 0 or window < 1:
        raise ValueError(
            f"{name}: sinks of at least 0 and a window of at least 1 expected, got {sinks} and "
            f"{window}"
        )
