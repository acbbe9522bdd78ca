"""RazorAttention: heads that look anything up keep everything, the others a window and a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.attention.policy import retrieval_heads_of
from openwork.attention.probe import each_layer, row_lse
from openwork.kvcache.eviction import Recency
from openwork.kvcache.policy import Held, Kept, LayerPolicy, Prompt, State
from openwork.kvcache.streaming import StreamingLayer
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
        kind = _RazorLayer if self.compensation else StreamingLayer
        return kind(
            retrieval_heads_of("Razor", self.retrieval, index), Recency(self.sinks, self.recent)
        )


class _RazorLayer(StreamingLayer):
    """Streaming heads with a compensation token each."""

    stateful = holds = True

    def __init__(self, retrieval: Tensor, streaming: Recency) -> None:
        super().__init__(retrieval, streaming)
        self._gone = Compensation()

    @property
    def nbytes(self) -> int:
        return self._gone.nbytes

    def compress(self, prompt: Prompt) -> Kept | None:
        kept = super().compress(prompt)
        dropped = prompt.keys.new_zeros(*prompt.keys.shape[:2], 0, dtype=torch.bool)
        if kept is not None:
            dropped = ~kept.mask
        n = dropped.shape[-1]
        self._gone.extend(prompt.rotated[:, :, :n], prompt.values[:, :, :n], dropped)
        return kept

    def trim(self, held: Held) -> Tensor | None:
        mask = super().trim(held)
        if mask is not None:
            self._gone.add(*held.read(), ~mask & (held.places() >= 0))
        return mask

    def elsewhere(self, q: Tensor, scale: float) -> State | None:
        return self._gone.state(q, scale)

    def reorder(self, order: Tensor) -> None:
        self._gone.reorder(order)


class Compensation:
    """Mean key and value of the tokens that each head has dropped.

    Exact for a head whose dropped keys are all one vector and whose dropped values are too.
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, ...] = ()  # [b, g, d], [b, g, dv] and [b, g], float64

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._sums)

    def add(self, keys: Tensor, values: Tensor, dropped: Tensor) -> None:
        """Account for tokens of the sequences that are there.

        Args:
            keys: ``[b, g, n, d]``, rotated.
            values: ``[b, g, n, dv]``.
            dropped: ``[b, g, n]`` bool.
        """
        more = _sums(keys, values, dropped)
        if self._sums:
            more = tuple(a + b for a, b in zip(self._sums, more, strict=True))
        self._sums = more

    def extend(self, keys: Tensor, values: Tensor, dropped: Tensor) -> None:
        """Account for tokens, as in :meth:`add`, of further sequences."""
        more = _sums(keys, values, dropped)
        if self._sums:
            more = tuple(torch.cat(pair) for pair in zip(self._sums, more, strict=True))
        self._sums = more

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` have the means of ``order[i]``."""
        self._sums = tuple(x[order] for x in self._sums)

    def state(self, q: Tensor, scale: float) -> State | None:
        """Attention of ``q [b, t, h, d]`` to the means; None before anything was dropped."""
        if not self._sums or not bool(self._sums[2].any()):
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


def _sums(keys: Tensor, values: Tensor, dropped: Tensor) -> tuple[Tensor, ...]:
    """Of the keys and values of dropped tokens, and their number."""
    weight = dropped.double().unsqueeze(-2)
    keys, values = (
        (weight @ x.masked_fill(~dropped.unsqueeze(-1), 0).double()).squeeze(-2)
        for x in (keys, values)
    )
    return keys, values, dropped.sum(-1).double()


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
