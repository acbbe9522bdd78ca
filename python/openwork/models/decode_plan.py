"""A model's layers as the arguments of ``ops.decoder_layers``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from openwork.nn import LowbitLinear
from openwork.ops.lowbit import lowbit_arguments

_LINEARS = (("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down"))


class DecodePlan:
    """The tensors and numbers of layers that one operator can run.

    Args:
        layers: of a :class:`~openwork.models.Llama`.

    Attributes:
        layers: they.
        usable: false if a linear is of another kind, if layers differ in size, or if a hook waits
            for a layer or a linear to be called.
        weights, linears, heads: as :func:`openwork.ops.decoder_layers` takes them.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.usable = True
        self.weights: list[Tensor] = []
        self.linears: list[int] = []
        self.heads = 0
        sizes = set()
        for layer in layers:
            linears = [getattr(getattr(layer, block), name) for block, name in _LINEARS]
            sizes.add((layer.heads, layer.kv_heads, linears[-1].in_features))
            if (
                len(sizes) > 1
                or any(type(linear) is not LowbitLinear for linear in linears)
                or any(
                    module._forward_hooks or module._forward_pre_hooks
                    for module in (layer, *linears)
                )
            ):
                self.usable = False
                return
            self.heads = cast(int, layer.heads)
            self.weights += [layer.get_parameter("attn_norm"), layer.get_parameter("mlp_norm")]
            for linear in linears:
                tensors, numbers = lowbit_arguments(linear.weight, linear.compute)
                self.weights += [_or_empty(tensor) for tensor in (*tensors, linear.bias)]
                self.linears += numbers


def _or_empty(tensor: Tensor | None) -> Tensor:
    return torch.empty(0) if tensor is None else tensor
