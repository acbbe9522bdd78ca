"""Linears without zeros: to disk and back, and the choice of what to store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models.checkpoints import random_model
from torch import Tensor

import openwork
from openwork import checkpoint, quant
from openwork.errors import FormatError
from openwork.models import Llama
from openwork.nn import LowbitLinear, NmLinear, SparseLinear
from openwork.prune import ShapeReport, leave_out_zeros, prune_model, speed

LINEARS = ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_ROUNDS", 2)
    monkeypatch.setattr(speed, "_SECONDS", 0.0)


def _pruned(pattern: str | None, dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    # Without a pattern, 70 %: away from what N:M files look like.
    model = random_model(**changes).to(dtype)
    amount: dict[str, Any] = {"sparsity": 0.7} if pattern is None else {"pattern": pattern}
    prune_model(model, "magnitude", progress=False, **amount)
    return model


def _sparse(pattern: str | None, dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    model = _pruned(pattern, dtype, **changes)
    leave_out_zeros(model, pattern, when="always", progress=False)
    return model


def _logits(model: Llama) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24)[None] % 300)


def _size(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def _change(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "16:2:4", "4:8", "3:5", None])
def test_round_trip(tmp_path: Path, pattern: str | None, dtype: torch.dtype) -> None:
    changes = {"family": "qwen2", "qkv_bias": True}
    model = _sparse(pattern, dtype, **changes)
    openwork.save(model, tmp_path)
    loaded = openwork.load(tmp_path, dtype=dtype)
    kind = SparseLinear if pattern in ("3:5", None) else NmLinear
    for name, _, _ in loaded.linears():
        mine, theirs = model.get_submodule(name), loaded.get_submodule(name)
        assert type(mine) is type(theirs) is kind
        assert repr(mine) == repr(theirs)
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize("pattern", ["2:4", None])
def test_other_libraries_see_the_dense_weights(tmp_path: Path, pattern: str | None) -> None:
    dense = _pruned(pattern)
    openwork.save(_sparse(pattern), tmp_path)
    _change(tmp_path, lambda values: values.pop("openwork"))
    state = openwork.load(tmp_path).state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_the_config_describes_the_file(tmp_path: Path) -> None:
    openwork.save(_sparse("2:4", tied_head=True), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    sparsity = values["quantization_config"]["sparsity_config"]
    assert sparsity == {
        "format": "sparse-24-bitmask",
        "global_sparsity": 0.5,
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    }
    assert values["openwork"]["sparse"]["layers.1.mlp.down"] == "2:4"
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.compressed"].shape == (64, 48)


def test_two_of_four_of_bfloat16_takes_9_bytes_of_16(tmp_path: Path) -> None:
    large: dict[str, Any] = {"hidden_size": 256, "ffn_size": 512, "vocab_size": 8}
    openwork.save(_pruned("2:4", torch.bfloat16, **large), tmp_path / "dense")
    openwork.save(_sparse("2:4", torch.bfloat16, **large), tmp_path / "sparse")
    assert _size(tmp_path / "sparse") / _size(tmp_path / "dense") == pytest.approx(9 / 16, abs=0.02)


def test_shapes_may_be_stored_differently(tmp_path: Path) -> None:
    model, sparse = _pruned("2:4"), _sparse("2:4")
    for layer, other in zip(model.layers, sparse.layers, strict=True):
        layer.mlp.down = other.mlp.down
    openwork.save(model, tmp_path)
    loaded = openwork.load(tmp_path)
    assert isinstance(loaded.layers[1].mlp.down, NmLinear)
    assert isinstance(loaded.layers[1].mlp.gate_up, torch.nn.Linear)
    assert torch.equal(_logits(loaded), _logits(model))
    values = json.loads((tmp_path / "config.json").read_text())
    ignored = values["quantization_config"]["sparsity_config"]["ignore"]
    assert "model.layers.0.self_attn.q_proj" in ignored
    assert not any("down_proj" in name for name in ignored)


def test_a_row_may_keep_less_than_the_pattern(tmp_path: Path) -> None:
    model = _pruned("2:4")
    model.layers[0].mlp.down.weight[3] = 0
    leave_out_zeros(model, "2:4", when="always", progress=False)
    openwork.save(model, tmp_path)
    assert torch.equal(_logits(openwork.load(tmp_path)), _logits(model))


def _joint(symmetric: bool = True) -> Llama:
    model = random_model()
    prune_model(
        model,
        "sparsegpt",
        pattern="2:4",
        calibration=torch.arange(96).view(4, 24),
        grid=quant.Grid(4, 32, symmetric),
        progress=False,
    )
    return model


def test_codes_without_zeros(tmp_path: Path) -> None:
    model = _joint()
    before = _logits(model)
    leave_out_zeros(model, "2:4", when="always", progress=False)
    assert torch.allclose(_logits(model), before, rtol=1e-4, atol=1e-4)
    openwork.save(model, tmp_path)
    loaded = openwork.load(tmp_path)
    down = loaded.layers[0].mlp.down
    assert isinstance(down, NmLinear)
    assert down.weight.bits == 4
    assert torch.equal(_logits(loaded), _logits(model))


def test_asymmetric_codes_keep_their_zeros() -> None:
    model = _joint(symmetric=False)
    assert leave_out_zeros(model, "2:4", when="always", progress=False) == ()
    assert isinstance(model.layers[0].mlp.down, LowbitLinear)


def test_beside_quantized_linears_zeros_are_stored(tmp_path: Path) -> None:
    model = _sparse("2:4")
    q = quant.rtn(model.head.weight.detach(), bits=8, group_size=32)
    model.head = LowbitLinear(
        openwork.pack_lowbit(q.codes, q.scales, q.zeros, bits=8, group_size=32)
    )
    openwork.save(model, tmp_path)
    loaded = openwork.load(tmp_path)
    assert isinstance(loaded.layers[0].mlp.down, NmLinear)
    assert torch.equal(_logits(loaded), _logits(model))


def test_model_bytes_count_what_is_held() -> None:
    dense, sparse = _pruned("2:4", torch.bfloat16), _sparse("2:4", torch.bfloat16)
    held = sum(linear.weight.nbytes for linear in sparse.modules() if isinstance(linear, NmLinear))
    weights = sum(dense.get_submodule(name).weight.nbytes for name, _, _ in dense.linears())
    assert quant.model_bytes(sparse) == quant.model_bytes(dense) - weights + held


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sparse": {"layers.0.mlp.down": "1:4"}}, r"layers\.0\.mlp\.down: .*at most 1 of"),
        ({"sparse": {"layers.0.mlp.down": "4:2"}}, r"openwork\.sparse: NM: 1 <= n < m"),
        ({"sparse": {"layers.0.mlp.down": 2}}, r"openwork\.sparse: a pattern expected, got 2"),
        ({"sparse": {"layers.9.mlp.down": "2:4"}}, r"names of linears expected, got 'layers\.9"),
        ({"sparse": {"embed": "2:4"}}, r"names of linears expected, got 'embed'"),
        ({"sparse": ["mlp"]}, r"names and patterns expected, got \['mlp'\]"),
        ({"sparse": {}, "other": 1}, r"openwork = .* expected, got"),
    ],
)
def test_damaged_keys(tmp_path: Path, said: object, message: str) -> None:
    openwork.save(_sparse("2:4"), tmp_path)
    _change(tmp_path, lambda values: values.update(openwork=said))
    with pytest.raises(FormatError, match=message):
        openwork.load(tmp_path)


def test_a_damaged_mask(tmp_path: Path) -> None:
    openwork.save(_sparse("2:4"), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.bitmask"][0, 0] ^= 1
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"down_proj\.compressed of \d+ values"):
        openwork.load(tmp_path)


def test_blocks_have_no_form_in_a_file(tmp_path: Path) -> None:
    model = _pruned("2:4")
    weight = openwork.compress_block_sparse(model.layers[0].mlp.down.weight.detach(), block=16)
    model.layers[0].mlp.down = SparseLinear(weight)
    with pytest.raises(
        ValueError, match=r"save: layers\.0\.mlp\.down must be a linear with a form"
    ):
        checkpoint.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_without_the_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2 of"):
        leave_out_zeros(random_model(), "2:4", progress=False)


def _report(dense: tuple[float, float], sparse: tuple[float, float]) -> ShapeReport:
    return ShapeReport((8, 8), ("a",), 2, 1, dense, sparse, stored_sparse=True)


@pytest.mark.parametrize(
    ("dense", "sparse", "says"),
    [
        ((2.0, 9.0), (1.0, 8.0), "sparse"),
        ((2.0, 9.0), (1.0, 10.0), "sparse; slower at 128 tokens"),
        ((2.0, 9.0), (3.0, 8.0), "dense; sparse is slower at 1 token"),
        ((2.0, 9.0), (3.0, 10.0), "dense; sparse is slower at both"),
        ((2.0, 9.0), (2.01, 8.0), "sparse"),
    ],
)
def test_the_time_of_one_token_decides(
    dense: tuple[float, float], sparse: tuple[float, float], says: str
) -> None:
    assert re.fullmatch(re.escape(says), _report(dense, sparse).recommendation)


@pytest.mark.parametrize("faster", [True, False])
def test_only_what_is_faster_is_replaced(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    times = (2.0, 1.0) if faster else (1.0, 2.0)
    monkeypatch.setattr(speed, "_seconds", lambda *_: times)
    model = _pruned("2:4")
    reports = leave_out_zeros(model, "2:4", progress=False)
    assert sum(len(report.names) for report in reports) == 2 * len(LINEARS)
    for report in reports:
        assert report.stored_sparse == faster
    for name, _, _ in model.linears():
        assert isinstance(model.get_submodule(name), NmLinear) == faster
