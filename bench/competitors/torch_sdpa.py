"""torch's scaled dot product attention over a cache, in the dtype of the problem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.problem import AttentionProblem, Competitor, Prepared, Variant

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _by_head(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every query head on its own, with a causal mask where there are several queries."""
    t, n = q.shape[1], keys.shape[2]
    mask = torch.ones(t, n, dtype=torch.bool).tril_(n - t) if t > 1 else None
    y = scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=q.shape[2] != keys.shape[1]
    )
    return y.transpose(1, 2)


def _by_group(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query, which sees every key: the heads of a group pose as queries of one head."""
    b, _, h, d = q.shape
    g = keys.shape[1]
    y = scaled_dot_product_attention(q.view(b, g, h // g, d), keys, values)
    return y.reshape(b, 1, h, d)


def _prepare(problem: AttentionProblem, attend: Attend) -> Prepared:
    q, cache = problem.q, problem.cache
    groups, calls = problem.plan(cache.nbytes)
    caches = [cache.clone() for _ in range(groups * calls)]
    result: list[Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            result[0] = attend(q, caches[index][0], caches[index][1])

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=cache.nbytes,
        output=lambda: result[0].float().numpy(),
    )


def _variants(problem: AttentionProblem) -> list[Variant]:
    ways = {"by head": _by_head} | ({"by group": _by_group} if problem.t == 1 else {})
    bits = torch.finfo(problem.q.dtype).bits
    return [Variant(name, bits, partial(_prepare, problem, way)) for name, way in ways.items()]


SDPA = Competitor(name="torch_sdpa", missing=lambda: None, variants=_variants)
