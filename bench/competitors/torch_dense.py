"""torch's own dense linear, in float32, bfloat16 and float16."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import linear

from bench.problem import Competitor, Prepared, Problem, Variant
from bench.sparse_problem import ProductProblem


def _prepare(problem: Problem | ProductProblem, dtype: torch.dtype) -> Prepared:
    x = torch.from_numpy(problem.x).to(problem.device, dtype)
    weight = torch.from_numpy(problem.weight).to(problem.device, dtype)
    weight_bytes = weight.nbytes
    groups, calls = problem.plan(weight_bytes)
    weights = [weight.clone() for _ in range(groups * calls)]
    result: list[torch.Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = linear(x, weights[index])

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: result[0].float().cpu().numpy(),
    )


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
