"""torch's attention over a dense cache, in the dtype of the problem.

``SDPA`` is ``scaled_dot_product_attention`` as one would call it; ``FOLDED`` the best that can be
said in torch: the heads of a group as more queries of one head.
"""

from __future__ import annotations

import math
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


def _folded(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """``[b, kv_heads, t * group, d]``, and which of them see which key if not all do."""
    b, t, h, d = q.shape
    g, n = keys.shape[1:3]
    rows = q.view(b, t, g, h // g, d).transpose(1, 2).reshape(b, g, -1, d)
    if t == 1:
        return rows, None
    mask = torch.ones(t, n, dtype=torch.bool).tril_(n - t)
    return rows, mask.repeat_interleave(h // g, 0)


def _unfolded(y: Tensor, t: int) -> Tensor:
    b, g, rows, d = y.shape
    return y.view(b, g, t, rows // t, d).transpose(1, 2).reshape(b, t, -1, d)


def _by_group(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    rows, mask = _folded(q, keys)
    return _unfolded(scaled_dot_product_attention(rows, keys, values, attn_mask=mask), q.shape[1])


def _by_products(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Two matrix products and a softmax."""
    rows, mask = _folded(q, keys)
    scores = (rows * q.shape[3] ** -0.5) @ keys.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return _unfolded(scores.softmax(-1) @ values, q.shape[1])


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


def _variants(ways: dict[str, Attend], problem: AttentionProblem) -> list[Variant]:
    bits = torch.finfo(problem.q.dtype).bits
    return [Variant(name, bits, partial(_prepare, problem, way)) for name, way in ways.items()]


SDPA = Competitor(
    name="torch_sdpa",
    missing=lambda: None,
    variants=partial(_variants, {"by head": _by_head}),
)
FOLDED = Competitor(
    name="torch_folded",
    missing=lambda: None,
    variants=partial(_variants, {"sdpa": _by_group, "products": _by_products}),
)
