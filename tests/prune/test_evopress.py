"""EvoPress: the budget is exact, fitness never rises, and running the model decides."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.nn import SparseLinear
from openwork.prune import Stage, Unstructured, evopress, prune_model, wanda
from openwork.prune.evopress import Levels, search
from openwork.quant import quantize_model

from .weights import model, tokens

STAGES = (Stage(1, 4), Stage(2, 2), Stage(4, 1))
SMALL: dict[str, Any] = {
    "stages": STAGES, "generations": 6, "offspring": 6, "step": 0.1, "reach": 2, "progress": False
}  # fmt: skip


def _far_from(wanted: Levels) -> Any:
    def fitness(levels: Levels, samples: int) -> float:
        # Little text misleads a little.
        noise = sum(levels[: len(levels) // 2]) * 0.01 / samples
        return sum((a - b) ** 2 for a, b in zip(levels, wanted, strict=True)) + noise

    return fitness


@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_kept_within_every_size_and_fitness_never_rises(seed: int) -> None:
    sizes = [(8, 4)] * 5 + [(4, 8)] * 4 + [(2, 2)]
    start = (2,) * 10
    seen: list[Levels] = []

    def fitness(levels: Levels, samples: int) -> float:
        seen.append(levels)
        return float(_far_from((4, 0, 2, 1, 3, 0, 4, 4, 0, 2))(levels, samples))

    best, history = search(
        sizes, start, 4, fitness, stages=STAGES, generations=30, offspring=8, seed=seed,
        progress=False,
    )  # fmt: skip
    for levels in [best, *seen]:
        assert all(0 <= level <= 4 for level in levels)
        assert sum(levels[:5]) == 10
        assert sum(levels[5:9]) == 8
        assert levels[9] == 2
    assert list(history) == sorted(history, reverse=True)
    assert history[-1] == fitness(best, 4)
    assert history[-1] < history[0]
    assert len(history) == 31


def test_a_search_repeats_and_ends_where_nothing_can_be_traded() -> None:
    options: dict[str, Any] = {"stages": STAGES, "offspring": 4, "progress": False}
    fitness = _far_from((0, 2, 1))
    first = search([1, 1, 1], (1, 1, 1), 2, fitness, generations=9, seed=3, **options)
    assert first == search([1, 1, 1], (1, 1, 1), 2, fitness, generations=9, seed=3, **options)
    alone, history = search([1, 2, 3], (1, 1, 1), 2, fitness, generations=2, **options)
    assert alone == (1, 1, 1)
    assert len(set(history)) == 1


def test_it_finds_a_better_allocation_by_running_the_model() -> None:
    dense, text = model(), tokens(8, 24)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    found = evopress(dense, "wanda", 0.5, text, **SMALL)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert list(found.fitness) == sorted(found.fitness, reverse=True)
    assert found.fitness[-1] < found.fitness[0]
    sizes = {name: dense.get_submodule(name).weight.numel() for name in found.sparsity}
    removed = sum(round(found.sparsity[name] * sizes[name]) for name in sizes)
    assert removed == sum(sizes.values()) // 2
    assert len(set(found.sparsity.values())) > 1
    report = prune_model(dense, "wanda", sparsity=found.sparsity, calibration=text, progress=False)
    assert report.sparsity == pytest.approx(0.5)


def test_fitness_is_the_divergence_of_the_pruned_model() -> None:
    dense, text = model(), tokens(4, 24)
    found = evopress(dense, "wanda", 0.5, text, **SMALL | {"generations": 0})
    assert set(found.sparsity.values()) == {0.5}
    expected = dense(text)
    # The levels are made on the inputs of the dense model.
    inputs: dict[str, torch.Tensor] = {}
    for name, _, _ in dense.linears():
        dense.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: inputs.__setitem__(name, x[0].flatten(0, 1))
        )
    dense(text)
    for name, _, _ in dense.linears():
        linear = dense.get_submodule(name)
        energy = inputs[name].square().mean(0)
        linear.weight.copy_(wanda(linear.weight, energy, Unstructured(0.5)).weight)
    p, q = dense(text).log_softmax(-1), expected.log_softmax(-1)
    divergence = F.kl_div(p, q, reduction="none", log_target=True).sum(-1).mean()
    # The levels come from a moment that is added up in another order, and pruning is a choice; of
    # logits, rounded alike, the divergence is a difference of logarithms.
    assert found.fitness == (pytest.approx(float(divergence), rel=1e-3),)


def test_candidates_run_without_their_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[nn.Module] = set()
    forward = SparseLinear.forward

    def recorded(self: SparseLinear, *x: Tensor, **options: Any) -> Tensor:
        ran.add(self)
        return forward(self, *x, **options)

    monkeypatch.setattr(SparseLinear, "forward", recorded)
    dense = model()
    evopress(dense, "wanda", 0.5, tokens(4, 24), **SMALL | {"generations": 0})
    assert len(ran) == len(list(dense.linears()))
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.3}, "evopress: sparsity with reach >= 1 levels of at least a column"),
        ({"reach": 0}, "reach = 0"),
        ({"step": 0.001}, "step = 0.001"),
        ({"stages": (Stage(9, 1),)}, "evopress: calibration must have 9 samples"),
        ({"stages": (Stage(1, 2),)}, "search: stages of at least one sample and survivor"),
        ({"stages": ()}, "search: stages of at least one sample and survivor"),
        ({"offspring": 0}, "search: generations of at least 0 and offspring of at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    dense = model()
    weight = dense.layers[0].attn.o.weight
    with pytest.raises(ValueError, match=re.escape(message)):
        evopress(dense, "wanda", 0.5, tokens(), **SMALL | options)
    assert dense.layers[0].attn.o.weight is weight


def test_bad_methods_and_models_are_named() -> None:
    with pytest.raises(ValueError, match="one of magnitude, wanda, sparsegpt, got 'flap'"):
        evopress(model(), "flap", 0.5, tokens(), **SMALL)
    low = model()
    quantize_model(low, "rtn", bits=8, group_size=32, progress=False)
    with pytest.raises(ValueError, match=r"evopress: layers\.0\.attn\.qkv must be dense, got Low"):
        evopress(low, "wanda", 0.5, tokens(), **SMALL)


def test_a_start_that_does_not_fit_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"search: start must be a level in 0 \.\. 2 for each of 2"
    ):
        search([1, 1], (3, 0), 2, lambda *_: 0.0, stages=STAGES, generations=1, offspring=1)
