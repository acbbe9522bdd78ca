"""Which weights to keep: masks of an exact size from a matrix of scores.

A pattern says how the zeros of ``W [n, k]`` are arranged::

    Unstructured(s)     a share s of the weights, anywhere
    NM(N, M)            N of every M neighbouring columns of a row are kept
    NM(N, M, vector=V)  alike, and V neighbouring rows keep the same columns ("V:N:M")

    NM(2, 4, vector=2):   x . x .   . x x .        one index for both rows of a pair
                          x . x .   . x x .
                          . . x x   x . . x
                          . . x x   x . . x

Where ``M`` does not divide ``k`` the last block is short and keeps ``min(N, size)`` columns; where
``V`` does not divide ``n`` the last rows are a smaller set. Sets of rows are scored by the sum of
their scores, which is the right sum for scores that are squared errors.

A mask keeps the highest scores. Among equal scores it keeps those further left in a row, and for a
whole matrix those further up, so that a mask depends on nothing but the scores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from openwork.ops.nm_mask import largest_of_blocks


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere.

    Attributes:
        sparsity: share of zeros, 0 to 1. Counts are rounded to the nearest whole weight.

    Raises:
        ValueError: ``sparsity`` is not in 0 .. 1.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"Unstructured: sparsity must be in 0 .. 1, got {self.sparsity}")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` neighbouring columns are not zero.

    Attributes:
        n, m: 1 <= n < m <= 32.
        vector: neighbouring rows that keep the same columns, 1 to 128.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> NM.parse("2:4"), str(NM.parse("16:2:4"))
        (NM(n=2, m=4, vector=1), '16:2:4')
    """

    n: int
    m: int
    vector: int = 1

    def __post_init__(self) -> None:
        if not (1 <= self.n < self.m <= 32 and 1 <= self.vector <= 128):
            raise ValueError(
                "NM: 1 <= n < m <= 32 and vector in 1 .. 128 expected, got "
                f"n = {self.n}, m = {self.m} and vector = {self.vector}"
            )

    @classmethod
    def parse(cls, text: str) -> NM:
        """``"N:M"`` or ``"V:N:M"``.

        Raises:
            ValueError: another form, or a number out of its range.
        """
        if not re.fullmatch(r"(\d{1,3}:)?\d{1,3}:\d{1,3}", text):
            raise ValueError(f"NM: pattern 'N:M' or 'V:N:M' expected, got {text!r}")
        *vector, n, m = map(int, text.split(":"))
        return cls(n, m, *vector)

    @property
    def sparsity(self) -> float:
        """Share of zeros where every block is whole."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.vector == 1 else f"{self.vector}:{self.n}:{self.m}"


Pattern: TypeAlias = NM | Unstructured


def keep_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the highest scores of a whole matrix: all but ``round(sparsity n k)``.

    Args:
        scores: ``[n, k]`` float32, no nan.
        sparsity: 0 to 1.

    Returns:
        ``[n, k]`` bool.

    Example:
        >>> keep_layer(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.25)
        tensor([[ True,  True],
                [False,  True]])
    """
    flat = scores.flatten()
    drop = round(sparsity * len(flat))
    if drop == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(drop).values
    keep = flat > limit
    equal = (flat == limit).nonzero()[:, 0]
    keep[equal[: len(flat) - drop - int(keep.sum())]] = True
    return keep.view_as(scores)


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Keep the highest scores of each row: all but ``round(sparsity k)``.

    Args:
        scores: ``[n, k]`` float32, no nan.
        sparsity: 0 to 1.

    Returns:
        ``[n, k]`` bool.

    Example:
        >>> keep_rows(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 0.5)
        tensor([[ True, False,  True, False]])
    """
    k = scores.shape[1]
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : k - round(sparsity * k)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def keep_nm(scores: Tensor, pattern: NM) -> Tensor:
    """Keep the ``n`` highest scores of every ``m`` neighbouring columns of a set of rows.

    Args:
        scores: ``[n, k]`` float32, finite.
        pattern: the arrangement.

    Returns:
        ``[n, k]`` bool.

    Example:
        >>> keep_nm(torch.tensor([[1.0, 4.0, 2.0, 3.0, 7.0]]), NM(2, 4))
        tensor([[False,  True, False,  True,  True]])
    """
    return largest_of_blocks(scores, pattern.n, pattern.m, pattern.vector)


def follows(keep: Tensor, pattern: NM) -> bool:
    """Whether a mask ``[n, k]`` bool has the pattern: never more than ``n`` in a block, and the
    rows of a set alike."""
    rows, k = keep.shape
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -k % pattern.m))
    counts = padded.view(rows, -1, pattern.m).sum(2)
    first = torch.arange(rows) // pattern.vector * pattern.vector
    return bool((counts <= pattern.n).all()) and torch.equal(keep, keep[first])
