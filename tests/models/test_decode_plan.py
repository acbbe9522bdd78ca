"""Decoding in one call for all layers: when it is taken, and that only time depends on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from openwork import models, ops
from openwork.models import Llama
from openwork.models.decode_plan import DecodePlan
from openwork.quant import quantize_model

from .checkpoints import QWEN, random_model


def _quantized(dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    model = random_model(**changes)
    quantize_model(model, "rtn", bits=4, group_size=32, head_bits=8, progress=False)
    return model.to(dtype)


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the operator."""
    calls: list[int] = []

    def decoder_layers(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape[1])
        return original(x, *rest)

    original = ops.decoder_layers
    monkeypatch.setattr(ops, "decoder_layers", decoder_layers)
    return calls


@torch.no_grad()
def _logits(model: Llama, chunks: list[int], batch: int = 2) -> Tensor:
    tokens = torch.arange(batch * sum(chunks)).view(batch, -1) % 320
    cache = model.new_cache(sum(chunks), batch)
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, QWEN], ids=["llama", "qwen"])
def test_equals_the_layers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    model = _quantized(dtype, **changes)
    calls = _watch(monkeypatch)
    fused = _logits(model, [5, 1, 1, 3])
    assert calls == [5, 1, 1, 3]
    model.layers[1].register_forward_hook(lambda *_: None)
    assert torch.equal(_logits(model, [5, 1, 1, 3]), fused)
    assert len(calls) == 4


def test_long_prompts_go_through_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantized()
    calls = _watch(monkeypatch)
    torch.testing.assert_close(
        _logits(model, [20, 1, 8, 3]), _logits(model, [32]), atol=1e-4, rtol=1e-4
    )
    assert calls == [1, 8, 3]


def test_other_linears_go_through_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = _quantized(), random_model()
    model.layers[1].mlp.down = dense.layers[1].mlp.down
    calls = _watch(monkeypatch)
    _logits(model, [2, 1])
    assert calls == []


@pytest.mark.parametrize("part", ["layers.0", "layers.1.attn.qkv", "layers.1.mlp.down"])
def test_hooks_are_called(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model = _quantized()
    seen: list[str] = []
    hook = model.get_submodule(part).register_forward_pre_hook(lambda *_: seen.append(part))
    calls = _watch(monkeypatch)
    _logits(model, [2, 1, 1])
    assert (len(seen), calls) == (3, [])
    hook.remove()
    _logits(model, [2, 1, 1])
    assert (len(seen), calls) == (3, [2, 1, 1])


def test_a_cache_follows_the_model_that_uses_it() -> None:
    one, two = _quantized(), _quantized(seed=1)
    cache = one.new_cache(8)
    tokens = torch.tensor([[1, 2]])
    with torch.no_grad():
        one(tokens, cache)
        one(tokens, cache)
        mixed = two(tokens, cache)
        held = copy.copy(cache.plan)
        cache.length = 0
        for _ in range(2):
            one(tokens, cache)
        two.layers[0].register_forward_hook(lambda *_: None)  # the same without the operator
        cache.plan = None
        assert torch.equal(two(tokens, cache), mixed)
    assert held is not None
    assert held.layers is two.layers


def test_changes_are_seen_from_the_first_token_on() -> None:
    model, other = _quantized(), _quantized(seed=1)
    cache = model.new_cache(8)
    tokens = torch.tensor([[1, 2]])
    with torch.no_grad():
        before = model(tokens, cache)
        model.layers[0].attn.qkv = other.layers[0].attn.qkv
        cache.length = 0
        after = model(tokens, cache)
        assert not torch.equal(after, before)
        assert torch.equal(after, model(tokens, model.new_cache(8)))


def test_copies_and_saves_of_a_model_in_use() -> None:
    model = _quantized()
    _logits(model, [2, 1])
    assert torch.equal(_logits(copy.deepcopy(model), [2, 1]), _logits(model, [2, 1]))


def test_gradients_do_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantized()
    calls = _watch(monkeypatch)
    model(torch.tensor([[1, 2]]), model.new_cache(2))
    assert calls == []


def test_generation_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantized()
    calls = _watch(monkeypatch)
    assert len(list(models.generate(model, [1, 2, 3], 4))) == 4
    assert calls[-1] == 1


def test_plan_of_a_dense_model_is_not_usable() -> None:
    assert not DecodePlan(random_model().layers).usable
