"""Pruning a whole model in place: reports, patterns by name, resuming, own methods."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.checkpoints import QWEN
from torch import Tensor

from openwork.models import Llama
from openwork.nn import LowbitLinear
from openwork.prune import (
    NM,
    PrunedTensor,
    Unstructured,
    global_magnitude,
    magnitude,
    prune_model,
    sparsegpt,
    wanda,
)
from openwork.prune.masks import Pattern, follows
from openwork.quant import Grid, InputSecondMoment, model_bytes
from openwork.quant.hessian import output_error

from .weights import model, tokens


def _linear(dense: Llama, name: str) -> Tensor:
    return dense.get_submodule(name).get_parameter("weight")


def _first_moment(dense: Llama) -> Tensor:
    """The second moment of what enters the first linear."""
    moment = InputSecondMoment(72)
    handle = moment.attach(dense.layers[0].attn.qkv)
    dense(tokens())
    handle.remove()
    return moment.mean()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:2:4", NM(1, 4)], ids=str)
def test_every_linear_gets_the_pattern(method: str, pattern: str | NM) -> None:
    dense = model(**QWEN)
    report = prune_model(dense, method, pattern=pattern, calibration=tokens(), progress=False)
    parsed = NM.parse(pattern) if isinstance(pattern, str) else pattern
    for name, _, _ in dense.linears():
        assert follows(_linear(dense, name) != 0, parsed), name
    assert report.sparsity == pytest.approx(parsed.sparsity)
    assert [linear.name for linear in report.linears] == [name for name, _, _ in dense.linears()]
    assert dense(tokens()).isfinite().all()


def test_the_report_says_what_happened() -> None:
    dense, original = model(), model()
    report = prune_model(dense, "wanda", pattern="2:4", calibration=tokens(), progress=False)
    first = report.linears[0]
    w, p, h = original.layers[0].attn.qkv.weight, dense.layers[0].attn.qkv.weight, None
    h = _first_moment(original)
    assert torch.equal(p, wanda(w, h.diagonal(), NM(2, 4)).weight)
    assert first.shape == tuple(w.shape)
    assert first.sparsity == 0.5
    # Quotients of sums of positive numbers, added up in blocks: some dozen roundings of each.
    eps = 2.0**-24
    error = float(((p - w).norm() / w.norm()) ** 2)
    assert first.weight_error == pytest.approx(error, rel=64 * eps)
    assert first.output_error == pytest.approx(output_error(w, p, h), rel=w.shape[1] * eps)
    assert first.bytes_dense == w.nbytes
    # Rows of 72: half of the values, and 9 bytes that say which.
    assert first.bytes_sparse == w.nbytes // 2 + 9 * w.shape[0]
    assert report.model_bytes_before == report.model_bytes_after == model_bytes(original)
    assert report.statistics_bytes > 0
    assert report.peak_bytes > report.model_bytes_before


def test_magnitude_needs_no_data_and_ends_the_same_with_it() -> None:
    without, with_data = model(), model()
    blind = prune_model(without, "magnitude", sparsity=0.4, progress=False)
    seen = prune_model(with_data, "magnitude", sparsity=0.4, calibration=tokens(), progress=False)
    for name, _, _ in without.linears():
        assert torch.equal(_linear(without, name), _linear(with_data, name))
    assert all(linear.output_error is None for linear in blind.linears)
    assert all(linear.output_error is not None for linear in seen.linears)
    # A linear's count is rounded to a whole element.
    fewest = min(_linear(without, name).numel() for name, _, _ in without.linears())
    assert blind.sparsity == pytest.approx(0.4, abs=0.5 / fewest)


def test_shares_by_name() -> None:
    dense = model()
    weights = {name: _linear(dense, name) for name, _, _ in dense.linears()}
    shares = global_magnitude(weights, 0.5, floor=0.2)
    report = prune_model(dense, "magnitude", sparsity=shares, progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=0.5 / min(w.numel() for w in weights.values()))
    for linear in report.linears:
        assert linear.sparsity == pytest.approx(shares[linear.name])


def test_the_dense_weights_are_not_written_to() -> None:
    dense = model()
    weight = dense.layers[1].mlp.down.weight
    before = weight.clone()
    prune_model(dense, "magnitude", sparsity=0.5, progress=False)
    assert torch.equal(weight, before)
    assert not torch.equal(dense.layers[1].mlp.down.weight, before)


def test_a_function_of_ones_own() -> None:
    def every_other(weight: Tensor, moment: Tensor, pattern: Pattern) -> PrunedTensor:
        assert isinstance(pattern, Unstructured)
        assert list(moment.shape) == [weight.shape[1]] * 2
        return PrunedTensor.of(weight, (torch.arange(weight.shape[1]) % 2 == 0).expand_as(weight))

    dense = model()
    report = prune_model(dense, every_other, sparsity=0.5, calibration=tokens(), progress=False)
    assert report.sparsity == 0.5
    assert not dense.layers[2].mlp.gate_up.weight[:, 1::2].any()


def test_a_function_of_ones_own_may_do_without_data() -> None:
    def smallest(weight: Tensor, moment: Tensor, pattern: Pattern) -> PrunedTensor:
        assert list(moment.shape) == [0]
        return magnitude(weight, pattern)

    dense = model()
    assert prune_model(dense, smallest, pattern="2:4", progress=False).sparsity == 0.5


def test_with_a_grid_the_linears_are_low_bit_and_sparse() -> None:
    dense = model()
    grid = Grid(4, 32)
    report = prune_model(
        dense, "sparsegpt", pattern="2:4", calibration=tokens(), grid=grid, progress=False
    )
    original = model()
    expected = sparsegpt(
        original.layers[0].attn.qkv.weight, _first_moment(original), NM(2, 4), grid=grid
    )
    linear = dense.layers[0].attn.qkv
    assert isinstance(linear, LowbitLinear)
    with torch.no_grad():
        stored = linear(torch.eye(72)).t()  # int8 compute is exact for one value a row
    # The scale of the 1, 1 / 127, times its code, and that times the weight: two roundings each.
    torch.testing.assert_close(stored, expected.weight, rtol=2.0**-22, atol=0.0)
    assert torch.equal(stored != 0, expected.weight != 0)
    n = len(expected.weight)
    # Per row: 9 bytes of index, 36 values of 4 bits, 3 scales of 2 bytes, 3 zeros of 4 bits.
    assert report.linears[0].bytes_sparse == n * (9 + 18 + 6) + n * 3 // 2
    assert report.model_bytes_after < report.model_bytes_before


@pytest.mark.parametrize("grid", [None, Grid(4, 32), Grid(4, 32, symmetric=True)], ids=str)
def test_an_interrupted_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Grid | None
) -> None:
    options: dict[str, Any] = {
        "pattern": "2:4", "calibration": tokens(), "grid": grid, "progress": False
    }  # fmt: skip
    expected = model()
    first = prune_model(expected, "sparsegpt", **options)
    module = sys.modules["openwork.prune.model"]
    original = module.output_error
    rounds: list[int] = []

    def stop(*args: Any) -> float:
        rounds.append(1)
        if len(rounds) > 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "output_error", stop)
    with pytest.raises(KeyboardInterrupt):
        prune_model(model(), "sparsegpt", **options, resume_dir=tmp_path)
    monkeypatch.undo()
    resumed = model()
    second = prune_model(resumed, "sparsegpt", **options, resume_dir=tmp_path)
    assert second.linears == first.linears
    assert torch.equal(resumed(tokens()), expected(tokens()))
    with pytest.raises(ValueError, match="same options"):
        prune_model(model(), "sparsegpt", **options | {"pattern": "4:8"}, resume_dir=tmp_path)


@pytest.mark.parametrize("method", ["flap", "llm_pruner"])
def test_structured_methods_shrink_the_model(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model(heads=6, kv_heads=3, layers=8)
    report = prune_model(dense, method, sparsity=0.25, calibration=tokens(), progress=False)
    assert report.sparsity == pytest.approx(0.25, abs=0.05)
    # Norms, embedding and head stay.
    assert report.model_bytes_after < 0.85 * report.model_bytes_before
    assert dense.config.layer_shapes
    for linear in report.linears:
        assert linear.bytes_sparse == _linear(dense, linear.name).nbytes
        assert 0 <= linear.weight_error < 1


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magic", {"sparsity": 0.5}, "method must be a function or one of magnitude, wanda"),
        ("wanda", {"sparsity": 0.5}, "calibration must be token ids for 'wanda', got None"),
        ("magnitude", {}, "pattern or sparsity expected, got None and None"),
        ("magnitude", {"pattern": "2:4", "sparsity": 0.5}, "got '2:4' and 0.5"),
        ("magnitude", {"pattern": "5:4"}, "NM: 1 <= n < m <= 32"),
        ("magnitude", {"sparsity": 1.5}, "Unstructured: sparsity must be in 0 .. 1, got 1.5"),
        ("magnitude", {"sparsity": {"a": 0.5}}, "sparsity must name the 12 linears"),
        ("magnitude", {"sparsity": 0.5, "grid": Grid(4, 32)}, "grid must be None for 'magnitude'"),
        ("flap", {"pattern": "2:4", "calibration": tokens()}, "pattern None for 'flap'"),
        (
            "sparsegpt",
            {"sparsity": 0.5, "calibration": tokens(), "grid": Grid(5, 32)},
            "prune_model: bits must be one of 2, 3, 4, 8, got 5",
        ),
    ],
)
def test_bad_options_are_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prune_model(model(), method, **options, progress=False)


def test_a_quantized_model_is_named() -> None:
    dense = model()
    options: dict[str, Any] = {"pattern": "2:4", "calibration": tokens(), "progress": False}
    prune_model(dense, "sparsegpt", **options, grid=Grid(4, 32))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv must be dense, got LowbitLinear"):
        prune_model(dense, "sparsegpt", **options)
