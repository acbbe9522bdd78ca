"""Activation sparsity: thresholds from quantiles, and models that run with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openwork import checkpoint
from openwork.models import Llama
from openwork.nn import ActiveLinear
from openwork.prune import (
    CatsLinear,
    TealLinear,
    leave_out_zeros,
    prune_model,
    set_thresholds,
    skip_columns,
    sparsify_activations,
)
from openwork.prune.activation import MagnitudeHistogram, Place
from openwork.quant import model_bytes, quantize_model

from .weights import model, tokens

METHODS: tuple[Place, ...] = ("teal", "cats")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_a_quantile_is_one_bin_above_the_exact_one(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator) * 3 for size in (1, 700, 299)]
    histogram = MagnitudeHistogram()
    for part in parts:
        histogram.update(part)
    x = torch.cat(parts).abs()
    found = histogram.quantile(share)
    below = int((x < found).sum())
    assert below >= share * 1000
    if share == 0:
        assert found == 0
    else:
        exact = float(x.sort().values[max(int(share * 1000 + 0.5) - 1, 0)])
        assert exact < found <= exact * (1 + 2**-7)


def test_16_bit_values_are_counted_in_their_own_bins() -> None:
    histogram = MagnitudeHistogram()
    histogram.update(torch.tensor([1.0, -1.0, 1.0078125]).bfloat16())
    assert histogram.counts.nonzero().flatten().tolist() == [0x3F80, 0x3F81]


@pytest.mark.parametrize("method", METHODS)
def test_threshold_0_is_the_dense_model_bit_for_bit(method: Place) -> None:
    dense, sparse = model(), model()
    thresholds = sparsify_activations(sparse, tokens(), 0.0, method=method, progress=False)
    assert set(thresholds.values()) == {0.0}
    assert len(thresholds) == (12 if method == "teal" else 3)
    assert torch.equal(sparse(tokens(seed=1)), dense(tokens(seed=1)))


def _shares_below(sparse: Llama, method: Place) -> list[float]:
    """The shares of values below the threshold on the calibration text, by hooks."""
    shares: list[float] = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        values = inputs[0]
        if method == "cats":
            values = F.silu(module.linear(values).chunk(2, -1)[0])
        shares.append(float((values.abs() <= module.threshold).float().mean()))

    for name, _, _ in sparse.linears():
        linear = sparse.get_submodule(name)
        if isinstance(linear, (TealLinear, CatsLinear)):
            linear.register_forward_hook(watch)
    sparse(tokens())
    return shares


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_share_is_met_in_every_layer_of_the_sparse_model(method: Place, share: float) -> None:
    sparse = model()
    sparsify_activations(sparse, tokens(), share, method=method, progress=False)
    shares = _shares_below(sparse, method)
    # The linear that a layer begins with sees what it was calibrated on, and a bin holds about 1 %
    # of the values; those after it see inputs that the layer's own thresholds have changed.
    first = shares if method == "cats" else shares[::4]
    assert all(share - 1e-3 <= found < share + 0.03 for found in first)
    assert all(abs(found - share) < 0.15 for found in shares)


def test_teal_is_the_dense_linear_on_the_masked_input() -> None:
    linear = model().layers[0].attn.qkv
    x = torch.randn(5, 72)
    teal = TealLinear(linear, 0.7)
    x[0, :3] = torch.tensor([0.7, -0.7, 0.70001])
    expected = linear(torch.where(x.abs() <= 0.7, 0.0, x))
    assert torch.equal(teal(x), expected)
    add = torch.randn(5, linear.out_features)
    assert torch.equal(teal(x, add=add.clone()), expected + add)


def test_cats_is_the_dense_block_on_the_masked_gates() -> None:
    mlp = model().layers[0].mlp
    x = torch.randn(5, 72)
    gate, up = CatsLinear(mlp.gate_up, 0.05)(x).chunk(2, -1)
    dense_gate, dense_up = mlp.gate_up(x).chunk(2, -1)
    h = F.silu(dense_gate)
    assert torch.equal(F.silu(gate) * up, torch.where(h.abs() < 0.05, 0.0, h) * dense_up)
    assert (gate == 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_travel(method: Place) -> None:
    sparse, other = model(), model()
    thresholds = sparsify_activations(sparse, tokens(), 0.4, method=method, progress=False)
    set_thresholds(other, thresholds, method=method)
    assert torch.equal(sparse(tokens(seed=1)), other(tokens(seed=1)))
    cache = other.new_cache(32, batch=6)
    parts = [other(part, cache) for part in tokens(seed=1).split([20, 1, 11], dim=1)]
    # An input that rounding takes across a threshold changes by the threshold.
    torch.testing.assert_close(torch.cat(parts, 1), other(tokens(seed=1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_skipped_columns_change_no_more_than_roundings(method: Place, dtype: torch.dtype) -> None:
    masked, skipping = model(), model()
    thresholds = sparsify_activations(masked, tokens(), 0.5, method=method, progress=False)
    set_thresholds(skipping, thresholds, method=method)
    masked, skipping = masked.to(dtype), skipping.to(dtype)
    before = model_bytes(skipping)
    skip_columns(skipping)
    kinds = [type(skipping.get_submodule(name)) for name, _, _ in skipping.linears()]
    assert kinds.count(ActiveLinear) == (12 if method == "teal" else 3)
    # Nothing is held twice; columns are padded to 16 outputs (here 72 to 80).
    assert model_bytes(skipping) <= before * 80 / 72
    # An input that rounding takes across a threshold changes by the threshold: of 2^8 steps between
    # powers of 2 that bfloat16 has, more inputs than of float32.
    bound = 1e-3 if dtype == torch.float32 else 0.05
    expected = masked(tokens(seed=1)).float()
    assert (skipping(tokens(seed=1)) - expected).norm() < bound * expected.norm()
    cache = skipping.new_cache(32, batch=6)
    pieces = tokens(seed=1).split([20, 1, 11], dim=1)
    parts = [skipping(part, cache) for part in pieces]
    assert (torch.cat(parts, 1) - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_low_bit_linears_skip_columns_of_their_codes(bits: int) -> None:
    low = model()
    quantize_model(low, "rtn", bits=bits, group_size=32, compute="float", progress=False)
    set_thresholds(low, {name: 0.3 for name, _, _ in low.linears()}, method="teal")
    expected = low(tokens()[:1, :1])
    skip_columns(low)
    layouts = {low.get_submodule(name).weight.layout for name, _, _ in low.linears()}
    assert {layout.split("_")[0] for layout in layouts} == {f"columns{bits}"}
    bound = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(low(tokens()[:1, :1]), expected, rtol=0, atol=bound)


def test_what_cannot_skip_columns_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="skip_columns: a model with thresholds expected"):
        skip_columns(model())
    sparse = model()
    prune_model(sparse, "magnitude", pattern="2:4", progress=False)
    leave_out_zeros(sparse, "2:4", when="always", progress=False)
    set_thresholds(sparse, {name: 0.3 for name, _, _ in sparse.linears()}, method="teal")
    with pytest.raises(
        ValueError, match=r"skip_columns: layers\.0\.attn\.qkv must be dense, in fl"
    ):
        skip_columns(sparse)
    with pytest.raises(
        ValueError, match=r"save: layers\.0\.attn\.qkv must be a linear with a form"
    ):
        checkpoint.save(sparse, tmp_path / "out")


def test_thresholds_on_low_bit_linears() -> None:
    low = model()
    quantize_model(low, "rtn", bits=8, group_size=32, progress=False)
    before = low(tokens())
    set_thresholds(low, {name: 0.0 for name, _, _ in low.linears()}, method="teal")
    assert torch.equal(low(tokens()), before)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"share in 0 \.\. 1 expected, got 'teal' and 1\.5"):
        sparsify_activations(model(), tokens(), 1.5, method="teal", progress=False)
    with pytest.raises(ValueError, match="got 'other' and 0.5"):
        sparsify_activations(model(), tokens(), 0.5, method="other", progress=False)  # type: ignore[arg-type]
    for thresholds in ({"layers.0.attn.qkv": -1.0}, {"head": 0.5}):
        with pytest.raises(ValueError, match=re.escape("set_thresholds: names of linears")):
            set_thresholds(model(), thresholds, method="teal")
    low = model()
    quantize_model(low, "rtn", bits=8, group_size=32, progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv must be dense"):
        sparsify_activations(low, tokens(), 0.5, method="teal", progress=False)
