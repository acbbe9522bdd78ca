"""Hadamard transforms in torch: products with matrices, and the butterfly of sums and differences.

A product with the matrix of a block is a product with the two smaller ones that it is the Kronecker
product of, which takes 2 sqrt(block) in place of block multiply-adds an element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.hadamard_problem import HadamardProblem
from bench.problem import Competitor, Prepared, Variant
from openwork.testing.hadamard import hadamard_matrix

Transform = Callable[[Tensor], Tensor]


def _matrix(block: int, like: Tensor) -> Transform:
    matrix = hadamard_matrix(block).to(like)
    return lambda x: x.view(-1, block) @ matrix


def _two_matrices(block: int, like: Tensor) -> Transform:
    inner = 1 << (block.bit_length() - 1) // 2
    left, right = hadamard_matrix(block // inner).to(like), hadamard_matrix(inner).to(like)

    def transform(x: Tensor) -> Tensor:
        return left @ (x.view(-1, block // inner, inner) @ right)

    return transform


def _butterfly(block: int, like: Tensor) -> Transform:
    def transform(x: Tensor) -> Tensor:
        y = x.view(-1, block).float()
        h = 1
        while h < block:
            low, high = y.view(-1, block // (2 * h), 2, h).unbind(2)
            y = torch.stack((low + high, low - high), 2)
            h *= 2
        return (y * block**-0.5).to(like.dtype)

    return transform


def _prepare(problem: HadamardProblem, make: Callable[[int, Tensor], Transform]) -> Prepared:
    x = problem.x.to(problem.device)
    transform = make(problem.block, x)
    groups, calls = problem.plan(x.nbytes)
    copies = [x.clone() for _ in range(groups * calls)]
    result: list[Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = transform(copies[index])

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=x.nbytes,
        output=lambda: result[0].reshape(x.shape).float().cpu().numpy(),
    )


def _competitor(name: str, ways: dict[str, Callable[[int, Tensor], Transform]]) -> Competitor:
    def variants(problem: HadamardProblem) -> list[Variant]:
        bits = torch.finfo(problem.x.dtype).bits
        return [
            Variant(label, bits, partial(_prepare, problem, way)) for label, way in ways.items()
        ]

    return Competitor(name=name, missing=lambda: None, variants=variants)


MATMUL = _competitor("torch_matmul", {"one matrix": _matrix, "two matrices": _two_matrices})
BUTTERFLY = _competitor("torch_butterfly", {"fp32": _butterfly})
