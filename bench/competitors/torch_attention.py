"""torch's attention of whole sequences: the fused dense operator, and FlexAttention compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_problem import BlockAttentionProblem
from bench.problem import Competitor, Prepared, Variant
from openwork.testing.attention_workloads import WORKLOAD_BLOCK

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _prepare(problem: BlockAttentionProblem, make: Callable[[], Attend], repeat: bool) -> Prepared:
    q, k, v = (x.transpose(1, 2).contiguous() for x in problem.operands)
    if repeat:
        k, v = (x.repeat_interleave(problem.h // problem.kv_heads, dim=1) for x in (k, v))
    attend = make()
    groups, calls = problem.plan(k.nbytes + v.nbytes)
    pairs = [(k.clone(), v.clone()) for _ in range(groups * calls)]
    result: list[Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for keys, values in pairs[group * calls : (group + 1) * calls]:
            result[0] = attend(q, keys, values)

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=k.nbytes + v.nbytes,
        output=lambda: result[0].transpose(1, 2).float().numpy(),
    )


def _sdpa(problem: BlockAttentionProblem) -> Attend:
    mask: Tensor | None = None
    if problem.queries is not None:  # the first one sees more than the one key of torch's own mask
        mask = torch.ones(problem.queries, problem.keys, dtype=torch.bool)
        mask = mask.tril(problem.keys - problem.queries)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )

    return attend


def _sdpa_variants(problem: BlockAttentionProblem) -> list[Variant]:
    if problem.index is not None:
        return []
    bits = torch.finfo(problem.operands[0].dtype).bits
    return [
        Variant(name, bits, partial(_prepare, problem, partial(_sdpa, problem), repeat))
        for name, repeat in (("heads share keys", False), ("keys repeated", True))
    ]


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, h, rows, blocks]`` bool as how many blocks of each row, and which come first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int(), order.int().contiguous()


def block_mask(problem: BlockAttentionProblem) -> BlockMask:
    """The problem's index as FlexAttention takes it: full blocks need no mask."""
    rows = -(-problem.keys // WORKLOAD_BLOCK)
    possible = torch.ones(rows, rows, dtype=torch.bool).tril()
    if problem.index is None:
        chosen = possible.expand(1, problem.h, rows, rows)
    else:
        mask = problem.index.to_mask([problem.keys], [problem.keys])[0]
        chosen = mask[:, ::WORKLOAD_BLOCK, ::WORKLOAD_BLOCK][None] & possible
    diagonal = torch.eye(rows, dtype=torch.bool)
    return BlockMask.from_kv_blocks(
        *_lists(chosen & diagonal),
        *_lists(chosen & ~diagonal),
        BLOCK_SIZE=WORKLOAD_BLOCK,
        mask_mod=_causal,
        seq_lengths=(problem.keys, problem.keys),
    )


def _flex(problem: BlockAttentionProblem) -> Attend:
    # Past some number of shapes torch runs the uncompiled operator without a word.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = block_mask(problem)
    gqa = problem.h != problem.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def _flex_variants(problem: BlockAttentionProblem) -> list[Variant]:
    if problem.queries is not None:
        return []
    bits = torch.finfo(problem.operands[0].dtype).bits
    name = f"compiled, blocks of {WORKLOAD_BLOCK}"
    return [Variant(name, bits, partial(_prepare, problem, partial(_flex, problem), False))]


SDPA = Competitor(name="torch_sdpa", missing=lambda: None, variants=_sdpa_variants)
FLEX = Competitor(name="flex", missing=lambda: None, variants=_flex_variants)
