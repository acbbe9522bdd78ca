"""Removing heads and channels: the model really shrinks.

What must go together is a unit, and a unit is removed whole from every matrix it touches::

    a key head, with its r query heads    rows of q, k and v (and their biases), columns of o
    a channel of the feed-forward block   a row of gate and one of up, a column of down

so the smaller model computes exactly what the larger one computes with those columns of ``o`` and
``down`` at 0. With mean inputs given, what the removed columns contributed on average stays, as a
bias: ``b + W[:, removed] mean[removed]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from openwork.models.config import LayerShape, LlamaConfig
from openwork.quant.calibration import check_dense

if TYPE_CHECKING:
    from openwork.models import Llama
    from openwork.models.llama import Layer


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of one layer.

    Attributes:
        heads: ``[kv_heads]`` bool, one at least.
        channels: ``[ffn_size]`` bool, one at least.
    """

    heads: Tensor
    channels: Tensor


def unit_parameters(config: LlamaConfig) -> tuple[int, int]:
    """Weights in a key head with its query heads, and in a channel; biases not counted.

    Example:
        >>> config = LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                      heads=4, kv_heads=2, head_dim=8, context_length=128)
        >>> unit_parameters(config)
        (1536, 96)
    """
    query = config.heads // config.kv_heads
    return (2 * query + 2) * config.head_dim * config.hidden_size, 3 * config.hidden_size


def head_columns(heads: Tensor, config: LlamaConfig) -> Tensor:
    """The columns of ``o`` of key heads: ``[kv_heads] -> [heads head_dim]``, values repeated."""
    return heads.repeat_interleave(config.heads // config.kv_heads * config.head_dim)


@torch.no_grad()
def remove_units(
    model: Llama, kept: Sequence[Kept], means: Mapping[str, Tensor] | None = None
) -> None:
    """Shrink ``model`` in place to the units that are kept.

    Args:
        model: dense.
        kept: of each layer.
        means: ``E[x]`` of the inputs of ``layers.i.attn.o`` and ``layers.i.mlp.down`` by name, to
            compensate with a bias. None: no compensation.

    Raises:
        ValueError: masks that do not fit the layers or keep nothing, or linears that are not dense.
    """
    _check(model, kept)
    config = model.config
    shapes = []
    for index, (module, keep) in enumerate(zip(model.layers, kept, strict=True)):
        layer = cast("Layer", module)
        columns = head_columns(keep.heads, config)
        # q, k and v are rows of one linear.
        rows = keep.heads.repeat_interleave(config.head_dim)
        _keep_rows(layer.attn.qkv, torch.cat((columns, rows, rows)))
        _keep_rows(layer.mlp.gate_up, keep.channels.repeat(2))
        for name, block, attribute, mask in (
            ("attn.o", layer.attn, "o", columns), ("mlp.down", layer.mlp, "down", keep.channels)
        ):  # fmt: skip
            mean = None if means is None else means[f"layers.{index}.{name}"]
            _keep_columns(getattr(block, attribute), mask, mean)
        shapes.append(LayerShape(int(keep.heads.sum()), int(keep.channels.sum())))
        layer.kv_heads = shapes[-1].kv_heads
        layer.heads = layer.kv_heads * (config.heads // config.kv_heads)
    model.config = replace(
        config,
        layer_shapes=tuple(shapes),
        output_bias=config.output_bias or means is not None,
    )


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _parameter(linear.weight[rows])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[rows])
    linear.out_features = linear.weight.shape[0]


def _keep_columns(linear: nn.Linear, columns: Tensor, mean: Tensor | None) -> None:
    if mean is not None:
        lost = linear.weight.float()[:, ~columns] @ mean.float()[~columns]
        bias = lost if linear.bias is None else linear.bias.float() + lost
        linear.bias = _parameter(bias.to(linear.weight.dtype))
    linear.weight = _parameter(linear.weight[:, columns])
    linear.in_features = linear.weight.shape[1]


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _check(model: Llama, kept: Sequence[Kept]) -> None:
    config = model.config
    if len(kept) != config.layers:
        raise ValueError(f"remove_units: kept must be of {config.layers} layers, got {len(kept)}")
    for index, keep in enumerate(kept):
        shape = config.shape_of(index)
        for name, mask, size in (
            ("heads", keep.heads, shape.kv_heads), ("channels", keep.channels, shape.ffn_size)
        ):  # fmt: skip
            if mask.dtype != torch.bool or list(mask.shape) != [size] or not bool(mask.any()):
                raise ValueError(
                    f"remove_units: {name} of layer {index} must be [{size}] bool and keep one at "
                    f"least, got {list(mask.shape)} {mask.dtype} that keeps {int(mask.sum())}"
                )
    check_dense("remove_units", model)
