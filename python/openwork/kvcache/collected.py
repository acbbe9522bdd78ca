"""A prompt that a layer has seen and not taken up yet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Consecutive tokens of a layer.

    Attributes:
        q: ``[b, t, h, d]``, rotated.
        keys: ``[b, t, g, d]``, before rotation; ``rotated`` after it.
        values: ``[b, t, g, dv]``.
    """

    q: Tensor
    keys: Tensor
    rotated: Tensor
    values: Tensor


class Collected:
    """A prompt in the chunks it came in, exactly as they came.

    Attributes:
        starts: ``[b]`` int64: how many of each sequence's first tokens are padding; None: none.
    """

    def __init__(self, starts: Tensor | None) -> None:
        self.starts = starts
        self._chunks: list[Tokens] = []

    @property
    def length(self) -> int:
        """Tokens, padding among them."""
        return sum(chunk.q.shape[1] for chunk in self._chunks)

    @property
    def nbytes(self) -> int:
        tensors = {id(x): x for chunk in self._chunks for x in chunk}
        return sum(x.nbytes for x in tensors.values())

    def add(self, chunk: Tokens) -> None:
        self._chunks.append(chunk)

    def drop(self, n: int) -> None:
        """Forget the last tokens."""
        while n:
            last = self._chunks.pop()
            t = last.q.shape[1]
            if t > n:
                self._chunks.append(Tokens(*(x[:, : t - n] for x in last)))
            n -= min(t, n)

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` be what ``order[i]`` was."""
        self.starts = None if self.starts is None else self.starts[order]
        self._chunks = [Tokens(*(x[order] for x in self.joined()))]

    def joined(self) -> Tokens:
        """All of them; a prompt of one chunk is not copied."""
        if len(self._chunks) > 1:
            self._chunks = [Tokens(*_cat(self._chunks))]
        return self._chunks[0]


def _cat(chunks: list[Tokens]) -> list[Tensor]:
    q, keys, rotated, values = (list(part) for part in zip(*chunks, strict=True))
    # Where keys are stored rotated, a cache may pass them as both.
    same = all(a is b for a, b in zip(keys, rotated, strict=True))
    turned = torch.cat(rotated, 1)
    return [torch.cat(q, 1), turned if same else torch.cat(keys, 1), turned, torch.cat(values, 1)]
