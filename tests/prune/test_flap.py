"""FLAP: its statistic, its threshold over the whole model, and its bias."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openwork.models import Llama
from openwork.prune import InputFluctuation, flap
from openwork.prune.flap import select_units
from openwork.prune.structure import unit_parameters

from .weights import model, rounding, tokens


def _model() -> Llama:
    return model(heads=6, kv_heads=3)


def _weights(dense: Llama) -> int:
    return sum(dense.get_submodule(name).weight.numel() for name, _, _ in dense.linears())


@pytest.mark.parametrize("parts", [[1], [7, 1, 0, 30], [50, 50]], ids=str)
def test_the_statistic_is_mean_and_variance(parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # A mean far above the spread, where a sum of squares would cancel.
    batches = [1e4 + torch.randn(2, count, 5, generator=generator) for count in parts]
    fluctuation = InputFluctuation(5)
    for batch in batches:
        fluctuation.update(batch)
    x = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    assert fluctuation.count == len(x)
    torch.testing.assert_close(fluctuation.mean, x.mean(0), rtol=1e-12, atol=0)
    # Squares of 1e4 are 1e8 times the variance: eps of float64 times that, for up to 100 terms.
    torch.testing.assert_close(
        fluctuation.variance(), x.var(0, correction=0), rtol=1e-6, atol=1e-12
    )


def test_constant_inputs_go_at_no_cost_thanks_to_the_bias() -> None:
    # Of one token repeated, every position sees the same values, and all channels are constant.
    text = torch.full((2, 16), 7)
    changes = []
    for bias in (True, False):
        dense = _model()
        before = dense(text)
        flap(dense, text, 0.5, bias=bias, progress=False)
        changes.append(float((dense(text) - before).norm() / before.norm()))
    # The bias is a sum in another order than the products it stands for.
    assert changes[0] < rounding(_model())
    assert changes[1] > 0.1


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.6, 0.95])
def test_the_budget_is_met_within_a_unit_and_every_layer_lives(sparsity: float) -> None:
    dense = _model()
    total = _weights(dense)
    flap(dense, tokens(), sparsity, progress=False)
    removed = (total - _weights(dense)) / total
    assert removed <= sparsity
    head = max(unit_parameters(dense.config))
    # At 95 % what every layer keeps is in the way.
    assert sparsity > 0.9 or removed > sparsity - head / total
    for layer in dense.layers:
        assert layer.kv_heads >= 1
        assert layer.mlp.down.weight.shape[1] >= 1


def test_one_threshold_takes_the_least_scores_of_the_model() -> None:
    dense = _model()
    generator = torch.Generator().manual_seed(0)
    scores = [
        (
            torch.randn(3, generator=generator).double(),
            torch.randn(96, generator=generator).double(),
        )
        for _ in range(3)
    ]
    kept = select_units(dense, scores, 0.4)
    gone, stay = [], []
    for (heads, channels), keep in zip(scores, kept, strict=True):
        for score, mask in ((heads, keep.heads), (channels, keep.channels)):
            gone += score[~mask].tolist()
            others = score[mask].sort().values[:-1]  # the best of each stays in any case
            stay += others.tolist()
    assert max(gone) < min(stay)


def test_units_of_least_standardized_fluctuation_go() -> None:
    """Scores by loops over columns: Var(x_j) |W_:j|^2, standardized in their linear."""
    dense, text = _model(), tokens()
    inputs: dict[str, Tensor] = {}
    for name, _, _ in dense.linears():
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: inputs.__setitem__(name, x[0].flatten(0, 1).double())
        )
    dense(text)
    head, channel = unit_parameters(dense.config)
    units = []
    for name, count, cost in (("attn.o", 3, head), ("mlp.down", 96, channel)):
        for layer in range(3):
            x, w = inputs[f"layers.{layer}.{name}"], dense.get_submodule(f"layers.{layer}.{name}")
            columns = zip(x.t(), w.weight.double().t(), strict=True)
            scores = [float(xj.var(correction=0) * wj.square().sum()) for xj, wj in columns]
            mean, spread = statistics.fmean(scores), statistics.pstdev(scores)
            size = len(scores) // count
            parts = [
                statistics.fmean((score - mean) / spread for score in scores[i : i + size])
                for i in range(0, len(scores), size)
            ]
            best = parts.index(max(parts))
            units += [(z, layer, name, i, cost) for i, z in enumerate(parts) if i != best]
    gone: dict[tuple[int, str], list[int]] = {}
    budget = 0.3 * _weights(dense)
    for _, layer, name, i, cost in sorted(units):
        budget -= cost
        if budget < 0:
            break
        gone.setdefault((layer, name), []).append(i)
    before = [(layer.attn.o.weight, layer.mlp.down.weight) for layer in dense.layers]
    flap(dense, text, 0.3, progress=False)
    for i, ((o, down), layer) in enumerate(zip(before, dense.layers, strict=True)):
        heads = [h for h in range(3) if h not in gone.get((i, "attn.o"), [])]
        channels = [c for c in range(96) if c not in gone.get((i, "mlp.down"), [])]
        assert torch.equal(layer.attn.o.weight, o.view(72, 3, -1)[:, heads].flatten(1))
        assert torch.equal(layer.mlp.down.weight, down[:, channels])


def test_the_bias_helps() -> None:
    reference = _model()(tokens())
    errors = []
    for bias in (True, False):
        dense = _model()
        flap(dense, tokens(), 0.3, bias=bias, progress=False)
        assert dense.config.output_bias == bias
        errors.append(float((dense(tokens()) - reference).norm()))
    assert errors[0] < errors[1]


def test_a_resumed_run_ends_the_same(tmp_path: Path) -> None:
    first, second = _model(), _model()
    flap(first, tokens(), 0.3, progress=False, resume_dir=tmp_path)
    assert flap(second, tokens(), 0.3, progress=False, resume_dir=tmp_path).resumed == 3
    assert torch.equal(first(tokens()), second(tokens()))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_bad_shares_are_named(sparsity: float) -> None:
    message = f"flap: sparsity must be at least 0 and below 1, got {sparsity}"
    with pytest.raises(ValueError, match=re.escape(message)):
        flap(_model(), tokens(), sparsity, progress=False)
