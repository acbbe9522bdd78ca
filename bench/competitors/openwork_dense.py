"""Our own column kernel with no column skipped: what skipping is worth."""

from __future__ import annotations

from functools import partial

import torch

import openwork
from bench.problem import Competitor, Prepared, Variant
from bench.sparse_problem import ColumnProblem


def _pack(problem: ColumnProblem) -> openwork.ColumnWeight:
    weight = torch.from_numpy(problem.weight)
    if not problem.format.startswith("w"):
        return openwork.pack_columns(weight.to(getattr(torch, problem.format)))
    bits, group_size = int(problem.format[1:]), problem.group_size
    q = openwork.quant.rtn(weight, bits=bits, group_size=group_size)
    return openwork.pack_lowbit_columns(
        q.codes, q.scales, q.zeros, bits=bits, group_size=group_size
    )


def _prepare(problem: ColumnProblem) -> Prepared:
    x = torch.from_numpy(problem.x)
    weight = _pack(problem)
    groups, calls = problem.plan(weight.nbytes)
    weights = [weight.in_huge_pages() for _ in range(groups * calls)]
    result: list[torch.Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = openwork.active_linear(x, weights[index], 0.0)

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight.nbytes,
        output=lambda: result[0].numpy(),
    )


def _variants(problem: ColumnProblem) -> list[Variant]:
    bits = int(problem.format[1:]) if problem.format.startswith("w") else 16
    return [Variant(problem.format, bits, partial(_prepare, problem))]


DENSE = Competitor(name="openwork_dense", missing=lambda: None, variants=_variants)
