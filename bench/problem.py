"""One problem as every competitor sees it, and what a competitor hands back.

A matrix product:

    y[m, n] = x[m, k] @ w[n, k].T        x ~ N(0, 1),  w ~ U(-1, 1),  seeded, float32

Each competitor quantizes ``w`` in its own way and format. Its result is accepted when

    ||y - y_ref|| <= tolerance(bits) * ||y_ref||          (Frobenius norms, y_ref in float64)

Weights are uniform because the error of a min/max grid is then known: a group spans 2, a step is
``2 / (2**bits - 1)``, the deviation of the error is ``step / sqrt(12)`` and that of the weight
``1 / sqrt(3)``, so the relative error of a weight, and of a sum of independent products, is
``1 / (2**bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwork.testing.attention import decode_attention_reference
from openwork.testing.nm import BITS
from openwork.timing import Contender


class CheckError(RuntimeError):
    """A result that is not the product it should be; its time must not be reported."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How a problem is run.

    Attributes:
        threads: threads every competitor may use.
        cold_bytes: copies of the operand from memory (weight, cache) that are walked through must
            exceed this many bytes; 0 keeps one hot in the caches.
        batch: calls timed as one sample, if a competitor has that many copies.
        device: of torch, that operands of competitors lie on.
    """

    threads: int
    cold_bytes: int
    batch: int = 1
    device: str = "cpu"

    def plan(self, operand_bytes: int) -> tuple[int, int]:
        """Data sets for operands of ``operand_bytes``: ``(groups, calls)``.

        ``groups * calls`` operands together exceed :attr:`cold_bytes`, so that each is read from
        DRAM; ``calls`` of them are timed as one sample.
        """
        copies = max(1, -(-self.cold_bytes // operand_bytes))
        calls = min(self.batch, copies)
        return -(-copies // calls), calls


@dataclass(frozen=True, kw_only=True)
class Problem(Conditions):
    """Shapes and format of one product.

    Attributes:
        m, n, k: sizes of the product.
        bits, group_size, symmetric: format asked for; a competitor takes the nearest it has.
    """

    m: int
    n: int
    k: int
    bits: int
    group_size: int
    symmetric: bool = False

    @property
    def weight(self) -> NDArray[np.float32]:
        """``[n, k]`` float32, uniform in (-1, 1)."""
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


def dense_problem(dtype: str, **conditions: Any) -> Problem:
    """The dense product that a sparse one stands in for.

    What a sparse operator computes is checked against the reference of its case; its competitors
    multiply by all of the weight, in the width of ``dtype``, the type of the sparse one's values.
    """
    return Problem(bits=BITS[dtype], group_size=128, symmetric=True, **conditions)


@dataclass(frozen=True, kw_only=True)
class AttentionProblem(Conditions):
    """Causal attention of the last ``t`` of ``keys`` tokens, over a cache that is full.

    Attributes:
        b, t, h, kv_heads, d: sequences, queries, query heads, key heads, dimensions of a head.
        keys: tokens in the cache.
        dtype: name of torch's, of queries and cache.
    """

    b: int
    t: int
    h: int
    kv_heads: int
    d: int
    keys: int
    dtype: str

    @cached_property
    def q(self) -> Tensor:
        """``[b, t, h, d]``, normal."""
        return self._normal(3, self.b, self.t, self.h, self.d)

    @cached_property
    def cache(self) -> Tensor:
        """Keys, then values: ``[2, b, kv_heads, keys, d]``, normal."""
        return self._normal(4, 2, self.b, self.kv_heads, self.keys, self.d)

    def _normal(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """``[b, t, h, d]`` float64."""
        y: NDArray[np.float64] = decode_attention_reference(
            self.q, self.cache[0], self.cache[1], self.keys
        ).numpy()
        return y


@dataclass(frozen=True)
class Prepared(Contender):
    """A competitor ready to be timed: weights packed, buffers allocated.

    ``weight_bytes`` are the bytes of the operand from memory (a packed weight, a cache),
    ``output()`` is the float result of the last problem ``run`` computed, ``close`` frees what
    Python does not own. The object itself must live while ``run`` is called.
    """

    weight_bytes: int
    output: Callable[[], NDArray[np.floating]]
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Variant:
    """One way a competitor can compute a problem: a format, an engine or an option."""

    label: str
    bits: int
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Competitor:
    """Another library under test.

    ``missing()`` says why it cannot run here, or None. ``variants(problem)`` lists its candidates;
    the fastest of them is the one that is compared with.
    """

    name: str
    missing: Callable[[], str | None]
    variants: Callable[[Any], Sequence[Variant]]


@lru_cache(maxsize=1)
def uniform_weight(n: int, k: int) -> NDArray[np.float32]:
    """``[n, k]`` float32, uniform in (-1, 1), the same at every call; not to be written to.

    Cached, like everything quantized from it: rows that differ in m share their weight, and
    quantizing takes longer than measuring.
    """
    weight = np.random.default_rng(1).random((n, k), dtype=np.float32)
    weight *= 2
    weight -= 1
    return weight


def tolerance(bits: int) -> float:
    """Largest accepted relative error: 1.5 grid errors, and int8 activations.

    The grid's own error is ``1 / (2**bits - 1)`` (see the module); half as much again is left for
    formats that also round their scales. Activations in int8 per row or block step by at most
    ``2 * max|x| / 254``; with ``max|x| < 5.2`` for a million normal values that is an error of
    0.012. Dense formats (16 and 32 bits) get 2**-7, the rounding of one bfloat16 product.
    """
    return 2.0**-7 if bits >= 16 else 1.5 / (2**bits - 1) + 0.012


def check(
    name: str, y: NDArray[np.floating], reference: NDArray[np.float64], limit: float
) -> float:
    """Relative error of ``y``; raises :class:`CheckError` above ``limit`` or for a wrong shape."""
    if y.shape != reference.shape:
        raise CheckError(f"{name}: result must have shape {reference.shape}, got {y.shape}")
    error = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    if not error <= limit:
        raise CheckError(f"{name}: relative error must be at most {limit:.3g}, got {error:.3g}")
    return error
