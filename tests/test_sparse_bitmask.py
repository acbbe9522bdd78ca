"""Files in the removed sparse formats of compressed-tensors, written here with numpy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from models.checkpoints import checkpoint_tensors, random_model, write_tokenizer
from models.damage import EXTREME, FUZZ, JSON_PIECES, Damage, damaged, damages, safetensors_header

import openwork
from openwork.errors import FormatError
from openwork.models.config import config_to_hf
from openwork.prune import prune_model

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")


def _pack_bits(keep: np.ndarray) -> np.ndarray:
    """One bit a place, columns from the lowest bit of each byte up, in loops."""
    rows = keep.reshape(-1, keep.shape[-1])
    packed = np.zeros((len(rows), -(-rows.shape[1] // 8)), dtype=np.uint8)
    for r, row in enumerate(rows):
        for c in np.flatnonzero(row):
            packed[r, c // 8] |= 1 << (c % 8)
    return packed.reshape(*keep.shape[:-1], -1)


def _keep_two_of_four(weight: np.ndarray) -> np.ndarray:
    keep = np.zeros(weight.shape, dtype=bool)
    for row, mask in zip(weight, keep, strict=True):
        for begin in range(0, len(row), 4):
            order = sorted(range(begin, begin + 4), key=lambda c, row=row: -abs(row[c]))
            mask[order[:2]] = True
    return keep


def _store(name: str, weight: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    if kind == "sparse-24-bitmask":
        keep = _keep_two_of_four(weight)
        return {
            f"{name}.shape": np.array(weight.shape, dtype=np.int64).reshape(-1, 1),
            f"{name}.bitmask": _pack_bits(keep),
            f"{name}.compressed": weight[keep].reshape(len(weight), -1),
        }
    keep = weight != 0
    counts = np.atleast_1d(keep.sum(-1))
    return {
        f"{name}.shape": np.array(weight.shape, dtype=np.int64),
        f"{name}.bitmask": _pack_bits(keep),
        f"{name}.compressed": weight[keep],
        f"{name}.row_offsets": (np.cumsum(counts) - counts).astype(np.int64),
    }


def _sparse_model(seed: int = 0, **changes: Any) -> openwork.models.Llama:
    # Rows of 68 and 96: neither a whole number of bytes in both.
    model = random_model(seed, **{"hidden_size": 68, "layers": 1} | changes)
    prune_model(model, "magnitude", pattern="2:4", progress=False)
    return model


def _write(
    model: openwork.models.Llama,
    directory: Path,
    kind: str,
    *,
    key: str = "quantization_config",
    early: bool = False,
    everything: bool = False,
) -> Path:
    """Linears stored sparse; with ``everything`` also embedding, norms and head."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in checkpoint_tensors(model).items():
        if name.endswith(".weight") and ("_proj" in name or everything):
            prefix = name if early else name.removesuffix(".weight")
            tensors |= _store(prefix, tensor.numpy(), kind)
        else:
            tensors[name] = tensor.numpy()
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": {
            "format": kind,
            "global_sparsity": 0.5,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
            "ignore": ["lm_head"],
        },
    }
    values = config_to_hf(model.config) | {key: section}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def _assert_same(loaded: openwork.models.Llama, expected: openwork.models.Llama) -> None:
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("early", [False, True])
def test_loads(tmp_path: Path, kind: str, key: str, early: bool) -> None:
    model = _sparse_model()
    path = _write(model, tmp_path, kind, key=key, early=early)
    write_tokenizer(path / "tokenizer.json")
    loaded = openwork.load(path)
    _assert_same(loaded, model)
    assert loaded.tokenizer is not None


def test_vectors_may_be_sparse_too(tmp_path: Path) -> None:
    model = _sparse_model()
    model.layers[0].attn_norm[3] = 0
    _assert_same(openwork.load(_write(model, tmp_path, FORMATS[0], everything=True)), model)


def test_biases_and_a_tied_head(tmp_path: Path) -> None:
    model = _sparse_model(family="qwen2", qkv_bias=True, tied_head=True)
    _assert_same(openwork.load(_write(model, tmp_path, FORMATS[1])), model)


def test_kept_zeros_are_zeros(tmp_path: Path) -> None:
    model = _sparse_model()
    model.layers[0].mlp.down.weight[0] = 0
    for kind in FORMATS:
        _assert_same(openwork.load(_write(model, tmp_path / kind, kind)), model)


def test_a_sparse_model_stored_with_its_zeros(tmp_path: Path) -> None:
    model = _sparse_model()
    path = _write(model, tmp_path, FORMATS[0])
    tensors = {name: t.numpy() for name, t in checkpoint_tensors(model).items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"]["sparsity_config"]["format"] = "dense"
    (path / "config.json").write_text(json.dumps(values))
    _assert_same(openwork.load(path), model)


def test_the_dtype_is_chosen_at_load(tmp_path: Path) -> None:
    path = _write(_sparse_model(), tmp_path, FORMATS[1])
    loaded = openwork.load(path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    zeros = loaded.layers[0].mlp.down.weight == 0
    assert 0.5 <= float(zeros.float().mean()) < 0.51


_DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, np.ndarray]


def _set(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[f"{_DOWN}.{name}"] = np.ascontiguousarray(change(tensors[f"{_DOWN}.{name}"]))

    return apply


def _flip(mask: np.ndarray) -> np.ndarray:
    return mask ^ np.eye(1, mask.shape[1], dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (0, lambda t: t.pop(f"{_DOWN}.compressed"), "down_proj.compressed expected, got none"),
        (0, lambda t: t.pop(f"{_DOWN}.shape"), "down_proj.shape of 1 or 2 sizes expected"),
        (0, lambda t: t.pop(f"{_DOWN}.bitmask"), "down_proj.weight [68, 96] expected, got no such"),
        (0, _set("compressed", lambda x: x[:-1]), "values, as"),
        (0, _set("compressed", lambda x: x.astype(np.int32)), "in one of F64, F32, F16, BF16"),
        (0, _set("bitmask", _flip), "values, as"),
        (0, _set("bitmask", lambda x: x.astype(np.int8)), "down_proj.bitmask of uint8 expected"),
        (0, _set("bitmask", lambda x: x[:, :-1]), "down_proj.bitmask for a tensor of [68, 96]"),
        (0, _set("shape", lambda x: x[::-1]), "down_proj.bitmask for a tensor of [96, 68]"),
        (0, _set("shape", lambda x: x + np.array([0, 1])), ".bitmask for a tensor of [68, 97]"),
        (0, _set("shape", lambda x: x - np.array([0, 1])), "[68, 96] expected, got [68, 95]"),
        (0, _set("shape", lambda x: x * 0), "of sizes above 0 expected, got (0, 0)"),
        (0, _set("shape", lambda x: -x), "of sizes above 0 expected, got (-68, -96)"),
        (0, _set("shape", lambda x: x + 2**60), "down_proj.bitmask for a tensor of"),
        (0, _set("shape", lambda x: x.astype(np.float32)), "down_proj.shape of integers expected"),
        (0, _set("row_offsets", lambda x: x + 1), "down_proj.row_offsets as"),
        (0, _set("row_offsets", lambda x: x[:-1]), "down_proj.row_offsets as"),
        (1, _set("compressed", lambda x: x.T), "with half of the columns of [68, 96] expected"),
        (1, _set("bitmask", lambda x: np.full_like(x, 0x0F)), "keeps 2 of every 4 columns"),
    ],
)  # fmt: skip
def test_contradictions_are_named(
    tmp_path: Path, kind: int, change: Callable[[Tensors], None], message: str
) -> None:
    path = _write(_sparse_model(), tmp_path, FORMATS[kind])
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        openwork.load(path)
    assert str(path) in str(caught.value)


def test_bits_after_the_last_column_are_refused(tmp_path: Path) -> None:
    path = _write(_sparse_model(), tmp_path, FORMATS[0])
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bitmask"  # 68 columns in 9 bytes
    tensors[name][5, 8] |= 0x80
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    with pytest.raises(FormatError, match="with zero bits after 68 columns expected, got ones"):
        openwork.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity_config": {"format": "marlin-24"}}, "format sparse-bitmask, sparse-24-bitmask"),
        ({"sparsity_config": {}}, "sparsity_config: format expected, got none"),
        ({"config_groups": {"group_0": {}}}, "and no config_groups expected"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = _write(_sparse_model(), tmp_path, FORMATS[0])
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=re.escape(message)):
        openwork.load(path)


@pytest.fixture(scope="module", params=FORMATS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(_sparse_model(), tmp_path_factory.mktemp("stored"), request.param)


@FUZZ
@given(damage=damages(EXTREME + JSON_PIECES))
def test_damaged_headers_load_or_are_refused(stored: Path, damage: Damage) -> None:
    path = stored / "model.safetensors"
    with damaged(path, damage, safetensors_header(path)):
        _load_or_refuse(stored)


@FUZZ
@given(damage=damages(EXTREME))
def test_damaged_data_loads_or_is_refused(stored: Path, damage: Damage) -> None:
    with damaged(stored / "model.safetensors", damage):
        _load_or_refuse(stored)


@FUZZ
@given(damage=damages(JSON_PIECES))
def test_damaged_configurations_load_or_are_refused(stored: Path, damage: Damage) -> None:
    with damaged(stored / "config.json", damage):
        _load_or_refuse(stored)


def _load_or_refuse(path: Path) -> None:
    try:
        openwork.load(path)
    except FormatError as error:
        assert " expected" in str(error)
        assert str(path) in str(error)
