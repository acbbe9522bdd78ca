"""RazorAttention: heads that look anything up keep everything, the others a window and a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.attention.probe import each_layer, row_lse
from openwork.kvcache.eviction import Recency
from openwork.kvcache.paging import trim_streaming
from openwork.kvcache.policy import Held, Kept, LayerPolicy, Prompt, State
from openwork.models import Llama


@dataclass(frozen=True)
class Razor:
    """Streaming heads with a compensation token; the other heads keep everything (RazorAttention).

    What a streaming head drops is replaced by one token of its mean key and value, which counts as
    often as there were tokens: with ``N`` of them, its score is ``scale * q @ k_mean + log N``.

    Attributes:
        retrieval: ``[layers, g]`` bool, true for heads that keep everything; from
            :func:`retrieval_heads`.
        sinks, recent: first and last tokens the other heads keep.
        compensation: False leaves that token out.

    Source: Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    2024.
    """

    retrieval: Tensor
    sinks: int = 4
    recent: int = 256
    compensation: bool = True

    def layer(self, index: int) -> LayerPolicy:
        return _RazorLayer(self, self.retrieval[index])


class _RazorLayer(LayerPolicy):
    def __init__(self, policy: Razor, retrieval: Tensor) -> None:
        self._retrieval = retrieval.view(1, -1, 1)
        self._streaming = Recency(policy.sinks, policy.recent)
        self._gone = Compensation() if policy.compensation else None
        self.stateful = policy.compensation

    def compress(self, prompt: Prompt) -> Kept | None:
        kept = self._streaming.compress(prompt)
        if kept is None:
            return None
        mask = kept.mask | self._retrieval
        if self._gone is not None:
            self._gone.add(prompt.keys, prompt.values, ~mask)
        return Kept(mask)

    def trim(self, held: Held) -> Tensor | None:
        mask = trim_streaming(held, self._retrieval, self._streaming)
        if mask is not None and self._gone is not None:
            self._gone.add(*held.read(), ~mask & (held.places() >= 0))
        return mask

    def elsewhere(self, q: Tensor, scale: float) -> State | None:
        return None if self._gone is None else self._gone.state(q, scale)

    def reorder(self, order: Tensor) -> None:
        if self._gone is not None:
            self._gone.reorder(order)


class Compensation:
    """Mean key and value of the tokens that each head has dropped.

    Exact for a head whose dropped keys are all one vector and whose dropped values are too.
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, keys: Tensor, values: Tensor, dropped: Tensor) -> None:
        """Account for tokens.

        Args:
            keys: ``[b, g, n, d]``.
            values: ``[b, g, n, dv]``.
            dropped: ``[b, g, n]`` bool.
        """
        weight = dropped.double().unsqueeze(-2)
        more = (
            (weight @ keys.masked_fill(~dropped.unsqueeze(-1), 0).double()).squeeze(-2),
            (weight @ values.masked_fill(~dropped.unsqueeze(-1), 0).double()).squeeze(-2),
            dropped.sum(-1).double(),
        )
        before = self._sums or tuple(map(torch.zeros_like, more))
        self._sums = more[0] + before[0], more[1] + before[1], more[2] + before[2]

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` have the means of ``order[i]``."""
        if self._sums is not None:
            keys, values, count = self._sums
            self._sums = keys[order], values[order], count[order]

    def state(self, q: Tensor, scale: float) -> State | None:
        """Attention of ``q [b, t, h, d]`` to the means; None before anything was dropped."""
        if self._sums is None:
            return None
        keys, values, count = self._sums
        mean = count.clamp(min=1).unsqueeze(-1)
        b, t, h, _ = q.shape
        g = keys.shape[1]
        grouped = q.float().view(b, t, g, h // g, -1)
        scores = torch.einsum("btgrd,bgd->btgr", grouped, (keys / mean).float()) * scale
        lse = scores + count.float().log().view(b, 1, g, 1)
        o = (values / mean).to(q.dtype).view(b, 1, g, 1, -1).expand(b, t, g, h // g, -1)
        return State(
            o.masked_fill((count == 0).view(b, 1, g, 1, 1), 0).reshape(b, t, h, -1),
            lse.reshape(b, t, h),
        )


@torch.inference_mode()
def retrieval_heads(
    model: Llama,
    *,
    induction: float = 0.14,
    echo: float = 0.01,
    length: int = 512,
    repeats: int = 4,
    seed: int = 0,
) -> Tensor:
    """Find the heads that look tokens up, on random tokens that are repeated.

    With ``p`` the distance of two repeats and ``A`` the probabilities, a head's echo score is the
    mean of ``A[i, i - p]``, the same token before, and its induction score that of
    ``A[i, i - p + 1]``, the token that came after it.

    Args:
        model: the model.
        induction: share of the query heads to take for their induction scores.
        echo: share to take for their echo scores.
        length: random tokens, ``p``.
        repeats: how often they come, 2 or more.
        seed: of the tokens.

    Returns:
        ``[layers, g]`` bool: true for key heads that a chosen query head reads.

    Raises:
        ValueError: shares outside 0 .. 1, fewer than 2 tokens or repeats, or more tokens than the
            model's context.
    """
    if not (0 <= induction <= 1 and 0 <= echo <= 1 and length >= 2 and repeats >= 2):
        raise ValueError(
            "retrieval_heads: induction and echo in 0 .. 1, length and repeats of at least 2 "
            f"expected, got {induction}, {echo}, {length} and {repeats}"
        )
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=random)
    scores: list[tuple[Tensor, Tensor]] = []

    def observe(index: int, q: Tensor, keys: Tensor, values: Tensor) -> None:
        lse = row_lse(q, keys)
        keys = keys.repeat_interleave(q.shape[2] // keys.shape[2], dim=2)
        echo, induction = (
            _diagonal(q, keys, lse, distance).mean((0, 1)) for distance in (length, length - 1)
        )
        scores.append((echo, induction))

    each_layer(model, tokens.repeat(1, repeats), observe)
    taken = _highest([s[1] for s in scores], induction) | _highest([s[0] for s in scores], echo)
    groups = [s.shape_of(i).kv_heads for s in [model.config] for i in range(s.layers)]
    rows = taken.split([len(s[0]) for s in scores])
    return torch.stack([row.view(g, -1).any(-1) for row, g in zip(rows, groups, strict=True)])


def _diagonal(q: Tensor, keys: Tensor, lse: Tensor, distance: int) -> Tensor:
    """``A[i, i - distance]`` for every query that far in: ``[b, n - distance, h]``."""
    n, d = q.shape[1], q.shape[3]
    scores = (q[:, distance:] * keys[:, : n - distance]).float().sum(-1) / math.sqrt(d)
    return (scores - lse[:, distance:]).exp()


def _highest(scores: list[Tensor], share: float) -> Tensor:
    """True for the ``share`` of all heads with the highest scores."""
    flat = torch.cat(scores)
    order = flat.argsort(descending=True, stable=True)[: math.ceil(share * len(flat))]
    return torch.zeros(len(flat), dtype=torch.bool).index_fill_(0, order, True)
