"""What a policy sees of a layer's tokens, and what it may say about them.

A cache asks the policy of each layer four things::

    compress   once, after a prompt: which of its tokens to keep
    select     before each step: which pages to read
    trim       after each step: which of the tokens held to keep
    elsewhere  at each step: attention to what the policy holds itself

and a policy answers each from keys, values and scores alone; it never reads pages itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt in one layer.

    Attributes:
        keys: ``[b, g, n, d]``, as the cache holds them; ``rotated`` after rotation.
        values: ``[b, g, n, dv]``.
        columns: with w, for each key the sum over the last w queries, or all with 0, of the
            probabilities they attend to it with: ``[b, h, n]`` float32.
    """

    keys: Tensor
    rotated: Tensor
    values: Tensor
    columns: Callable[[int], Tensor]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def scores(self, last: int = 0) -> Tensor:
        """``[b, g, n]``: ``columns`` of each key head, the mean of the query heads that read it."""
        return group_mean(self.columns(min(last, self.length)), self.keys.shape[1])


class Kept(NamedTuple):
    """What is left of a prompt.

    Attributes:
        mask: ``[b, g, n]`` bool, true for tokens that are kept.
        keys, values: to hold for them in place of the prompt's; None for those.
    """

    mask: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """The tokens a layer holds after a step, the step's own ones last.

    Attributes:
        lengths: ``[b, g]`` int64, tokens of each head; ``n`` is the largest of them.
        new: tokens of the step.
        columns: for each token held, the sum over the step's queries of the probabilities they
            attended to it with: ``[b, h, n]`` float32, 0 past a head's length.
        read: keys ``[b, g, n, d]``, rotated, and values ``[b, g, n, dv]``; anything past a head's
            length.
    """

    lengths: Tensor
    new: int
    columns: Callable[[], Tensor]
    read: Callable[[], tuple[Tensor, Tensor]]

    def scores(self) -> Tensor:
        """``columns`` for each key head: ``[b, g, n]``."""
        return group_mean(self.columns(), self.lengths.shape[1])

    def places(self) -> Tensor:
        """``[b, g, n]`` int64: 0 for a head's newest token, 1 for the one before, and so on.

        Negative past a head's length.
        """
        n = int(self.lengths.max())
        return self.lengths.unsqueeze(-1) - 1 - torch.arange(n)


class State(NamedTuple):
    """Attention to a part of the keys, as ``openwork.ops.merge_states`` takes it.

    Attributes:
        o: ``[b, t, h, dv]``.
        lse: ``[b, t, h]`` float32.
    """

    o: Tensor
    lse: Tensor


class PageChoice(NamedTuple):
    """Which pages a step reads.

    Attributes:
        tokens: at most so many for each head, whole pages, the newest among them.
        reduce: how the query heads of a key head agree on a page's bound: "max" or "sum".
        refresh: steps that one choice serves.
        method: of bounding a page: "flat" by its own bounds, "chunks" by the largest bound of its
            pieces of 16 tokens, which is tighter.
    """

    tokens: int
    reduce: Literal["max", "sum"] = "max"
    refresh: int = 1
    method: Literal["flat", "chunks"] = "flat"


class LayerPolicy:
    """The policy of one layer. This one keeps every token and reads it at each step.

    Attributes:
        pages: which pages steps read; None for all.
        stateful: whether it keeps account of tokens between calls.
        holds: whether it holds tokens itself, which :meth:`elsewhere` attends to.
    """

    pages: PageChoice | None = None
    stateful: bool = False
    holds: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds itself."""
        return 0

    def compress(self, prompt: Prompt) -> Kept | None:
        """Which tokens of a prompt to keep; None for all.

        Called once for all sequences, or, where they differ in length, once for each in their
        order: a policy that keeps account of tokens adds these sequences to those it has. A prompt
        may be empty.
        """
        return None

    def trim(self, held: Held) -> Tensor | None:
        """Which of the tokens held to keep, ``[b, g, n]`` bool; None for all."""
        return None

    def elsewhere(self, q: Tensor, scale: float) -> State | None:
        """Attention of ``q [b, t, h, d]`` to what it holds itself; None for nothing."""
        return None

    def reorder(self, order: Tensor) -> None:
        """Sequence ``i`` goes on as ``order[i]`` was, and what is kept account of with it."""


class Policy(Protocol):
    """What a :class:`~openwork.kvcache.Cache` keeps and reads."""

    def layer(self, index: int) -> LayerPolicy:
        """The policy of a layer, with a state of its own where it has one."""


class KeepAll(LayerPolicy):
    """Keep every token and read it at each step."""

    def layer(self, index: int) -> LayerPolicy:
        return self


def check_policy(op: str, policy: object) -> None:
    """Refuse what is no policy for a cache, such as one for prompts.

    Raises:
        ValueError: naming ``op``.
    """
    if isinstance(policy, type) or not hasattr(policy, "layer"):
        kind = policy if isinstance(policy, type) else type(policy)
        raise ValueError(
            f"{op}: a policy of openwork.kvcache, such as SnapKV(budget=1024), expected, got "
            f"{kind.__module__}.{kind.__name__}{' itself' if kind is policy else ''}"
        )


def group_mean(x: Tensor, kv_heads: int) -> Tensor:
    """``[b, h, n] -> [b, g, n]``: the mean of the query heads that share a key head."""
    b, h, n = x.shape
    return x.view(b, kv_heads, h // kv_heads, n).mean(2)
