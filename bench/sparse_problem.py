"""Products with sparse weights, and with dense ones for activation sparsity, as competitors see
them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.problem import Conditions, uniform_weight


@dataclass(frozen=True, kw_only=True)
class ProductProblem(Conditions):
    """A matrix product of float32, ``y[m, n] = x[m, k] @ weight[n, k].T``.

    Attributes:
        m, n, k: sizes of the product.
    """

    m: int
    n: int
    k: int

    @property
    def weight(self) -> NDArray[np.float32]:
        """``[n, k]`` float32."""
        return uniform_weight(self.n, self.k)

    @cached_property
    def x(self) -> NDArray[np.float32]:
        """``[m, k]`` float32, normal."""
        return np.random.default_rng(2).standard_normal((self.m, self.k)).astype(np.float32)

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """``[m, n]`` float64: the product itself."""
        y: NDArray[np.float64] = self.x.astype(np.float64) @ self.weight.astype(np.float64).T
        return y


@dataclass(frozen=True, kw_only=True)
class SparseProblem(ProductProblem):
    """A weight of which a share is not zero; dense competitors multiply the zeros too.

    Attributes:
        density: share of elements, or of blocks, that are not zero.
        block: rows and columns of a block; 1: any elements.
    """

    density: float
    block: int = 1

    @property
    def weight(self) -> NDArray[np.float32]:
        """``[n, k]`` float32."""
        return sparse_weight(self.n, self.k, self.density, self.block)


@dataclass(frozen=True, kw_only=True)
class NmProblem(ProductProblem):
    """A weight of which the first N of every M in a row are not zero.

    Attributes:
        pattern: such as "2:4".
    """

    pattern: str

    @property
    def weight(self) -> NDArray[np.float32]:
        """``[n, k]`` float32."""
        kept, block = map(int, self.pattern.split(":"))
        weight: NDArray[np.float32] = uniform_weight(self.n, self.k) * (
            np.arange(self.k) % block < kept
        )
        return weight


@dataclass(frozen=True, kw_only=True)
class ColumnProblem(ProductProblem):
    """The dense product that ``active_linear`` takes a share of the columns of.

    Attributes:
        format: dtype of the weight, or "w2", "w3", "w4", "w8": codes with a scale for each
            ``group_size`` columns.
    """

    format: str
    group_size: int


@lru_cache(maxsize=1)
def sparse_weight(n: int, k: int, density: float, block: int) -> NDArray[np.float32]:
    """``[n, k]`` float32 with random elements or blocks of it zero; not to be written to."""
    shape = (-(-n // block), -(-k // block))
    mask = np.random.default_rng(3).random(shape, dtype=np.float32) < density
    each = np.kron(mask, np.ones((block, block), dtype=np.bool_))[:n, :k] if block > 1 else mask
    weight: NDArray[np.float32] = uniform_weight(n, k) * each
    return weight
