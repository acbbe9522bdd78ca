"""Directories of config.json and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openwork.errors import FormatError
from openwork.models import Llama, Llama3Rope, LlamaConfig, load
from openwork.models.config import config_from_hf, config_to_hf

from .checkpoints import (
    QWEN,
    TINY,
    assert_same_weights,
    random_model,
    write_directory,
    write_tokenizer,
)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, QWEN], ids=str)
def test_round_trip(tmp_path: Path, changes: dict[str, Any], shards: int) -> None:
    model = random_model(**changes)
    loaded = load(write_directory(model, tmp_path, shards=shards))
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tied_head
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_converts_dtypes(tmp_path: Path, tiny: Llama, stored: torch.dtype) -> None:
    path = write_directory(tiny, tmp_path) / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.embed.weight, tiny.embed.weight.to(stored).float())


def test_weights_outlive_their_file(tmp_path: Path, tiny: Llama) -> None:
    loaded = load(write_directory(tiny, tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_same_weights(loaded, tiny)


def test_tokenizer_beside_the_weights(tmp_path: Path, tiny: Llama) -> None:
    write_directory(tiny, tmp_path)
    assert load(tmp_path).tokenizer is None
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("the 10")) == "the 10"


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        LlamaConfig("mistral", 10, 8, 12, 1, 2, 1, 4, 64, tied_head=True),
        LlamaConfig("qwen2", 10, 8, 12, 1, 2, 1, 4, 64, qkv_bias=True, eos_ids=(1, 2)),
        LlamaConfig("llama", 10, 8, 12, 1, 2, 1, 4, 64, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 32)),
    ],
    ids=lambda config: config.family,
)
def test_config_round_trip(config: LlamaConfig) -> None:
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config))), "config.json") == config


def test_gguf_divisors_have_no_config_json() -> None:
    with pytest.raises(ValueError, match="divisors from a GGUF file"):
        config_to_hf(random_model(rope_scaling=(2.0,) * 8).config)


def test_sliding_window_limits_the_context() -> None:
    values = config_to_hf(TINY) | {"sliding_window": 100}
    assert config_from_hf(values, "").context_length == 100
    assert config_from_hf(values | {"use_sliding_window": False}, "").context_length == 2048
    assert config_from_hf(values | {"model_type": "qwen2"}, "").context_length == 2048


def test_rope_parameters_of_transformers_5() -> None:
    values = config_to_hf(TINY)
    del values["rope_theta"], values["rope_scaling"]
    values["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 123.0, "factor": 2, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = config_from_hf(values, "")
    assert config.rope_theta == 123.0
    assert config.rope_scaling == Llama3Rope(2.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type of llama, mistral, qwen2 expected, got 'gpt2'"),
        ({"model_type": None}, "model_type expected, got none"),
        ({"hidden_act": "gelu"}, "hidden_act = 'silu' expected, got 'gelu'"),
        ({"attention_bias": True}, "attention_bias = False expected, got True"),
        ({"hidden_size": "64"}, "hidden_size of type int expected, got '64'"),
        ({"hidden_size": True}, "hidden_size of type int expected, got True"),
        ({"num_hidden_layers": 10**12}, "model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": -1}, "layers must be at least 1, got -1"),
        ({"rms_norm_eps": 10**400}, "norm_eps must be positive and finite, got inf"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'default' or 'llama3' expected, got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor expected, got none"),
        ({"eos_token_id": ["a"]}, r"eos_token_id as token ids expected, got \['a'\]"),
        ({"vocab_size": 321}, r"model.embed_tokens.weight \[321, 64\] expected, got \[320, 64\]"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings of type bool expected"),
    ],
    ids=str,
)
def test_rejects_configurations(
    tmp_path: Path, tiny: Llama, changes: dict[str, Any], message: str
) -> None:
    edit_config(write_directory(tiny, tmp_path), **changes)
    with pytest.raises(FormatError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON expected"),
        ("[]", "a JSON object expected, got list"),
        ('{"model_type": "llama"', "JSON expected"),
        ("[" * 100_000, "JSON expected"),
        ("\xff", "JSON expected"),
    ],
    ids=["empty", "list", "cut", "deep", "latin"],
)
def test_rejects_json(tmp_path: Path, tiny: Llama, text: str, message: str) -> None:
    write_directory(tiny, tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


def test_rejects_missing_tensors(tmp_path: Path, tiny: Llama) -> None:
    path = write_directory(tiny, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"0.self_attn.v_proj.* expected, got no such tensor"):
        load(tmp_path)


def test_rejects_integer_weights(tmp_path: Path, tiny: Llama) -> None:
    path = write_directory(tiny, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"model.norm.weight in one of F64.* got I32"):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_rejects_truncated_safetensors(tmp_path: Path, tiny: Llama, size: int) -> None:
    path = write_directory(tiny, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FormatError, match=r"model\.safetensors: a complete safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map expected, got None"),
        ({"weight_map": {"x": "../model.safetensors"}}, "names of safetensors beside it expected"),
        ({"weight_map": {"x": "/etc/passwd"}}, "names of safetensors beside it expected"),
        ({"weight_map": {"x": ".."}}, "names of safetensors beside it expected"),
        ({"weight_map": {"x": 3}}, "names of safetensors beside it expected"),
    ],
    ids=str,
)
def test_rejects_indices(tmp_path: Path, tiny: Llama, index: dict[str, Any], message: str) -> None:
    write_directory(tiny, tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors"])
def test_missing_files_are_os_errors(tmp_path: Path, tiny: Llama, name: str) -> None:
    (write_directory(tiny, tmp_path, shards=2) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path)


def test_rejects_a_damaged_tokenizer(tmp_path: Path, tiny: Llama) -> None:
    write_directory(tiny, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(FormatError, match=r"tokenizer\.json: a tokenizer expected"):
        load(tmp_path)
