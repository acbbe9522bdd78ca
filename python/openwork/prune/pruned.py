"""What a pruning algorithm makes of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.quant.grid import QuantizedTensor


@dataclass(frozen=True, eq=False)
class PrunedTensor:
    """A weight with some of its values removed.

    Attributes:
        weight: ``[n, k]`` float32; exactly 0 wherever ``keep`` is false. Kept values may differ
            from the original ones, and may be 0 too.
        keep: ``[n, k]`` bool.
        quantized: the same weight on an integer grid, ``weight == quantized.dequantize()``, or
            None for values of any size.

    Raises:
        ValueError: on construction, if shapes, dtypes or zeros do not agree.

    Example:
        >>> keep = torch.tensor([[True, False]])
        >>> PrunedTensor.of(torch.tensor([[3.0, 2.0]]), keep).weight
        tensor([[3., 0.]])
    """

    weight: Tensor
    keep: Tensor
    quantized: QuantizedTensor | None = None

    @classmethod
    def of(
        cls, weight: Tensor, keep: Tensor, quantized: QuantizedTensor | None = None
    ) -> PrunedTensor:
        """``weight [n, k]`` where ``keep [n, k]`` is true, and 0 elsewhere."""
        return cls(weight.float().masked_fill(~keep, 0), keep, quantized)

    def __post_init__(self) -> None:
        weight, keep = self.weight, self.keep
        if weight.dtype != torch.float32 or keep.dtype != torch.bool or weight.dim() != 2:
            raise ValueError(
                "PrunedTensor: weight [n, k] float32 and keep bool expected, got "
                f"{list(weight.shape)} {weight.dtype} and {keep.dtype}"
            )
        if weight.shape != keep.shape:
            raise ValueError(
                f"PrunedTensor: keep must have the shape of weight, {list(weight.shape)}, "
                f"got {list(keep.shape)}"
            )
        if bool(weight.masked_fill(keep, 0).count_nonzero()):
            raise ValueError("PrunedTensor: weight must be 0 wherever keep is false")

    @property
    def sparsity(self) -> float:
        """Share of the weights that were removed."""
        return 1 - int(self.keep.sum()) / self.keep.numel()
