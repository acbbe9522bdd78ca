"""SLTrain: a weight that is the sum of a low-rank and a sparse matrix, trained from scratch.

::

    W = (alpha / r) B A + S        B [n, r], A [r, k], S zero but at a fixed random support

``W`` itself is never kept: it is put together for a product and again for its gradient, and what
is kept are ``r (n + k)`` numbers and one for each place of the support. With ``G = dL/dW``, the
dense gradient::

    dB = (alpha / r) G A^T        dA = (alpha / r) B^T G        dS = G on the support

Han et al. 2024, arXiv 2406.02214.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SparseLowRankLinear(nn.Module):
    """``y = x W^T + add`` with ``W = (alpha / rank) B A + S``.

    Starts from ``B = 0``, ``A`` uniform as in :class:`torch.nn.Linear`, and values of ``S`` uniform
    in ``+- 1 / sqrt(k)``.

    Args:
        k: inputs.
        n: outputs.
        rank: of the first term, at least 1.
        density: share of the places of ``W`` in the support of ``S``, 0 to 1.
        alpha: scale of the first term.
        seed: of the support.

    Attributes:
        support: ``[places]`` int64, ascending, row times k plus column.
        values: ``[places]``, of ``S``.

    Raises:
        ValueError: a size below 1 or a density out of its range.

    Example:
        >>> linear = SparseLowRankLinear(8, 6, rank=2, density=0.25)
        >>> linear(torch.ones(3, 8)).shape, len(linear.values)
        (torch.Size([3, 6]), 12)
    """

    def __init__(
        self,
        k: int,
        n: int,
        *,
        rank: int,
        density: float = 0.03,
        alpha: float = 32.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(k, n, rank) < 1 or not 0 <= density <= 1:
            raise ValueError(
                "SparseLowRankLinear: k, n and rank of at least 1 and density in 0 .. 1 expected, "
                f"got {k}, {n}, {rank} and {density}"
            )
        self.in_features, self.out_features = k, n
        self.scale = alpha / rank
        self.b = nn.Parameter(torch.zeros(n, rank))
        self.a = nn.Parameter(torch.empty(rank, k))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(n * k, generator=generator)[: round(density * n * k)]
        self.support: Tensor
        self.register_buffer("support", places.sort().values)
        bound = 1 / math.sqrt(k)
        self.values = nn.Parameter(torch.empty(len(places)).uniform_(-bound, bound))

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x [..., k] -> [..., n]``; ``add`` has the shape of the result."""
        y: Tensor = _Product.apply(x, self.b, self.a, self.values, self.support, self.scale)
        return y if add is None else y + add

    def dense(self) -> Tensor:
        """``W [n, k]``, without a gradient."""
        with torch.no_grad():
            return _dense(self.b, self.a, self.values, self.support, self.scale)


def _dense(b: Tensor, a: Tensor, values: Tensor, support: Tensor, scale: float) -> Tensor:
    weight = (b @ a).mul_(scale)
    weight.view(-1)[support] += values
    return weight


class _Product(torch.autograd.Function):
    """``x W^T``; saves the terms of ``W`` and not ``W``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b: Tensor, a: Tensor, values: Tensor, support: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, b, a, values, support)
        ctx.scale = scale
        return F.linear(x, _dense(b, a, values, support, scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, values, support = ctx.saved_tensors
        (dy,) = gradients
        dx = dy @ _dense(b, a, values, support, ctx.scale) if ctx.needs_input_grad[0] else None
        dense = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        db, da = (dense @ a.t()) * ctx.scale, (b.t() @ dense) * ctx.scale
        return dx, db, da, dense.view(-1)[support], None, None
