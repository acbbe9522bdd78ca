"""Looking at the heads of a model while it reads a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from openwork import ops
from openwork.models import Llama
from openwork.models.kv_cache import Attend

Observer = Callable[[int, Tensor, Tensor, Tensor], None]


def each_layer(model: Llama, tokens: Tensor, observe: Observer) -> None:
    """Run a model densely, and show the heads of each layer.

    Args:
        model: the model.
        tokens: ``[b, n]`` int64.
        observe: called with the layer's number, ``q [b, n, h, d]`` and ``keys [b, n, g, d]``, both
            rotated, and ``values [b, n, g, d]``, before the next layer runs.
    """
    model.hidden(tokens, _Probe(model, observe))


class _Probe:
    """A cache that holds nothing."""

    def __init__(self, model: Llama, observe: Observer) -> None:
        self.length = self.position = 0
        config = model.config
        self.attend: Sequence[Attend] = [
            _attend(index, config.heads_of(index), config.shape_of(index).kv_heads, observe)
            for index in range(config.layers)
        ]

    def reserve(self, batch: int, t: int) -> None:
        pass


def _attend(index: int, h: int, g: int, observe: Observer) -> Attend:
    def attend(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qk = ops.rope(qkv[:, :, : h + g], cos, sin)
        q, keys, values = qk[:, :, :h], qk[:, :, h:], qkv[:, :, h + g :]
        observe(index, q, keys, values)
        return cast(Tensor, ops.block_attention(q, keys, values)).flatten(2)

    return attend


def row_lse(q: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """The log-sum-exp of each query's causal scores, ``[b, n, h]`` float32.

    Args:
        q: ``[b, n, h, d]``.
        keys: ``[b, n, g, d]``.
        scale: of the scores; None: ``1 / sqrt(d)``.
    """
    lse: Tensor = ops.block_attention(q, keys, keys, scale=scale, return_lse=True)[1]
    return lse
