"""The embedding of a quantized head: its rows, and a tied model in memory and on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from openwork import checkpoint
from openwork.errors import FormatError
from openwork.models import Llama
from openwork.nn import LowbitEmbedding, LowbitLinear
from openwork.ops import pack_lowbit
from openwork.quant import QuantizedTensor, model_bytes, quantize_model, rtn

from .checkpoints import random_model


def _pack(q: QuantizedTensor) -> Any:
    return pack_lowbit(q.codes, q.scales, q.zeros, bits=q.bits, group_size=q.group_size)


def _quantized(head_bits: int = 8, **changes: Any) -> Llama:
    model = random_model(**{"tied_head": True} | changes)
    quantize_model(model, "rtn", bits=4, group_size=32, head_bits=head_bits, progress=False)
    return model


def _tokens() -> Tensor:
    return torch.arange(0, 320, 5).view(2, 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_those_of_the_weight(bits: int, symmetric: bool) -> None:
    q = rtn(torch.randn(33, 72), bits=bits, group_size=16, symmetric=symmetric)
    embedding = LowbitEmbedding(_pack(q))
    ids = torch.randperm(33)
    assert torch.equal(embedding(ids), q.dequantize()[ids])
    assert (embedding.num_embeddings, embedding.embedding_dim) == (33, 72)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_once_to_the_dtype(scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    q = rtn(torch.randn(40, 48), bits=8, group_size=16, scale_dtype=scale_dtype)
    expected = q.dequantize().to(dtype)
    ids = torch.randint(40, (3, 1, 5))
    assert torch.equal(LowbitEmbedding(_pack(q), dtype)(ids), expected[ids])
    moved = LowbitEmbedding(_pack(q)).to(dtype)
    assert torch.equal(moved(ids), expected[ids])
    assert moved(ids[:0]).shape == (0, 1, 5, 48)
    assert moved.state_dict() == {}


def test_an_id_of_no_row_is_refused() -> None:
    embedding = LowbitEmbedding(_pack(rtn(torch.randn(40, 32), bits=8, group_size=32)))
    with pytest.raises(ValueError, match=r"ids must be in 0 \.\. 39, got 40"):
        embedding(torch.tensor([0, 40]))


def test_a_tied_model_stays_tied() -> None:
    dense, model = random_model(tied_head=True), _quantized()
    assert isinstance(model.embed, LowbitEmbedding)
    assert isinstance(model.head, LowbitLinear)
    assert model.embed.weight is model.head.weight
    # Eight bits are nearly lossless: a group of 32 spans 8 standard deviations at most, in 255
    # steps whose error has a standard deviation of 1 / sqrt(12).
    error = model.embed(_tokens()) - dense.embed(_tokens())
    assert error.std() < dense.embed.weight.std() * 8 / 255 / 12**0.5
    # It takes no bytes beside the head.
    untied = _quantized(tied_head=False)
    assert model_bytes(model) == model_bytes(untied) - untied.embed.weight.nbytes


def test_a_copy_shares_its_own_head() -> None:
    model = copy.deepcopy(_quantized())
    assert model.embed.weight is model.head.weight
    before = model.embed(_tokens())
    model.head.weight.packed.fill_(0)
    assert not torch.equal(model.embed(_tokens()), before)


@pytest.mark.parametrize(("changes", "head_bits"), [({"tied_head": False}, 8), ({}, 4), ({}, None)])
def test_otherwise_the_embedding_stays_dense(
    changes: dict[str, Any], head_bits: int | None
) -> None:
    model = _quantized(head_bits, **changes)
    dense = random_model(**{"tied_head": True} | changes)
    assert torch.equal(model.embed.weight, dense.embed.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_says_that_both_are_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _quantized().to(dtype)
    checkpoint.save(model, tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], model.embed(torch.arange(320)))
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["openwork"] == {"embedding": "lm_head"}
    loaded = checkpoint.load(tmp_path / "m", dtype=dtype)
    assert isinstance(loaded.embed, LowbitEmbedding)
    assert loaded.embed.weight is loaded.head.weight
    assert loaded.dtype == dtype
    assert torch.equal(loaded(_tokens()), model(_tokens()))
    assert model_bytes(loaded) == model_bytes(model)
    checkpoint.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(_quantized(), tmp_path / "m")
    return tmp_path / "m"


def _change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_the_rows_in_the_file_are_for_others(saved: Path) -> None:
    expected = checkpoint.load(saved)(_tokens())
    _change_tensors(saved, lambda t: t.pop("model.embed_tokens.weight"))
    assert torch.equal(checkpoint.load(saved)(_tokens()), expected)


def test_without_the_key_the_embedding_is_dense(saved: Path) -> None:
    expected = checkpoint.load(saved)(_tokens())
    _change_config(saved, openwork=None)
    loaded = checkpoint.load(saved)
    assert isinstance(loaded.embed, nn.Embedding)
    assert torch.equal(loaded(_tokens()), expected)


@pytest.mark.parametrize(
    "value", [{"embedding": "model.norm"}, {"embedding": "lm_head", "more": 1}, {}, "lm_head", 0]
)
def test_an_unknown_key_is_refused(saved: Path, value: object) -> None:
    _change_config(saved, openwork=value)
    with pytest.raises(FormatError, match=r"config\.json: openwork = .* expected, got"):
        checkpoint.load(saved)


def test_a_head_that_cannot_be_shared_is_refused(saved: Path) -> None:
    message = r"config\.json: an untied head with lm_head\.weight_packed expected"
    _change_config(saved, tie_word_embeddings=True)
    with pytest.raises(FormatError, match=message):
        checkpoint.load(saved)
    _change_config(saved, tie_word_embeddings=False)

    def make_dense(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        del tensors["lm_head.weight_packed"]

    _change_tensors(saved, make_dense)
    with pytest.raises(FormatError, match=message):
        checkpoint.load(saved)
