"""An embedding whose rows are those of a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.lowbit import lowbit_arguments, lowbit_embedding_overload
from ..packing import PackedWeight


class LowbitEmbedding(nn.Module):
    """``y[i] = dequantize(weight)[ids[i]]`` over a :class:`~openwork.PackedWeight`.

    Made for a head that shares its weight with the embedding: it reads the weight where the head
    has it and takes no memory of its own. A row is what the head multiplies by, in float32, rounded
    once to the module's dtype, which ``to(dtype)`` changes.

    Args:
        weight: from :func:`openwork.pack_lowbit`. Not part of ``state_dict()``, as in
            :class:`LowbitLinear`.
        dtype: of the result: float32, bfloat16 or float16.
    """

    _result: Tensor

    def __init__(self, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = weight
        # Empty; its dtype is the module's.
        self.register_buffer("_result", torch.empty(0, dtype=dtype), persistent=False)
        tensors, numbers = lowbit_arguments(weight, "float")
        self._arguments = (*tensors, *numbers[:4])

    @property
    def num_embeddings(self) -> int:
        return self.weight.n

    @property
    def embedding_dim(self) -> int:
        return self.weight.k

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [...]`` int64 -> ``[..., k]``.

        Raises:
            ValueError: an id out of range.
        """
        y: Tensor = lowbit_embedding_overload(ids, *self._arguments, self._result.dtype)
        return y

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"{w.n}, {w.k}, bits={w.bits}, group_size={w.group_size}, symmetric={w.zeros is None}"
        )
