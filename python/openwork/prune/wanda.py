"""Wanda: weights go by how much they move the output, one at a time.

::

    score_ij = |W_ij| * sqrt(E[x_j^2])

the output's change, in root mean square, if ``W_ij`` alone were 0. Scores are compared within a
row, or within a block of an N:M pattern, and no other weight is changed.

Sun et al. 2023, arXiv 2306.11695. Different here: rows that share their columns (V:N:M) are scored
by the sum of squares, the error of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.prune.masks import NM, Pattern, keep_nm, keep_rows
from openwork.prune.pruned import PrunedTensor
from openwork.quant.grid import check_weight


@torch.no_grad()
def wanda(weight: Tensor, energy: Tensor, pattern: Pattern) -> PrunedTensor:
    """Remove the weights of least ``|W_ij| sqrt(E[x_j^2])`` of each row.

    Args:
        weight: ``[n, k]`` floating point, finite.
        energy: ``[k]`` floating point, ``E[x_j^2]`` of the inputs on any positive scale: the
            diagonal of :class:`~openwork.quant.InputSecondMoment`.
        pattern: unstructured zeros are ``round(sparsity k)`` in every row.

    Returns:
        The kept weights, unchanged.

    Raises:
        ValueError: a weight that is not a finite matrix, or an energy that is not ``[k]``, finite
            and at least 0.

    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 1.0]), NM(1, 2)).weight.tolist()
        [[1.0, 0.0]]
    """
    check_weight("wanda", weight)
    k = weight.shape[1]
    if list(energy.shape) != [k] or not energy.is_floating_point():
        raise ValueError(
            f"wanda: energy must be [k] = {[k]} floating point, "
            f"got {list(energy.shape)} {energy.dtype}"
        )
    if not bool((torch.isfinite(energy) & (energy >= 0)).all()):
        raise ValueError("wanda: energy must be finite and at least 0")
    scores = weight.float().abs() * energy.float().sqrt()
    if isinstance(pattern, NM):
        keep = keep_nm(scores if pattern.vector == 1 else scores.square(), pattern)
    else:
        keep = keep_rows(scores, pattern.sparsity)
    return PrunedTensor.of(weight, keep)
