"""torch's 2:4 sparse linear, ``torch.sparse.to_sparse_semi_structured``: cuSPARSELt or CUTLASS."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from bench.competitors.torch_dense import products
from bench.problem import Competitor, Prepared, Variant
from bench.sparse_problem import NmProblem


def _prepare(problem: NmProblem, dtype: torch.dtype) -> Prepared:
    x = torch.from_numpy(problem.x).to(problem.device, dtype)
    dense = torch.from_numpy(problem.weight).to(problem.device, dtype)
    # Half the values, and two bits for each of them.
    weight_bytes = dense.nbytes // 2 + dense.numel() // 8
    groups, calls = problem.plan(weight_bytes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor")
        weights = [torch.sparse.to_sparse_semi_structured(dense) for _ in range(groups * calls)]
    return products(x, weights, weight_bytes, calls)


def _variants(problem: NmProblem) -> list[Variant]:
    if problem.pattern != "2:4":
        return []
    return [
        Variant(str(dtype).removeprefix("torch."), 16, partial(_prepare, problem, dtype))
        for dtype in (torch.float16, torch.bfloat16)
    ]


SEMI_STRUCTURED = Competitor(name="torch_2to4", missing=lambda: None, variants=_variants)
