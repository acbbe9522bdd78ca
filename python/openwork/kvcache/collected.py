"""A prompt that a layer has seen and not taken up yet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openwork.kvcache.policy import Kept


class Tokens(NamedTuple):
    """Consecutive tokens of a layer.

    Attributes:
        q: ``[b, t, h, d]``, rotated; of the last tokens, if t is less than n.
        keys: ``[b, n, g, d]``, before rotation; ``rotated`` after it.
        values: ``[b, n, g, dv]``.
    """

    q: Tensor
    keys: Tensor
    rotated: Tensor
    values: Tensor


class Collected:
    """The tokens of a prompt, exactly as they came.

    Attributes:
        tokens: of all its chunks, or of what :meth:`shrink` left and the last chunk.
        starts: ``[b]`` int64: how many of each sequence's first tokens are padding; None: none.
    """

    def __init__(self, chunk: Tokens, starts: Tensor | None) -> None:
        self.tokens, self.starts = chunk, starts

    @property
    def length(self) -> int:
        """Tokens of a head, padding among them."""
        return self.tokens.values.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in {id(x): x for x in self.tokens}.values())

    def add(self, chunk: Tokens) -> None:
        """Append a chunk."""
        q, keys, rotated, values = (
            torch.cat(pair, 1) for pair in zip(self.tokens, chunk, strict=True)
        )
        # Where keys are stored rotated, a cache may pass them as both.
        same = self.tokens.keys is self.tokens.rotated
        self.tokens = Tokens(q, rotated if same else keys, rotated, values)

    def drop(self, n: int) -> None:
        """Forget the last tokens, at most those with queries."""
        self.tokens = Tokens(*(x[:, : x.shape[1] - n] for x in self.tokens))

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` be what ``order[i]`` was."""
        self.starts = None if self.starts is None else self.starts[order]
        self.tokens = Tokens(*(x[order] for x in self.tokens))

    def shrink(self, kept: Kept) -> None:
        """Hold no more than is kept, and no queries.

        Heads that keep fewer tokens than others hold their newest ones besides.
        """
        n = kept.mask.shape[-1]
        most = int(kept.mask.sum(-1).max())
        # Kept tokens rank above all others, which rank by age.
        rank = torch.arange(n) + n * kept.mask
        places = rank.topk(most, dim=-1).indices.sort(-1).values.unsqueeze(-1)
        _, _, rotated, values = self.tokens
        rows = [
            (x.transpose(1, 2) if new is None else new)
            for x, new in ((rotated, kept.keys), (values, kept.values))
        ]
        keys, values = (
            x.gather(2, places.expand(*places.shape[:3], x.shape[-1])).transpose(1, 2) for x in rows
        )
        self.tokens = Tokens(self.tokens.q[:, :0], keys, keys, values)
