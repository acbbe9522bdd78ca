"""A linear layer whose weight is packed."""

from __future__ import annotations

from torch import Tensor

from ..ops.compute import Compute
from ..ops.lowbit import lowbit_arguments, lowbit_linear_overload
from ..packing import PackedWeight
from .packed_linear import PackedLinear


class LowbitLinear(PackedLinear):
    """``y = x @ dequantize(weight).T + bias + add`` over a :class:`~openwork.PackedWeight`.

    The packed tensors are not parameters and not part of ``state_dict()``: the packed layout never
    reaches a file. Save with :func:`openwork.save`, which writes the canonical form.

    Args:
        weight: from :func:`openwork.pack_lowbit`.
        bias: ``[n]``, dtype of the activations, or None.
        compute: see :func:`openwork.lowbit_linear`.
    """

    weight: PackedWeight

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None = None, compute: Compute = "int8"
    ) -> None:
        super().__init__(weight, bias)
        self.compute: Compute = compute
        # Decoding makes a hundred short calls a token: what does not change is looked up once.
        self._arguments = lowbit_arguments(weight, compute)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is added before rounding."""
        tensors, numbers = self._arguments
        y: Tensor = lowbit_linear_overload(x, *tensors, self.bias, add, *numbers)
        return y

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.k}, out_features={w.n}, bits={w.bits}, group_size={w.group_size}, "
            f"symmetric={w.zeros is None}, compute={self.compute!r}"
        )
