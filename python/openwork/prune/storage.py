"""Putting a pruned weight into a model, and what it would take stored without its zeros."""

from __future__ import annotations

from torch import nn

from openwork.nn import LowbitLinear
from openwork.ops import pack_lowbit
from openwork.ops.lowbit import Compute
from openwork.prune.masks import NM, Pattern
from openwork.prune.pruned import PrunedTensor


def install(
    parent: nn.Module, attribute: str, pruned: PrunedTensor, compute: Compute = "int8"
) -> None:
    """Give the dense linear ``getattr(parent, attribute)`` its pruned weight, in its dtype.

    On an integer grid it becomes a :class:`~openwork.nn.LowbitLinear`; otherwise it stays a dense
    linear with zeros. The tensor it had is not written to.

    Args:
        parent: the module that holds the linear.
        attribute: its name there.
        pruned: of the linear's shape.
        compute: of the low-bit linear.

    Raises:
        ValueError: another shape.
    """
    linear = getattr(parent, attribute)
    if pruned.weight.shape != linear.weight.shape:
        raise ValueError(
            f"weight must have shape {list(linear.weight.shape)}, got {list(pruned.weight.shape)}"
        )
    q = pruned.quantized
    if q is None:
        weight = pruned.weight.to(linear.weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return
    packed = pack_lowbit(q.codes, q.scales, q.zeros, bits=q.bits, group_size=q.group_size)
    bias = None if linear.bias is None else linear.bias.detach()
    setattr(parent, attribute, LowbitLinear(packed, bias, compute))


def sparse_bytes(pruned: PrunedTensor, pattern: Pattern, itemsize: int) -> int:
    """Bytes of the kept values and of a bit for each weight that says whether it is kept.

    Args:
        pruned: the weight.
        pattern: rows that share their columns share the bits.
        itemsize: bytes of a value, where it is not on a grid.

    Example:
        >>> import torch
        >>> keep = torch.tensor([[True, False] * 8])
        >>> sparse_bytes(PrunedTensor.of(torch.ones(1, 16), keep), NM(2, 4), itemsize=4)
        34
    """
    n, k = pruned.keep.shape
    rows = -(-n // pattern.vector) if isinstance(pattern, NM) else n
    index = rows * -(-k // 8)
    kept = int(pruned.keep.sum())
    q = pruned.quantized
    if q is None:
        return index + kept * itemsize
    zeros = 0 if q.zeros is None else -(-q.zeros.numel() * q.bits // 8)
    return index + -(-kept * q.bits // 8) + q.scales.nbytes + zeros
