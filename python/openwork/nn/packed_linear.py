"""What linear layers over packed weights have in common."""

from __future__ import annotations

from torch import Tensor, nn

from ..packing import BlockSparseWeight, ColumnWeight, NmWeight, PackedWeight, SparseWeight

Packed = PackedWeight | NmWeight | SparseWeight | BlockSparseWeight | ColumnWeight


class PackedLinear(nn.Module):
    """A weight ``[n, k]`` and a bias that are computed with, not trained.

    The packed tensors are not parameters and not part of ``state_dict()``: the packed layout never
    reaches a file.

    Args:
        weight: of any packed form.
        bias: ``[n]``, dtype of the activations, or None.
    """

    weight: Packed

    def __init__(self, weight: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def in_features(self) -> int:
        return self.weight.k

    @property
    def out_features(self) -> int:
        return self.weight.n
