"""LLM-Pruner's scores against a sum over each unit's weights, and what it removes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from openwork.models import Llama
from openwork.prune import llm_pruner
from openwork.prune.llm_pruner import first_order_scores
from openwork.prune.structure import unit_parameters
from openwork.quant import quantize_model

from .weights import model, rounding, tokens


def _model() -> Llama:
    return model(heads=6, kv_heads=3)


def _sizes(dense: Llama) -> list[int]:
    return [sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in dense.layers]


def test_scores_are_sums_of_weight_times_gradient() -> None:
    dense, text = _model(), tokens(3, 16)
    scores = first_order_scores(dense, text, progress=False)
    linears = [dense.get_submodule(name) for name, _, _ in dense.linears()]
    assert not any(linear.weight.requires_grad for linear in linears)
    for linear in linears:
        linear.weight.requires_grad_(True)
    loss = sum(F.cross_entropy(dense(row[None, :-1])[0], row[1:]) for row in text)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    e = dense.config.head_dim
    # Sums of positive terms keep the relative error of a gradient: n eps over all sums, there and
    # back, of rows that are added one by one here and there in another order.
    rtol = 2 * rounding(dense) + 2.0**-24 * text.numel()
    for (heads, channels), layer in zip(scores, dense.layers, strict=True):
        saliency = {
            name: (module.weight * module.weight.grad).abs().double()
            for name, module in (
                ("qkv", layer.attn.qkv), ("o", layer.attn.o),
                ("gate_up", layer.mlp.gate_up), ("down", layer.mlp.down),
            )
        }  # fmt: skip
        for g in range(3):
            # Rows of qkv: 6 query heads, 3 key heads, 3 value heads.
            rows = [*range(2 * g * e, (2 * g + 2) * e)]
            rows += [*range((6 + g) * e, (7 + g) * e), *range((9 + g) * e, (10 + g) * e)]
            expected = saliency["qkv"][rows].sum() + saliency["o"][:, rows[: 2 * e]].sum()
            torch.testing.assert_close(heads[g], expected, rtol=rtol, atol=0.0)
        for c in (0, 41, 95):
            expected = saliency["gate_up"][[c, 96 + c]].sum() + saliency["down"][:, c].sum()
            torch.testing.assert_close(channels[c], expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize(("sparsity", "spare"), [(0.3, (0, 0)), (0.2, (1, 0)), (0.1, (1, 1))])
def test_layers_that_are_not_spared_share_the_loss(sparsity: float, spare: tuple[int, int]) -> None:
    dense = _model()
    before = _sizes(dense)
    llm_pruner(dense, tokens(3, 16), sparsity, spare=spare, progress=False)
    after = _sizes(dense)
    lost = [1 - a / b for a, b in zip(after, before, strict=True)]
    spared = [*range(spare[0]), *range(3 - spare[1], 3)]
    share = sparsity * 3 / (3 - len(spared))
    channel = unit_parameters(dense.config)[1] / before[0]
    for index, part in enumerate(lost):
        assert part == 0 if index in spared else abs(part - share) <= channel / 2


def test_the_least_needed_go() -> None:
    dense, text = _model(), tokens(3, 16)
    scores = first_order_scores(dense, text, progress=False)
    down = [layer.mlp.down.weight.clone() for layer in dense.layers]
    llm_pruner(dense, text, 0.4, spare=(0, 0), progress=False)
    for (_, channels), before, layer in zip(scores, down, dense.layers, strict=True):
        left = layer.mlp.down.weight.shape[1]
        best = channels.argsort(descending=True)[:left].sort().values
        assert torch.equal(layer.mlp.down.weight, before[:, best])


@pytest.mark.parametrize(
    ("sparsity", "spare", "message"),
    [
        (0.5, (2, 0), "llm_pruner: sparsity of at least 0 and below 0.333333"),
        (0.1, (3, 1), "below 0, what the layers outside spare = (3, 1) hold"),
        (-0.1, (0, 0), "got -0.1"),
        (0.1, (-1, 0), "spare = (-1, 0)"),
    ],
)
def test_shares_that_cannot_be_had_are_named(
    sparsity: float, spare: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        llm_pruner(_model(), tokens(), sparsity, spare=spare, progress=False)


def test_bad_tokens_and_models_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"calibration must be \[samples, length >= 2\], got \[6\]"
    ):
        llm_pruner(_model(), tokens()[:, 0], 0.1, spare=(0, 0), progress=False)
    dense = _model()
    quantize_model(dense, "rtn", bits=4, group_size=32, progress=False)
    with pytest.raises(
        ValueError, match=r"llm_pruner: layers\.0\.attn\.qkv must be dense, got Low"
    ):
        llm_pruner(dense, tokens(), 0.1, spare=(0, 0), progress=False)
