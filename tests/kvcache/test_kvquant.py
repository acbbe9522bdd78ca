"""Levels that are not uniform, and the calibration that fits them."""

from __future__ import annotations

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork.kvcache import fit_levels, kvquant
from openwork.kvcache.kvquant import _with_gradients

TOKENS = torch.randint(0, 320, (2, 96), generator=torch.Generator().manual_seed(5))


def error(x: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (x.unsqueeze(-1) - levels).square().amin(-1)).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_never_worse_than_uniform_levels(bits: int) -> None:
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    laplace = (laplace - laplace.min()) / (laplace.max() - laplace.min())
    uniform = torch.linspace(0, 1, 2**bits)
    for weights in (torch.ones(4000), torch.rand(4000).pow(4)):
        levels = fit_levels(laplace, weights, bits)
        assert (levels.diff() >= 0).all() and levels.min() >= 0 and levels.max() <= 1
        assert error(laplace, weights, levels) < 0.7 * error(laplace, weights, uniform)


def test_few_values_are_exact() -> None:
    x = torch.tensor([0.0, 0.2, 0.7, 1.0])
    levels = fit_levels(x.repeat(5), torch.rand(20) + 0.1, 2)
    assert torch.allclose(levels, x, atol=1e-6)


def test_weights_draw_levels() -> None:
    x = torch.linspace(0, 1, 1001)
    heavy_low = torch.where(x < 0.25, 100.0, 1.0)
    assert (fit_levels(x, heavy_low, 3) < 0.25).sum() > (
        fit_levels(x, torch.ones(1001), 3) < 0.25
    ).sum()


def test_gradients_are_those_of_the_loss() -> None:
    """Of one value, by a difference of two losses."""
    model = random_model()
    keys, values = _with_gradients(model, TOKENS[:1])[1]
    token, head, channel = 40, 1, 3
    config = model.config

    def loss(step: float, row: int) -> float:
        def shift(module: object, inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, token, row] += step
            return output

        handle = model.layers[1].attn.qkv.register_forward_hook(shift)
        logits = model(TOKENS[:1])[0, :-1]
        handle.remove()
        return torch.nn.functional.cross_entropy(logits, TOKENS[0, 1:], reduction="sum").item()

    for observed, first in ((keys, config.heads), (values, config.heads + config.kv_heads)):
        row = (first + head) * config.head_dim + channel
        slope = (loss(0.5, row) - loss(-0.5, row)) / 1.0
        got = observed.fisher[token, head, channel].sqrt().item()
        assert got == pytest.approx(abs(slope), rel=0.3, abs=1e-3)


def test_formats_of_a_model() -> None:
    formats = kvquant(random_model(), TOKENS, bits=3, group_size=32, progress=False)
    assert len(formats) == 2
    for format in formats:
        assert format.rotate == "read" and format.exact_first == 1
        for side in (format.keys, format.values):
            assert side is not None and side.outliers == 1 and side.bits == 3
            assert side.codebook is not None and len(side.codebook) == 8
            assert sorted(set(side.codebook)) == [*side.codebook]


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"length of 128 or more.*got \[2, 96\] and 0.01"):
        kvquant(random_model(), TOKENS, group_size=128)
