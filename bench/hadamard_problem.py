"""A Hadamard transform of rows as competitors see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.problem import Conditions
from openwork.testing.hadamard import hadamard_reference


@dataclass(frozen=True, kw_only=True)
class HadamardProblem(Conditions):
    """Blocks of ``block`` of each row are transformed.

    Attributes:
        m, d: rows and their width.
        block: of a row.
        dtype: name of torch's.
    """

    m: int
    d: int
    block: int
    dtype: str

    @cached_property
    def x(self) -> Tensor:
        """``[m, d]``, normal."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(self.m, self.d, generator=generator).to(getattr(torch, self.dtype))

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """``[m, d]`` float64."""
        y: NDArray[np.float64] = hadamard_reference(self.x, self.block).numpy()
        return y
