"""DARE: a fine-tuned model as its base and a sparse difference.

With ``D = W_tuned - W_base``, each element is dropped with probability ``p``, and what is left is
scaled up so that the expectation stays::

    DARE(D) = m * D / (1 - p)        m_ij = 1 with probability 1 - p, else 0        E[DARE(D)] = D

A linear of the base and its difference run as one, and many differences can share the base::

    delta = dare(base.weight, tuned.weight, 0.9, seed=0)
    nn.SumLinear([base, nn.SparseLinear(compress_sparse(delta.weight, delta.keep))])

Yu et al. 2023, arXiv 2311.03099.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.prune.pruned import PrunedTensor


@torch.no_grad()
def dare(base: Tensor, tuned: Tensor, drop: float, *, seed: int) -> PrunedTensor:
    """The sparse difference of two weights: add it to ``base`` to stand in for ``tuned``.

    Args:
        base: ``[n, k]`` floating point.
        tuned: alike.
        drop: the probability ``p``, 0 to below 1. With 0 the difference is exact.
        seed: of the choice. Give every weight of a model another one.

    Returns:
        ``m * (tuned - base) / (1 - drop)`` and ``m``.

    Raises:
        ValueError: weights of different shapes, or a probability out of its range.

    Example:
        >>> dare(torch.zeros(1, 4), torch.ones(1, 4), 0.5, seed=0).weight.unique().tolist()
        [0.0, 2.0]
    """
    if base.shape != tuned.shape or base.dim() != 2:
        raise ValueError(
            "dare: base and tuned must be [n, k] and alike, "
            f"got {list(base.shape)} and {list(tuned.shape)}"
        )
    if not 0 <= drop < 1:
        raise ValueError(f"dare: drop must be at least 0 and below 1, got {drop}")
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(base.shape, generator=generator) >= drop
    return PrunedTensor.of((tuned.float() - base.float()) / (1 - drop), keep)
