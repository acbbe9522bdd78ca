"""openwork's own dense 4-bit linear: what a sparse 4-bit weight has to beat."""

from __future__ import annotations

from functools import partial

import torch

import openwork
from bench.grid import uniform_grid
from bench.problem import Competitor, Prepared, Problem, Variant


def _prepare(problem: Problem) -> Prepared:
    grid = uniform_grid(problem.n, problem.k, 4, problem.group_size, problem.symmetric)
    weight = openwork.pack_lowbit(
        torch.from_numpy(grid.codes),
        torch.from_numpy(grid.scales).half(),
        bits=4,
        group_size=problem.group_size,
    )
    x = torch.from_numpy(problem.x)
    groups, calls = problem.plan(weight.nbytes)
    weights = [weight.in_huge_pages() for _ in range(groups * calls)]
    result: list[torch.Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = openwork.lowbit_linear(x, weights[index], compute="int8")

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight.nbytes,
        output=lambda: result[0].numpy(),
    )


def _variants(problem: Problem) -> list[Variant]:
    """For rows of 4 bits."""
    return [Variant("int8 x", 4, partial(_prepare, problem))] if problem.bits == 4 else []


OPENWORK_INT4 = Competitor(name="openwork_int4", missing=lambda: None, variants=_variants)
