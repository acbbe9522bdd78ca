"""What the gradients of block attention are compared with: the forward pass, and torch's own.

The forward pass is :func:`openwork.ops.block_attention` on the same operands, so a speedup of 0.4
says that the gradients take 2.5 times as long. It is checked by the gradients that follow from its
results.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_problem import BlockGradientsProblem, flat
from bench.problem import Competitor, Prepared, Variant
from openwork.ops import block_attention
from openwork.testing.block_attention_train import backward


def _forward(problem: BlockGradientsProblem) -> Prepared:
    inputs = (*problem.operands, problem.index)
    result: list[tuple[Tensor, ...]] = []

    def run(group: int) -> None:
        result[:] = [tuple(block_attention(*inputs, return_lse=True))]

    def output() -> object:
        o, lse = result[0]
        return flat(backward(problem.grad_o, torch.zeros_like(lse), *inputs, o=o, lse=lse))

    return Prepared(run=run, groups=1, calls=1, weight_bytes=_bytes(problem), output=output)


def _sdpa(problem: BlockGradientsProblem) -> Prepared:
    # Gradients are not recorded in the inference mode that contenders run in.
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.transpose(1, 2).clone().requires_grad_() for x in problem.operands]
        grad_o = problem.grad_o.transpose(1, 2).clone()
        gqa = problem.h != problem.kv_heads
        o = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=gqa)
    result: list[tuple[Tensor, ...]] = []

    def run(group: int) -> None:
        with torch.inference_mode(False):
            result[:] = [torch.autograd.grad(o, inputs, grad_o, retain_graph=True)]

    return Prepared(
        run=run,
        groups=1,
        calls=1,
        weight_bytes=_bytes(problem),
        output=lambda: flat(x.transpose(1, 2) for x in result[0]),
    )


def _bytes(problem: BlockGradientsProblem) -> int:
    return sum(x.nbytes for x in problem.operands[1:])


def _bits(problem: BlockGradientsProblem) -> int:
    return torch.finfo(problem.operands[0].dtype).bits


def _forward_variants(problem: BlockGradientsProblem) -> list[Variant]:
    return [Variant("forward", _bits(problem), partial(_forward, problem))]


def _sdpa_variants(problem: BlockGradientsProblem) -> list[Variant]:
    if problem.index is not None:
        return []
    return [Variant("heads share keys", _bits(problem), partial(_sdpa, problem))]


FORWARD = Competitor(name="block_attention", missing=lambda: None, variants=_forward_variants)
SDPA = Competitor(name="torch_sdpa", missing=lambda: None, variants=_sdpa_variants)
