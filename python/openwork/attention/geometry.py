"""Where blocks of queries and keys lie, for all sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.block_index import largest


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """``cu_seqlens`` ``[sequences + 1]`` int32 of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def per_head(name: str, value: int | Sequence[int] | Tensor, heads: int) -> Tensor:
    """``[heads]`` int32 of one value for all heads, or of one each.

    Raises:
        ValueError: another number of values, or a negative one.
    """
    values = torch.as_tensor(value, dtype=torch.int32).flatten()
    if len(values) not in (1, heads):
        raise ValueError(f"{name} must be one number or one for each of {heads} heads, got {value}")
    if int(values.amin()) < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return values.expand(heads).contiguous()


@dataclass(frozen=True)
class Blocks:
    """Blocks of queries and keys of sequences of any lengths, padded to the longest.

    Attributes:
        cu_seqlens_q: ``[sequences + 1]`` int32.
        cu_seqlens_k: alike.
        block_m: queries of a block.
        block_n: keys of a block.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    block_m: int
    block_n: int

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        block_m: int,
        block_n: int,
    ) -> Blocks:
        """Of a batch, or of packed sequences."""
        if cu_seqlens_q is None:
            cu_seqlens_q = offsets_of([q.shape[1]] * q.shape[0])
        if cu_seqlens_k is None:
            cu_seqlens_k = offsets_of([k.shape[1]] * k.shape[0])
        return Blocks(cu_seqlens_q, cu_seqlens_k, block_m, block_n)

    @property
    def q_lengths(self) -> Tensor:
        return self.cu_seqlens_q.diff().long()

    @property
    def k_lengths(self) -> Tensor:
        return self.cu_seqlens_k.diff().long()

    def last_positions(self) -> Tensor:
        """``[sequences, rows]``: of each row's last query; -1 past a shorter sequence."""
        ends = torch.arange(1, self._most(self.q_lengths, self.block_m) + 1) * self.block_m
        q, k = self.q_lengths[:, None], self.k_lengths[:, None]
        last = k - q + torch.minimum(ends, q) - 1
        return torch.where(ends - self.block_m < q, last, -1)

    def visible(self) -> Tensor:
        """``[sequences, rows, key blocks]`` bool: blocks not all behind a row's last query."""
        begins = torch.arange(self._most(self.k_lengths, self.block_n)) * self.block_n
        return begins <= self.last_positions()[..., None]

    def inside(self) -> Tensor:
        """``[sequences, max_k]`` bool: keys of the sequence."""
        longest = int(self.k_lengths.amax()) if len(self.k_lengths) else 0
        return torch.arange(longest) < self.k_lengths[:, None]

    @staticmethod
    def _most(lengths: Tensor, block: int) -> int:
        return -(-int(lengths.amax()) // block) if len(lengths) else 0


def mark_largest(scores: Tensor, budgets: Tensor, *, by_mass: bool = False) -> Tensor:
    """:func:`openwork.ops.largest` along the last dimension of scores ``[..., n]``.

    ``budgets`` broadcasts to ``[...]``.
    """
    rows = budgets.float().expand(scores.shape[:-1]).reshape(-1)
    return largest(scores.flatten(0, -2), rows, by_mass=by_mass).view(scores.shape)


def block_products(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """``scale * q . k`` of means, ``[s, h, rows, d]`` and ``[s, g, blocks, d]``.

    Returns:
        ``[s, h, rows, blocks]``.
    """
    s, h, rows, d = q_means.shape
    g = k_means.shape[1]
    grouped = q_means.reshape(s, g, h // g * rows, d)
    return (scale * (grouped @ k_means.mT)).view(s, h, rows, k_means.shape[2])
