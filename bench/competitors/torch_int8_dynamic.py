"""torch's dynamic int8 linear: int8 weights per row, activations quantized per call.

Both engines take part, the faster one counts.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch

from bench.problem import Competitor, Prepared, Problem, Variant

ENGINES = ("onednn", "fbgemm")


def _prepare(problem: Problem, engine: str) -> Prepared:
    weight = torch.from_numpy(problem.weight)
    scales = weight.abs().amax(dim=1) / 127
    with warnings.catch_warnings():
        # torch announces that eager quantization moves to torchao; the kernels stay the same.
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_channel(
            weight, scales, torch.zeros(problem.n, dtype=torch.int64), 0, torch.qint8
        )
    weight_bytes = problem.n * problem.k
    groups, calls = problem.plan(weight_bytes)
    # The engine decides the class of the packed weight, and the class which kernel runs.
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        prepack = torch.ops.quantized.linear_prepack
        weights = [prepack(quantized, None) for _ in range(groups * calls)]
    finally:
        torch.backends.quantized.engine = before

    x = torch.from_numpy(problem.x)
    result: list[torch.Tensor] = [torch.empty(0)]
    multiply = torch.ops.quantized.linear_dynamic

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = multiply(x, weights[index], False)

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: result[0].numpy(),
    )


def _variants(problem: Problem) -> list[Variant]:
    supported = torch.backends.quantized.supported_engines
    return [
        Variant(engine, 8, partial(_prepare, problem, engine))
        for engine in ENGINES
        if engine in supported
    ]


INT8_DYNAMIC = Competitor(name="torch_int8_dynamic", missing=lambda: None, variants=_variants)
