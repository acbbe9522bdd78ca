"""LLM-Pruner: remove the heads and channels that the loss says it needs least.

With ``g = dL/dw`` of the next-token loss on sample text, setting a weight to 0 changes the loss by
``w g`` to first order. A unit (:mod:`openwork.prune.structure`) is scored by all its weights, in
every matrix it touches::

    score(unit) = sum over its weights of |w g|

Every layer but a few at both ends loses the same share of its weights, its units of least score.

Ma et al. 2023, arXiv 2305.11627, its element-wise first-order criterion. Different here: a unit of
grouped-query attention is a key head with its query heads, so a layer may have too few heads for
its share; channels then make up for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from openwork.prune.structure import Kept, remove_units, unit_parameters
from openwork.quant.calibration import check_dense

if TYPE_CHECKING:
    from openwork.models import Llama
    from openwork.models.llama import Layer


def llm_pruner(
    model: Llama,
    calibration: Tensor,
    sparsity: float,
    *,
    spare: tuple[int, int] = (3, 1),
    progress: bool = True,
) -> None:
    """Remove heads and channels from ``model`` in place.

    While it works it holds a gradient of every linear of the layers.

    Args:
        model: dense.
        calibration: ``[samples, length]`` int64 token ids, of length 2 or more; a sample at a time
            goes forward and backward.
        sparsity: share of the weights of all layers' linears to remove, to within a channel a
            layer.
        spare: layers at the beginning and at the end that lose nothing.
        progress: show a progress bar.

    Raises:
        ValueError: a share that the layers not spared cannot give, bad tokens, or a model that is
            not dense.
    """
    layers = range(spare[0], len(model.layers) - spare[1])
    open_share = len(layers) / len(model.layers)
    if not 0 <= sparsity < open_share or min(spare) < 0:
        raise ValueError(
            f"llm_pruner: sparsity of at least 0 and below {open_share:g}, "
            f"what the layers outside spare = {spare} hold, expected, got {sparsity}"
        )
    scores = first_order_scores(model, calibration, progress=progress)
    head_cost, channel_cost = unit_parameters(model.config)
    kept = []
    for index, (heads, channels) in enumerate(scores):
        lost = sparsity / open_share if index in layers else 0.0
        fewer_heads = min(int(lost * len(heads)), len(heads) - 1)
        budget = lost * (head_cost * len(heads) + channel_cost * len(channels))
        fewer = round((budget - head_cost * fewer_heads) / channel_cost)
        kept.append(Kept(_best(heads, fewer_heads), _best(channels, min(fewer, len(channels) - 1))))
    remove_units(model, kept)


def first_order_scores(
    model: Llama, calibration: Tensor, *, progress: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """``sum |w g|`` of the units of every layer, ``g`` the gradient of the loss on all samples.

    Args:
        model: dense; its gradients are as before afterwards.
        calibration: ``[samples, length]`` int64 token ids.
        progress: show a progress bar.

    Returns:
        Of each layer the scores of its key heads ``[kv_heads]`` and channels ``[ffn_size]``.

    Raises:
        ValueError: bad tokens, or a model that is not dense.
    """
    if calibration.dim() != 2 or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise ValueError(
            f"llm_pruner: calibration must be [samples, length >= 2], got {list(calibration.shape)}"
        )
    check_dense("llm_pruner", model)
    weights = [model.get_submodule(name).get_parameter("weight") for name, _, _ in model.linears()]
    gradients = [torch.zeros_like(weight) for weight in weights]
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for sample in track(calibration, "gradients", disable=not progress):
                logits = model(sample[None, :-1])[0]
                loss = F.cross_entropy(logits.float(), sample[1:])
                for total, gradient in zip(
                    gradients, torch.autograd.grad(loss, weights), strict=True
                ):
                    total += gradient
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)
    saliency = [
        (weight.detach() * gradient).abs_().double()
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    return [
        _unit_sums(cast("Layer", layer), *saliency[4 * index : 4 * index + 4])
        for index, layer in enumerate(model.layers)
    ]


def _unit_sums(
    layer: Layer, qkv: Tensor, o: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of a layer's weights' scores over its units: of key heads, and of channels."""
    groups = layer.kv_heads
    q, k, v = qkv.sum(1).split([part * layer.head_dim for part in (layer.heads, groups, groups)])
    heads = sum(part.view(groups, -1).sum(1) for part in (q, k, v, o.sum(0)))
    gate, up = gate_up.sum(1).chunk(2)
    return cast(Tensor, heads), gate + up + down.sum(0)


def _best(scores: Tensor, drop: int) -> Tensor:
    """A mask of all but the ``drop`` least scores; of equal ones the later go."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[: len(scores) - drop]] = True
    return keep
