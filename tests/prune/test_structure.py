"""Removing heads and channels: the small model is the masked large one, and it travels to disk."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models.checkpoints import QWEN
from torch import Tensor

import openwork
from openwork import checkpoint
from openwork.errors import FormatError
from openwork.models import LayerShape, Llama, generate
from openwork.models.config import config_from_hf, config_to_hf
from openwork.prune.structure import Kept, remove_units, unit_parameters
from openwork.quant import quantize_model

from .weights import close_logits, model, tokens

# Six query heads in three groups, so that there is something to remove.
GROUPS: dict[str, Any] = {"heads": 6, "kv_heads": 3}


def _kept(seed: int = 0, layers: int = 3, heads: int = 3) -> list[Kept]:
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for _ in range(layers):
        mask = torch.rand(heads, generator=generator) < 0.6
        mask[int(torch.randint(heads, (1,), generator=generator))] = True
        kept.append(Kept(mask, torch.rand(96, generator=generator) < 0.7))
    return kept


def _masked(dense: Llama, kept: list[Kept], means: dict[str, Tensor] | None = None) -> Llama:
    """The dense model with the removed columns of ``o`` and ``down`` at 0."""
    result = copy.deepcopy(dense)
    query = dense.config.heads // dense.config.kv_heads * dense.config.head_dim
    for index, (layer, keep) in enumerate(zip(result.layers, kept, strict=True)):
        for linear, mask, name in (
            (layer.attn.o, keep.heads.repeat_interleave(query), "attn.o"),
            (layer.mlp.down, keep.channels, "mlp.down"),
        ):
            if means is not None:
                lost = linear.weight[:, ~mask] @ means[f"layers.{index}.{name}"][~mask]
                linear.bias = torch.nn.Parameter(lost, requires_grad=False)
            linear.weight[:, ~mask] = 0
    return result


def _means(dense: Llama) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(dense.get_submodule(name).in_features, generator=generator)
        for name, _, attribute in dense.linears()
        if attribute in ("o", "down")
    }


@pytest.mark.parametrize("changes", [GROUPS, GROUPS | QWEN, {"heads": 3, "kv_heads": 3}], ids=str)
@pytest.mark.parametrize("compensated", [False, True])
def test_the_small_model_equals_the_masked_one(changes: dict[str, Any], compensated: bool) -> None:
    dense, kept = model(**changes), _kept()
    means = _means(dense) if compensated else None
    expected = _masked(dense, kept, means)
    remove_units(dense, kept, means)
    # Only sums are in another order.
    close_logits(dense(tokens()), expected(tokens()), expected)
    for layer, keep in zip(dense.layers, kept, strict=True):
        assert layer.attn.qkv.weight.shape[0] < expected.layers[0].attn.qkv.weight.shape[0] or bool(
            keep.heads.all()
        )
        assert layer.mlp.down.weight.shape == (72, int(keep.channels.sum()))


def test_parameters_fall_by_the_units() -> None:
    dense, kept = model(**GROUPS), _kept()
    before = sum(p.numel() for p in dense.parameters())
    remove_units(dense, kept)
    head, channel = unit_parameters(dense.config)
    heads = sum(int((~keep.heads).sum()) for keep in kept)
    channels = sum(int((~keep.channels).sum()) for keep in kept)
    assert before - sum(p.numel() for p in dense.parameters()) == heads * head + channels * channel


def test_removing_twice_is_removing_both() -> None:
    once, twice = model(**GROUPS), model(**GROUPS)
    first, second = _kept(), _kept(seed=1)
    both = [
        Kept(a.heads & (b.heads | ~b.heads), a.channels & b.channels)
        for a, b in zip(first, second, strict=True)
    ]
    remove_units(once, both)
    remove_units(twice, first)
    remove_units(
        twice,
        [
            Kept(torch.ones(int(a.heads.sum()), dtype=torch.bool), b.channels[a.channels])
            for a, b in zip(first, second, strict=True)
        ],
    )
    assert torch.equal(once(tokens()), twice(tokens()))
    assert once.config == twice.config


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [9, 1, 2]], ids=str)
def test_the_cache_follows_the_layers(chunks: list[int]) -> None:
    dense = model(**GROUPS)
    remove_units(dense, _kept(), _means(dense))
    text = tokens(2, 12)
    cache = dense.new_cache(12, batch=2)
    parts = [dense(chunk, cache) for chunk in text.split(chunks, dim=1)]
    close_logits(torch.cat(parts, 1), dense(text), dense)
    heads = [keys.shape[1] for keys in cache.keys]
    assert heads == [layer.kv_heads for layer in dense.layers]


@pytest.mark.parametrize("same", [False, True])
def test_a_small_model_quantizes_and_decodes(same: bool) -> None:
    """Also where all layers lost the same heads, and one operator decodes them all."""
    dense = model(**GROUPS)
    kept = _kept()
    remove_units(dense, [kept[0]] * 3 if same else kept, _means(dense))
    quantize_model(dense, "rtn", bits=8, group_size=32, progress=False)
    text = list(generate(dense, [1, 2, 3], 8, stop=()))
    cache = dense.new_cache(16)
    assert dense(torch.tensor([[1, 2, 3]]), cache, last_only=True).argmax() == text[0]
    assert cache.plan is not None
    assert cache.plan.usable == same


@pytest.mark.parametrize("changes", [GROUPS, GROUPS | QWEN, GROUPS | {"tied_head": True}], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_a_small_model_travels_to_disk(
    tmp_path: Path, changes: dict[str, Any], bits: int | None
) -> None:
    dense = model(**changes)
    remove_units(dense, _kept(), _means(dense))
    if bits is not None:
        quantize_model(dense, "rtn", bits=bits, group_size=32, progress=False)
    checkpoint.save(dense, tmp_path / "m")
    loaded = openwork.load(tmp_path / "m")
    assert loaded.config == dense.config
    assert torch.equal(loaded(tokens()), dense(tokens()))


def test_the_configuration_travels() -> None:
    dense = model(**GROUPS)
    values = config_to_hf(dense.config)
    assert "openwork_layers" not in values
    remove_units(dense, _kept(), _means(dense))
    values = json.loads(json.dumps(config_to_hf(dense.config)))
    assert values["openwork_layers"]["output_bias"] is True
    assert config_from_hf(values, "x") == dense.config


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": [1, 1]},
        {"num_key_value_heads": [1, 1, 4]},
        {"num_key_value_heads": [1, 1, 0]},
        {"num_key_value_heads": [1, 1, True]},
        {"num_key_value_heads": [1, 1, "2"]},
        {"num_key_value_heads": 3},
        {"intermediate_size": [10, 10, 97]},
        {"intermediate_size": [10, 10, 2**70]},
        {"intermediate_size": None},
        {"output_bias": 1},
    ],
    ids=str,
)
def test_senseless_sizes_are_refused(change: dict[str, Any]) -> None:
    dense = model(**GROUPS)
    remove_units(dense, _kept())
    values = config_to_hf(dense.config)
    values["openwork_layers"] |= change
    with pytest.raises(FormatError, match=r"x: .*expected, got"):
        config_from_hf(values, "x")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (_kept()[:2], "remove_units: kept must be of 3 layers, got 2"),
        (
            [*_kept()[:2], Kept(torch.zeros(3, dtype=torch.bool), torch.ones(96) > 0)],
            "remove_units: heads of layer 2 must be [3] bool and keep one at least, got [3] "
            "torch.bool that keeps 0",
        ),
        ([*_kept()[:2], Kept(torch.ones(3) > 0, torch.ones(96))], "channels of layer 2"),
        ([*_kept()[:2], Kept(torch.ones(4) > 0, torch.ones(96) > 0)], "got [4]"),
    ],
)
def test_masks_that_do_not_fit_are_named(kept: list[Kept], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        remove_units(model(**GROUPS), kept)


def test_a_quantized_model_is_named() -> None:
    dense = model(**GROUPS)
    quantize_model(dense, "rtn", bits=4, group_size=32, progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv must be dense, got LowbitLinear"):
        remove_units(dense, _kept())


def test_shapes_are_the_layers() -> None:
    dense, kept = model(**GROUPS), _kept()
    remove_units(dense, kept)
    assert dense.config.layer_shapes == tuple(
        LayerShape(int(keep.heads.sum()), int(keep.channels.sum())) for keep in kept
    )
    assert [dense.config.heads_of(i) for i in range(3)] == [layer.heads for layer in dense.layers]
