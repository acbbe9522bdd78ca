"""Prompts of different lengths in one row, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import offsets_of


@dataclass(frozen=True)
class Prepacked:
    """Prompts one behind another, in bins of at most the longest prompt. Made by :func:`prepack`.

    Attributes:
        tokens: ``[total]``: the prompts, bin after bin.
        cu_seqlens: ``[prompts + 1]`` int32: where each begins.
        positions: ``[total]`` int64: of a token in its prompt, from 0: what RoPE needs.
        order: ``[prompts]``: which prompt each sequence is.
        bins: numbers of sequences in each bin.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    order: tuple[int, ...]
    bins: tuple[int, ...]

    def each_bin(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """tokens, cu_seqlens and positions of one bin after another: rows of a forward pass."""
        first = 0
        for count in self.bins:
            offsets = self.cu_seqlens[first : first + count + 1]
            begin, end = int(offsets[0]), int(offsets[-1])
            yield self.tokens[begin:end], offsets - begin, self.positions[begin:end]
            first += count

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Rows of x ``[total, ...]`` (hidden states, keys, values) of each prompt, as views.

        Args:
            x: what a forward pass made of ``tokens``, the bins' results one behind another.

        Raises:
            ValueError: another number of rows.
        """
        if x.shape[0] != len(self.tokens):
            raise ValueError(
                f"unpack: x must have {len(self.tokens)} rows (tokens), got {x.shape[0]}"
            )
        parts = x.split(self.cu_seqlens.diff().tolist())
        place = sorted(range(len(parts)), key=self.order.__getitem__)
        return [parts[i] for i in place]


def prepack(prompts: Sequence[Tensor | Sequence[int]]) -> Prepacked:
    """Pack prompts into as few rows as a greedy pass finds, each as long as the longest prompt.

    First fit of decreasing lengths: within 11/9 of the fewest bins (and 6/9). Attention over
    ``cu_seqlens`` keeps the prompts apart, so that no mask is stored and no token is padding.

    Args:
        prompts: token ids, none empty.

    Returns:
        The packed prompts: never more bins than prompts, and none longer than the longest.

    Raises:
        ValueError: no prompt, or an empty one.

    Source: Zhao et al., "Prepacking: a simple method for fast prefilling and increased throughput
    in large language models", 2024.

    Example:
        >>> packed = openwork.attention.prepack([[1, 2], [3, 4, 5, 6], [7, 8]])
        >>> packed.tokens.tolist(), packed.cu_seqlens.tolist(), packed.bins
        ([3, 4, 5, 6, 1, 2, 7, 8], [0, 4, 6, 8], (1, 2))
        >>> [p.tolist() for p in packed.unpack(packed.tokens)]
        [[1, 2], [3, 4, 5, 6], [7, 8]]
    """
    sequences = [torch.as_tensor(prompt) for prompt in prompts]
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or min(lengths) == 0:
        raise ValueError("prepack: prompts must hold at least one token each, got none")
    capacity = max(lengths)
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if left >= lengths[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= lengths[i]
    order = tuple(i for members in bins for i in members)
    return Prepacked(
        torch.cat([sequences[i] for i in order]),
        offsets_of([lengths[i] for i in order]),
        torch.cat([torch.arange(lengths[i]) for i in order]),
        order,
        tuple(map(len, bins)),
    )
