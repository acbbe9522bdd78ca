"""torch's own dense linear, in float32, bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.problem import Competitor, Prepared, Problem, Variant
from bench.sparse_problem import ProductProblem


def products(x: Tensor, weights: Sequence[Tensor], weight_bytes: int, calls: int) -> Prepared:
    """``linear`` of x and every weight, in groups of so many calls."""
    result: list[Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = linear(x, weights[index])

    return Prepared(
        run=run,
        groups=len(weights) // calls,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: result[0].float().cpu().numpy(),
    )


def _prepare(problem: Problem | ProductProblem, dtype: torch.dtype) -> Prepared:
    x = torch.from_numpy(problem.x).to(problem.device, dtype)
    weight = torch.from_numpy(problem.weight).to(problem.device, dtype)
    groups, calls = problem.plan(weight.nbytes)
    return products(x, [weight.clone() for _ in range(groups * calls)], weight.nbytes, calls)


def _competitor(name: str, dtype: torch.dtype) -> Competitor:
    label = str(dtype).removeprefix("torch.")
    return Competitor(
        name=name,
        missing=lambda: None,
        variants=lambda problem: [
            Variant(label, torch.finfo(dtype).bits, partial(_prepare, problem, dtype))
        ],
    )


FP32 = _competitor("torch_fp32", torch.float32)
BF16 = _competitor("torch_bf16", torch.bfloat16)
FP16 = _competitor("torch_fp16", torch.float16)
