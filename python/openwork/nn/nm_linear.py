"""A linear layer whose weight is N:M sparse."""

from __future__ import annotations

from torch import Tensor

from ..ops.compute import Compute
from ..ops.nm import nm_arguments, nm_linear_overload
from ..packing import NmWeight
from .packed_linear import PackedLinear


class NmLinear(PackedLinear):
    """``y = x @ expand(weight).T + bias + add`` over an :class:`~openwork.NmWeight`.

    The packed tensors are not parameters and not part of ``state_dict()``: the packed layout never
    reaches a file. :func:`openwork.expand_nm` gives back what to store.

    Args:
        weight: from :func:`openwork.compress_nm`.
        bias: ``[n]``, dtype of the activations, or None.
        compute: see :func:`openwork.nm_linear`.

    Example:
        >>> weight = openwork.compress_nm(torch.eye(16), (1, 4))
        >>> layer = openwork.nn.NmLinear(weight)
        >>> layer(torch.arange(16.0)[None])[0, 3].item()
        3.0
    """

    weight: NmWeight

    def __init__(
        self, weight: NmWeight, bias: Tensor | None = None, compute: Compute = "float"
    ) -> None:
        super().__init__(weight, bias)
        self.compute: Compute = compute
        # Decoding makes a hundred short calls a token: what does not change is looked up once.
        self._arguments = nm_arguments(weight, compute)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is added before rounding."""
        tensors, numbers = self._arguments
        y: Tensor = nm_linear_overload(x, *tensors, self.bias, add, *numbers)
        return y

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.k}, out_features={w.n}, pattern={w.pattern[0]}:{w.pattern[1]}, "
            f"vector={w.vector}, bits={w.bits}, compute={self.compute!r}"
        )
