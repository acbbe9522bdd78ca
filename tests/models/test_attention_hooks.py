"""Attention of a layer replaced: by a prefill, or by a cache of another kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from openwork import generate, ops
from openwork.models import Llama
from openwork.models.kv_cache import Attend
from openwork.models.llama import dense_attention
from openwork.quant import quantize_model

from .checkpoints import random_model


class GrowingCache:
    """Concatenates, and counts what it is asked."""

    def __init__(self, model: Llama) -> None:
        self.length, self.reserved = 0, 0
        self.attend: Sequence[Attend] = [self._layer(layer) for layer in model.layers]

    @property
    def position(self) -> int:
        return self.length

    def reserve(self, batch: int, t: int) -> None:
        self.reserved += t

    def _layer(self, layer: torch.nn.Module) -> Attend:
        h, g = layer.heads, layer.kv_heads
        past: list[Tensor] = []

        def attend(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            qk = ops.rope(qkv[:, :, : h + g], cos, sin)
            past.append(torch.cat((qk[:, :, h:], qkv[:, :, h + g :]), -1))
            keys, values = torch.cat(past, 1).transpose(1, 2).chunk(2, -1)
            return dense_attention(qk[:, :, :h], keys, values)

        return attend


def test_a_cache_attends_for_its_layers(tiny: Llama) -> None:
    tokens = torch.arange(2 * 14).view(2, 14)
    cache = GrowingCache(tiny)
    parts = [tiny(part, cache) for part in tokens.split([9, 1, 4], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), tiny(tokens), atol=1e-5)
    assert (cache.length, cache.reserved) == (14, 14)


def test_generates_with_it(tiny: Llama) -> None:
    expected = list(generate(tiny, [3, 1, 4], 6, stop=()))
    assert list(generate(tiny, [3, 1, 4], 6, stop=(), cache=GrowingCache(tiny))) == expected


def test_low_bit_models_take_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that runs all layers in one call would not ask the cache."""
    model = random_model()
    quantize_model(model, "rtn", bits=4, group_size=32, head_bits=8, progress=False)
    expected = model(torch.tensor([[3, 1, 4]]), model.new_cache(3))
    cache = GrowingCache(model)
    logits = [model(torch.tensor([[token]]), cache) for token in (3, 1, 4)]
    assert torch.allclose(torch.cat(logits, 1), expected, atol=1e-5)


def test_prefill_serves_many_queries_only() -> None:
    model = random_model()
    seen: list[tuple[int, int]] = []

    def prefill(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        seen.append((q.shape[1], keys.shape[2]))
        return dense_attention(q, keys, values)

    model.layers[1].prefill = prefill
    tokens = torch.arange(24)[None]
    expected = random_model()(tokens)
    cache = model.new_cache(24)
    parts = [model(part, cache) for part in tokens.split([10, 1, 2, 11], dim=1)]
    assert seen == [(10, 10), (11, 24)]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)
    model(tokens)
    assert seen[2:] == [(24, 24)]
    assert copy.deepcopy(model).layers[0].prefill is dense_attention
