"""Sums of attention states."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import MAX_DIM, check, check_dtype, check_float

_merge_states = torch.ops.openwork.merge_states.default


def merge_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two sets of keys that have none in common.

    ``lse = logaddexp(lse1, lse2)``, ``o = exp(lse1 - lse) * o1 + exp(lse2 - lse) * o2``:
    associative, commutative, and with the identity ``(0, -inf)``, which leaves the other side as it
    is to the bit.

    Args:
        o1: ``[..., d]`` float32, bfloat16 or float16; made contiguous if it is not.
        lse1: ``[...]`` float32: the log of the sum of the exponentials of its scores.
        o2: as o1.
        lse2: as lse1.

    Returns:
        o and lse, contiguous. No gradient.

    Raises:
        ValueError: a wrong dtype or shape.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 1, 16).unbind()
        >>> near = openwork.ops.block_attention(q, k, v, window=4, return_lse=True)
        >>> far = openwork.ops.block_attention(q, k, v, min_distance=4, return_lse=True)
        >>> o, lse = openwork.ops.merge_states(*near, *far)
        >>> torch.allclose(o, openwork.ops.block_attention(q, k, v), atol=1e-6)
        True
    """
    o, lse = _merge_states(o1, lse1, o2, lse2)
    return o, lse


@torch.library.register_fake("openwork::merge_states")
def _merge_states_fake(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    op = "merge_states"
    check_float(op, "o1", o1)
    check(1 <= o1.dim() <= MAX_DIM, f"{op}: o1 must have 1 .. {MAX_DIM} dimensions, got {o1.dim()}")
    check_dtype(op, "o2", o2, o1.dtype)
    check(
        o1.shape == o2.shape,
        f"{op}: o2 must have the shape of o1, {list(o1.shape)}, got {list(o2.shape)}",
    )
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        check_dtype(op, name, lse, torch.float32)
        check(
            lse.shape == o1.shape[:-1],
            f"{op}: {name} must have the shape of o1 without its last dimension, got "
            f"{list(lse.shape)}",
        )
    return o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)
