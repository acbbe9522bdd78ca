"""Magnitude pruning: small weights go, in each matrix or in the whole model.

::

    score_ij = |W_ij|

For a whole model one threshold would serve all matrices, and may empty one whose weights happen to
be small. So each matrix keeps at least a share ``floor``, and the others give what that costs. The
threshold is found without a sort, from the bits of the weights: float32 numbers above 0 order as
the integers their bits spell, so a histogram of the upper 16 bits finds the bin the threshold is
in, and one of the lower 16 bits within that bin finds the threshold itself, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openwork.ops.nm_mask import nm_mask
from openwork.prune.masks import NM, Pattern, keep_layer
from openwork.prune.pruned import PrunedTensor
from openwork.quant.grid import check_weight

_BINS = 1 << 16


@torch.no_grad()
def magnitude(weight: Tensor, pattern: Pattern) -> PrunedTensor:
    """Remove the smallest weights of a matrix, without data.

    Args:
        weight: ``[n, k]`` floating point, finite.
        pattern: unstructured zeros are chosen over the whole matrix, N:M in each block. Rows that
            share their columns are scored by the sum of squares.

    Returns:
        The kept weights, unchanged.

    Raises:
        ValueError: a weight that is not a finite matrix.

    Example:
        >>> magnitude(torch.tensor([[1.0, -4.0, 2.0, 3.0]]), NM(2, 4)).weight.tolist()
        [[0.0, -4.0, 0.0, 3.0]]
    """
    check_weight("magnitude", weight)
    return PrunedTensor.of(weight, keep_largest(weight, pattern))


def keep_largest(weight: Tensor, pattern: Pattern) -> Tensor:
    """The mask of :func:`magnitude`, ``[n, k]`` bool."""
    if isinstance(pattern, NM):
        return nm_mask(weight, (pattern.n, pattern.m), vector=pattern.vector)
    return keep_layer(weight.float().abs(), pattern.sparsity)


@torch.no_grad()
def global_magnitude(
    weights: Mapping[str, Tensor], sparsity: float, *, floor: float = 0.0
) -> dict[str, float]:
    """The sparsity of each matrix under one threshold on ``|w|`` for all of them.

    Args:
        weights: by name, each ``[n, k]`` floating point, finite. For a model, its linears: leave
            out embeddings, norms and the head.
        sparsity: share of all weights to remove, 0 to 1.
        floor: share that every matrix keeps at least (rounded down to a whole weight), 0 to
            ``1 - sparsity``.

    Returns:
        The sparsities by name, for :func:`magnitude`. The counts they stand for sum to
        ``round(sparsity * all weights)`` exactly; of weights equal to the threshold, those of the
        matrices named first go first.

    Raises:
        ValueError: a share out of its range, or a weight that is not a finite matrix.

    Example:
        >>> global_magnitude({"a": torch.ones(1, 4), "b": torch.full((1, 4), 2.0)}, 0.5, floor=0.25)
        {'a': 0.75, 'b': 0.25}
    """
    if not (0 <= sparsity <= 1 and 0 <= floor <= 1 - sparsity):
        raise ValueError(
            "global_magnitude: sparsity in 0 .. 1 and floor in 0 .. 1 - sparsity expected, "
            f"got {sparsity} and {floor}"
        )
    for weight in weights.values():
        check_weight("global_magnitude", weight)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    budget = round(sparsity * sum(sizes.values()))
    # A matrix that would keep less than its floor keeps the floor; then the threshold of the others
    # rises, and may bring another one there.
    most = {name: size - int(floor * size) for name, size in sizes.items()}
    fixed: dict[str, int] = {}
    while True:
        free = {name: weight for name, weight in weights.items() if name not in fixed}
        counts = _smallest(free, budget - sum(fixed.values()))
        over = {name: most[name] for name, count in counts.items() if count > most[name]}
        if not over:
            break
        fixed |= over
    counts |= fixed
    return {name: counts[name] / size for name, size in sizes.items()}


def _smallest(weights: Mapping[str, Tensor], count: int) -> dict[str, int]:
    """How many of the ``count`` smallest weights of all matrices each of them has."""
    if count == 0:
        return dict.fromkeys(weights, 0)
    limit = _threshold(weights, count)
    counts = {name: int((_bits(weight) < limit).sum()) for name, weight in weights.items()}
    left = count - sum(counts.values())
    for name, weight in weights.items():
        equal = min(left, int((_bits(weight) == limit).sum()))
        counts[name] += equal
        left -= equal
    return counts


def _threshold(weights: Mapping[str, Tensor], count: int) -> int:
    """The bits of the ``count``-th smallest ``|w|``, found 16 bits at a time."""
    found = 0
    for shift in (16, 0):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for weight in weights.values():
            bits = _bits(weight)
            digits = (bits[bits >> (shift + 16) == found] >> shift) & (_BINS - 1)
            histogram += torch.bincount(digits, minlength=_BINS)
        total = histogram.cumsum(0)
        digit = int((total < count).sum())
        count -= int(total[digit] - histogram[digit])
        found = found << 16 | digit
    return found


def _bits(weight: Tensor) -> Tensor:
    """The bits of ``|w|`` as float32, ``[n k]`` int64."""
    return weight.float().abs().flatten().view(torch.int32).long()
