"""Causal attention of a sequence over the key blocks of a random index, and its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.problem import Conditions
from openwork import BlockIndex
from openwork.testing.attention_workloads import WORKLOAD_BLOCK, make_index, make_operands
from openwork.testing.block_attention import block_attention_reference
from openwork.testing.block_attention_train import backward_reference, workload_gradient


@dataclass(frozen=True, kw_only=True)
class BlockAttentionProblem(Conditions):
    """What the workload of the same parameters computes.

    Attributes:
        keys: tokens.
        h, kv_heads, d: query heads, key heads, dimensions of a head.
        dtype: name of torch's.
        density: share of the key blocks, at or before those of the queries, that are listed.
        queries: of the last tokens; None: of all.
    """

    keys: int
    h: int
    kv_heads: int
    d: int
    dtype: str
    density: float
    queries: int | None = None

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[1, queries, h, d]``, k and v ``[1, keys, kv_heads, d]``."""
        queries = self.queries or self.keys
        shape = (1, queries, self.keys, self.h, self.kv_heads, self.d, self.d)
        return make_operands(*shape, getattr(torch, self.dtype))

    @cached_property
    def index(self) -> BlockIndex | None:
        """None for a density of 1."""
        if self.density == 1:
            return None
        lengths = [(self.keys, self.keys)]
        return make_index(lengths, self.h, WORKLOAD_BLOCK, WORKLOAD_BLOCK, self.density)

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """``[1, queries, h, d]`` float64."""
        y: NDArray[np.float64] = block_attention_reference(*self.operands, self.index)[0].numpy()
        return y


@dataclass(frozen=True, kw_only=True)
class BlockGradientsProblem(BlockAttentionProblem):
    """Gradients of q, k and v, given that of o."""

    @cached_property
    def grad_o(self) -> Tensor:
        """``[1, keys, h, d]``."""
        return workload_gradient(vars(self))

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """The three, one after another."""
        lse = torch.zeros(1, self.keys, self.h)
        return flat(backward_reference(self.grad_o, lse, *self.operands, self.index)).astype(float)


def flat(gradients: Iterable[Tensor]) -> NDArray[np.floating]:
    """All elements, one tensor after another."""
    joined: NDArray[np.floating] = torch.cat(
        [x.detach().reshape(-1).double() for x in gradients]
    ).numpy()
    return joined
