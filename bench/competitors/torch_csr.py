"""torch's sparse CSR product, which MKL computes."""

from __future__ import annotations

import warnings
from functools import partial

import torch

from bench.problem import Competitor, Prepared, Variant
from bench.sparse_problem import SparseProblem


def _csr(dense: torch.Tensor) -> torch.Tensor:
    """With 32-bit indices, which MKL takes as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        csr = dense.to_sparse_csr()
        return torch.sparse_csr_tensor(
            csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape
        )


def _prepare(problem: SparseProblem, vector: bool) -> Prepared:
    x = torch.from_numpy(problem.x)
    columns = x[0].contiguous() if vector else x.T.contiguous()
    weight = _csr(torch.from_numpy(problem.weight))
    weight_bytes = weight.crow_indices().nbytes + weight.values().nbytes * 2
    groups, calls = problem.plan(weight_bytes)
    weights = [weight.clone() for _ in range(groups * calls)]
    result: list[torch.Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = weights[index] @ columns

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: (result[0][None] if vector else result[0].T).numpy(),
    )


def _variants(problem: SparseProblem) -> list[Variant]:
    ways = {"matrix": False} | ({"vector": True} if problem.m == 1 else {})
    return [Variant(name, 32, partial(_prepare, problem, way)) for name, way in ways.items()]


CSR = Competitor(name="torch_csr", missing=lambda: None, variants=_variants)
