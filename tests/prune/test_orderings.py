"""What the literature is firm about, on the demo's model and text not used for calibration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import openwork
from openwork.errors import DownloadError
from openwork.evaluation import evaluate, predictions
from openwork.models import Llama
from openwork.models.demo import fetch_model, fetch_text
from openwork.prune import Stage, evopress, flap, prune_model
from openwork.quant import Grid, quantize_model

pytestmark = [pytest.mark.demo, pytest.mark.slow]

Divergence = Callable[..., float]
_SAMPLES, _LENGTH, _WINDOW = 24, 256, 512


def _pieces(tokens: list[int]) -> Tensor:
    """Samples that start at equal distances in the text."""
    step = len(tokens) // _SAMPLES
    return torch.stack(
        [torch.tensor(tokens[i * step : i * step + _LENGTH]) for i in range(_SAMPLES)]
    )


@pytest.fixture(scope="module")
def divergence() -> Divergence:
    """KL from the dense model after what the arguments say; each computed once."""
    torch.set_num_threads(2)
    try:
        path, text = fetch_model(progress=False), fetch_text(progress=False)
    except (DownloadError, OSError) as error:
        pytest.skip(f"the model cannot be had: {error}")
    dense = openwork.load(path)
    assert dense.tokenizer is not None
    calibration = _pieces(dense.tokenizer.encode(text.calibration))
    scored = torch.tensor(dense.tokenizer.encode(text.evaluation)[: 4 * _WINDOW])
    sizes = {"window": _WINDOW, "stride": _WINDOW // 2, "progress": False}
    reference = predictions(dense, scored, **sizes)  # type: ignore[arg-type]

    @cache
    def run(method: str, pattern: str | float, *options: str) -> float:
        torch.set_num_threads(2)
        model = openwork.load(path)
        if "evopress" in options:
            _allocate(model, method, float(pattern), calibration[::3])
        elif method == "flap":
            flap(model, calibration, float(pattern), bias="bias" in options, progress=False)
        else:
            _prune(model, method, pattern, calibration, Grid(4, 64) if "joint" in options else None)
        if "then int4" in options:
            quantize_model(model, "rtn", bits=4, group_size=64, compute="float", progress=False)
        kl = evaluate(model, scored, reference=reference, **sizes).kl  # type: ignore[arg-type]
        assert kl is not None
        return kl

    return run


def _prune(
    model: Llama, method: str, pattern: str | float, calibration: Tensor, grid: Grid | None
) -> None:
    arguments = {"pattern": pattern} if isinstance(pattern, str) else {"sparsity": pattern}
    prune_model(
        model,
        method,
        calibration=None if method == "magnitude" else calibration,
        grid=grid,
        compute="float",
        progress=False,
        **arguments,  # type: ignore[arg-type]
    )


def _allocate(model: Llama, method: str, sparsity: float, calibration: Tensor) -> None:
    found = evopress(
        model,
        method,
        sparsity,
        calibration,
        reach=2,
        stages=(Stage(1, 2), Stage(8, 1)),
        generations=6,
        offspring=6,
        progress=False,
    )
    assert found.fitness[-1] < found.fitness[0]
    prune_model(model, method, sparsity=found.sparsity, progress=False)


def test_magnitude_is_worse_than_wanda_is_worse_than_sparsegpt(divergence: Divergence) -> None:
    errors = [divergence(method, "2:4") for method in ("magnitude", "wanda", "sparsegpt")]
    assert errors[0] > errors[1] > errors[2]


def test_freer_patterns_are_better(divergence: Divergence) -> None:
    errors = [divergence("sparsegpt", pattern) for pattern in ("2:4", "4:8", 0.5)]
    assert errors[0] > errors[1] > errors[2]


def test_the_bias_of_flap_helps(divergence: Divergence) -> None:
    assert divergence("flap", 0.1, "bias") < divergence("flap", 0.1)


def test_rounding_with_pruning_beats_rounding_after_it(divergence: Divergence) -> None:
    joint = divergence("sparsegpt", "2:4", "joint")
    assert divergence("sparsegpt", "2:4") < joint < divergence("sparsegpt", "2:4", "then int4")


def test_evopress_is_no_worse_than_the_same_share_everywhere(divergence: Divergence) -> None:
    assert divergence("magnitude", 0.5, "evopress") <= divergence("magnitude", 0.5)
