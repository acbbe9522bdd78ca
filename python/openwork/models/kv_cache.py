"""What a decoder asks of a cache, and its own one: every key and value, as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from openwork.models.config import LlamaConfig
from openwork.models.decode_plan import DecodePlan


class Attend(Protocol):
    """Attention of a layer, with what it has of earlier tokens."""

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend, and take up keys and values.

        Args:
            qkv: ``[b, t, h + 2 g, e]``: query, key and value heads, not rotated yet.
            cos: ``[t, e / 2]`` float32, of the tokens' positions; ``sin`` alike.

        Returns:
            ``[b, t, h e]``.
        """


class LayeredCache(Protocol):
    """A cache that :class:`~openwork.models.Llama` can run with.

    Attributes:
        length: tokens seen, whether they are still held or not.
    """

    length: int

    @property
    def position(self) -> int:
        """By which the next token is rotated: ``length``, unless the cache says otherwise."""

    @property
    def attend(self) -> Sequence[Attend]:
        """The attention of each layer."""

    def reserve(self, batch: int, t: int) -> None:
        """Check that ``t`` more tokens of ``batch`` sequences fit.

        Raises:
            ValueError: they do not.
        """


class KVCache:
    """Keys and values of the tokens so far, in memory allocated once. It takes no gradient.

    Args:
        config: the model's configuration.
        max_len: tokens it can hold.
        batch: sequences, all of one length.
        dtype: of the stored values.

    Attributes:
        length: tokens held. Setting it to a smaller number forgets the later tokens.
        keys: of each layer, ``[batch, kv_heads, max_len, head_dim]``.
        values: alike.
        plan: the model's layers as they were when the first token came; what is done to them before
            the next first token may go unseen.
    """

    def __init__(self, config: LlamaConfig, max_len: int, batch: int, dtype: torch.dtype) -> None:
        if max_len < 1 or batch < 1:
            raise ValueError(
                f"KVCache: max_len and batch must be at least 1, got {max_len}, {batch}"
            )
        self.max_len, self.batch, self.length = max_len, batch, 0
        self.plan: DecodePlan | None = None
        heads = [config.shape_of(index).kv_heads for index in range(config.layers)]
        with torch.inference_mode(False):  # so that it may be used in and out of that mode
            whole = torch.empty(2, sum(heads), batch, max_len, config.head_dim, dtype=dtype)
            self.keys, self.values = (
                tuple(part.transpose(0, 1) for part in half.split(heads)) for half in whole
            )

    @property
    def position(self) -> int:
        return self.length

    def reserve(self, batch: int, t: int) -> None:
        """Check that ``t`` more tokens of ``batch`` sequences fit.

        Raises:
            ValueError: the cache is too small, or made for another ``batch``.
        """
        if batch != self.batch:
            raise ValueError(f"KVCache: {self.batch} sequences expected (its batch), got {batch}")
        if self.length + t > self.max_len:
            raise ValueError(
                f"KVCache: room for {self.length + t} tokens needed, got max_len = "
                f"{self.max_len}; make a longer one with new_cache"
            )
