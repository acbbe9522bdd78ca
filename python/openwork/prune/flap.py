"""FLAP: remove the heads and channels whose inputs vary least, and keep their mean as a bias.

Removing column ``j`` of ``W`` (of ``o`` or ``down``) and adding ``W_:j E[x_j]`` to the bias leaves
an error of mean square ``Var(x_j) |W_:j|^2``, which is the score::

    s_j   = Var(x_j) |W_:j|^2
    z_j   = (s_j - mean(s)) / std(s)     over the columns of one linear
    head  = mean of z over the columns of a key head's query heads

Standardized scores are compared across the whole model, so layers lose different shares. Units go
from the least score up until the weights in them reach the budget; a head counts for all the
weights that go with it. The best head and the best channel of every layer stay.

An et al. 2023, arXiv 2312.11983. Different here: mean and variance are Welford's, over tokens; a
unit of grouped-query attention is a key head with its query heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwork.prune.structure import Kept, remove_units, unit_parameters
from openwork.quant.calibration import CalibrationReport, calibrate, check_dense

if TYPE_CHECKING:
    from openwork.models import Llama


class InputFluctuation:
    """Mean and variance of each input of a linear over all tokens, by Welford's method.

    Example:
        >>> fluctuation = InputFluctuation(2)
        >>> fluctuation.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> fluctuation.mean.tolist(), fluctuation.variance().tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """

    def __init__(self, k: int) -> None:
        self.count = 0
        self.mean = torch.zeros(k, dtype=torch.float64)
        self._squares = torch.zeros(k, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self._squares.nbytes

    def attach(self, linear: nn.Linear) -> RemovableHandle:
        def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.update(inputs[0])

        return linear.register_forward_pre_hook(observe)

    def update(self, x: Tensor) -> None:
        """Account for ``x [..., k]``."""
        tokens = x.detach().reshape(-1, len(self.mean)).double()
        if len(tokens) == 0:
            return
        total = self.count + len(tokens)
        mean = tokens.mean(0)
        delta = mean - self.mean
        self._squares += (tokens - mean).square_().sum(0)
        self._squares += delta.square() * (self.count * len(tokens) / total)
        self.mean += delta * (len(tokens) / total)
        self.count = total

    def variance(self) -> Tensor:
        """``E[(x - E[x])^2]``, ``[k]`` float64."""
        return self._squares / max(self.count, 1)


@torch.no_grad()
def flap(
    model: Llama,
    calibration: Tensor,
    sparsity: float,
    *,
    bias: bool = True,
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> CalibrationReport:
    """Remove heads and channels from ``model`` in place.

    Args:
        model: dense.
        calibration: ``[samples, length]`` int64 token ids.
        sparsity: share of the weights of all layers' linears to remove, 0 to below 1, to within a
            unit.
        bias: add what the removed inputs gave on average to the biases of ``o`` and ``down``.
        progress, resume_dir: see :func:`~openwork.quant.calibration.calibrate`.

    Returns:
        What the calibration held in memory.

    Raises:
        ValueError: a sparsity out of its range, bad tokens, or a model that is not dense.
        FormatError, OSError: a ``resume_dir`` that is damaged or cannot be written.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"flap: sparsity must be at least 0 and below 1, got {sparsity}")
    check_dense("flap", model)
    collected = _Collect()
    report = calibrate(model, calibration, collected, progress=progress, resume_dir=resume_dir)
    scores = [
        _layer_scores(model, index, collected.variances) for index in range(len(model.layers))
    ]
    remove_units(model, select_units(model, scores, sparsity), collected.means if bias else None)
    return report


class _Collect:
    """A calibration that changes nothing and keeps the fluctuations of every linear's inputs."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.variances: dict[str, Tensor] = {}

    def options(self) -> Mapping[str, Any]:
        return {"algorithm": "flap"}

    def statistic(self, linear: nn.Linear) -> InputFluctuation:
        return InputFluctuation(linear.in_features)

    def compress(self, linear: nn.Linear, statistic: InputFluctuation) -> dict[str, Tensor]:
        return {"mean": statistic.mean, "variance": statistic.variance()}

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        k = getattr(parent, attribute).in_features
        if any(list(tensors[kind].shape) != [k] for kind in ("mean", "variance")):
            raise ValueError(f"mean and variance must have shape {[k]}")
        self.means[name], self.variances[name] = tensors["mean"], tensors["variance"]


def _layer_scores(
    model: Llama, index: int, variances: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Standardized scores of a layer's key heads and of its channels."""
    scores = []
    for name in (f"layers.{index}.attn.o", f"layers.{index}.mlp.down"):
        weight = model.get_submodule(name).get_parameter("weight")
        score = variances[name] * weight.double().square().sum(0)
        spread = score.std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
        scores.append((score - score.mean()) / spread)
    heads, channels = scores
    return heads.view(model.config.shape_of(index).kv_heads, -1).mean(1), channels


def select_units(model: Llama, scores: list[tuple[Tensor, Tensor]], sparsity: float) -> list[Kept]:
    """The units to keep under one threshold for the whole model.

    Args:
        model: for the sizes of its units.
        scores: of each layer's key heads ``[kv_heads]`` and channels ``[ffn_size]``, float64.
        sparsity: share of the weights of all units to remove.

    Returns:
        What to keep of each layer: all but the longest run of least scores whose weights stay
        within the share. Of equal scores the later ones go first.
    """
    costs = [
        torch.full((len(part),), cost)
        for layer in scores
        for part, cost in zip(layer, unit_parameters(model.config), strict=True)
    ]
    parts = [part for layer in scores for part in layer]
    cost, score = torch.cat(costs), torch.cat([_protect_best(part) for part in parts])
    # Backwards, since a stable sort keeps equal scores in the order it finds them.
    order = len(score) - 1 - score.flip(0).argsort(stable=True)
    spent = cost[order].cumsum(0)
    within = (spent <= sparsity * int(cost.sum())) & torch.isfinite(score[order])
    keep = torch.ones(len(score), dtype=torch.bool)
    keep[order[within]] = False
    masks = keep.split([len(part) for part in parts])
    return [Kept(*masks[i : i + 2]) for i in range(0, len(masks), 2)]


def _protect_best(scores: Tensor) -> Tensor:
    """``scores`` with the highest, of equal ones the first, out of reach."""
    protected = scores.clone()
    protected[scores.argmax()] = torch.inf
    return protected
