"""The algorithms that prune one linear at a time, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from openwork.prune.magnitude import magnitude
from openwork.prune.masks import Pattern
from openwork.prune.pruned import PrunedTensor
from openwork.prune.sparsegpt import sparsegpt
from openwork.prune.wanda import wanda

# From a weight [n, k], the second moment [k, k] of its inputs ([0] without calibration), a pattern.
Method: TypeAlias = Callable[[Tensor, Tensor, Pattern], PrunedTensor]

# Adding an algorithm is adding a function here; prune_model and evopress also take one as it is.
METHODS: dict[str, Method] = {
    "magnitude": lambda weight, moment, pattern: magnitude(weight, pattern),
    "wanda": lambda weight, moment, pattern: wanda(weight, moment.diagonal(), pattern),
    "sparsegpt": sparsegpt,
}
