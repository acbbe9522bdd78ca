"""Putting a pruned weight into a model, with its zeros or without them."""

from __future__ import annotations

from torch import Tensor, nn

from openwork.nn import LowbitLinear, NmLinear, SparseLinear
from openwork.ops import compress_nm, compress_sparse, pack_lowbit, unpack_lowbit
from openwork.ops.compute import Compute
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


def sparse_module(
    weight: Tensor, bias: Tensor | None, pattern: NM | None
) -> NmLinear | SparseLinear:
    """A linear that neither stores nor multiplies by the zeros of ``weight``.

    Args:
        weight: ``[n, k]`` float32 or bfloat16; what is not zero is kept.
        bias: ``[n]``, dtype of the activations, or None.
        pattern: an N:M with M = 4, 8, 16 or 32 and sets of 1, 8, 16 or 32 rows, which
            :func:`openwork.compress_nm` takes, gives a :class:`~openwork.nn.NmLinear`; any other,
            or None for zeros anywhere, a :class:`~openwork.nn.SparseLinear`.

    Raises:
        ValueError: another dtype, or a weight that does not have the pattern.

    Example:
        >>> import torch
        >>> sparse_module(torch.eye(16), None, NM(2, 4))
        NmLinear(in_features=16, out_features=16, pattern=2:4, vector=1, bits=32, compute='float')
    """
    if pattern is None or not _has_kernel(pattern):
        return SparseLinear(compress_sparse(weight), bias)
    packed = compress_nm(weight, (pattern.n, pattern.m), vector=pattern.vector)
    return NmLinear(packed, bias)


def without_zeros(
    linear: nn.Linear | LowbitLinear, pattern: NM | None
) -> NmLinear | SparseLinear | None:
    """A pruned linear in the form that does not store its zeros, or None where there is none.

    A dense one becomes what :func:`sparse_module` makes of it. A low-bit one becomes an
    :class:`~openwork.nn.NmLinear` with the same codes, where :func:`codes_without_zeros`.

    Raises:
        ValueError: the weight does not have the pattern.
    """
    bias = None if linear.bias is None else linear.bias.detach()
    if isinstance(linear, nn.Linear):
        return sparse_module(linear.weight.detach(), bias, pattern)
    w = linear.weight
    if pattern is None or not codes_without_zeros(pattern, w.bits, w.group_size, w.zeros is None):
        return None
    codes, scales, _ = unpack_lowbit(w)
    packed = compress_nm(
        codes,
        (pattern.n, pattern.m),
        vector=pattern.vector,
        scales=scales,
        bits=w.bits,
        group_size=w.group_size,
    )
    return NmLinear(packed, bias, linear.compute)


def codes_without_zeros(
    pattern: Pattern, bits: int, group_size: int | None, symmetric: bool
) -> bool:
    """Whether pruned codes have a form that does not store their zeros.

    Args:
        pattern: of the zeros.
        bits, group_size, symmetric: of the grid; ``group_size`` None is one group a row.

    Example:
        >>> codes_without_zeros(NM(2, 4), bits=4, group_size=128, symmetric=True)
        True
    """
    grid = symmetric and bits in (4, 8) and (group_size is None or group_size >= 32)
    return grid and isinstance(pattern, NM) and _has_kernel(pattern)


def _has_kernel(pattern: NM) -> bool:
    """Whether :func:`openwork.compress_nm` takes a pattern."""
    return pattern.m in (4, 8, 16, 32) and pattern.vector in (1, 8, 16, 32)
