"""The first tokens of each sequence, which a format may keep exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openwork import ops
from openwork.kvcache.policy import State


class FirstTokens:
    """Keys and values of the first tokens, exactly as they came.

    Args:
        sequences: of each sequence keys ``[n, g, d]``, rotated, and values ``[n, g, dv]``; n may
            differ between them.
    """

    def __init__(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._lengths = [len(keys) for keys, _ in sequences]
        keys, values = (torch.cat(side) for side in zip(*sequences, strict=True))
        # Packed into one row, as attention over sequences of different lengths takes them.
        self._keys, self._values = keys.unsqueeze(0), values.unsqueeze(0)
        self._offsets = torch.tensor([0, *self._lengths]).cumsum(0).int()

    @property
    def lengths(self) -> Tensor:
        """``[b]`` int64: tokens of each sequence."""
        return torch.tensor(self._lengths)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def attend(self, q: Tensor, scale: float) -> State:
        """Attention of ``q [b, t, h, d]``, all of whose tokens come later."""
        b, t, h, d = q.shape
        o, lse = ops.block_attention(
            q.reshape(1, b * t, h, d),
            self._keys,
            self._values,
            causal=False,
            scale=scale,
            return_lse=True,
            cu_seqlens_q=torch.arange(0, b * t + 1, t, dtype=torch.int32),
            cu_seqlens_k=self._offsets,
        )
        return State(o.view(b, t, h, -1), lse.view(b, t, h))

    def reordered(self, order: Tensor) -> FirstTokens:
        """Those of a batch whose sequence ``i`` is ``order[i]`` of this one."""
        sequences = self._sequences()
        return FirstTokens([sequences[i] for i in order.tolist()])

    def without(self, drop: Tensor) -> FirstTokens | None:
        """Those that are left without the last ``drop [b]`` of each sequence; None without any."""
        left = [
            (keys[: len(keys) - n], values[: len(keys) - n])
            for (keys, values), n in zip(self._sequences(), drop.tolist(), strict=True)
        ]
        return FirstTokens(left) if any(len(keys) for keys, _ in left) else None

    def _sequences(self) -> list[tuple[Tensor, Tensor]]:
        sides = (x[0].split(self._lengths) for x in (self._keys, self._values))
        return list(zip(*sides, strict=True))
