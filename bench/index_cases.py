"""Estimators of sparse attention, as rows ``index_<estimator>``, against the attention they steer.

The competitor is :func:`openwork.ops.block_attention` with the index that was built, so a speedup
of 10 says that the estimate takes a tenth of what it saves work in. Queries and keys are normal:
what is listed is then arbitrary, but how much is listed, and so the time of both, follows from the
budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.problem import CheckError, Competitor, Conditions, Prepared, Variant
from openwork import BlockIndex, attention
from openwork.ops import block_attention
from openwork.testing import Cost, OpCase, Sample, Workload
from openwork.testing.case import Unit

# Queries at the end whose attention is checked: all of it would take minutes in float64.
_CHECKED = 64

Estimator = Callable[[Tensor, Tensor], BlockIndex]
ESTIMATORS: dict[str, Estimator] = {
    "index_a_shape": lambda q, k: attention.a_shape_index([q.shape[1]], window=1024, sinks=64),
    "index_vertical_slash": lambda q, k: attention.vertical_slash_index(q, k, 500, 110),
    "index_block_topk": lambda q, k: attention.block_topk_index(q, k, 16),
    "index_flexprefill": lambda q, k: attention.flexprefill_index(q, k, 0.3, max_budget=1024),
    "index_hip": lambda q, k: attention.hip_index(q, k, 12),
}
# Estimators that multiply the last queries with every key; the others read all queries instead.
_PROBES = {"index_vertical_slash": 64, "index_flexprefill": 64}


def _operands(params: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    n, h, g, d = (params[name] for name in ("keys", "h", "kv_heads", "d"))
    made = [torch.randn(1, n, heads, d, generator=generator) for heads in (h, g, g)]
    q, k, v = (x.to(getattr(torch, params["dtype"])) for x in made)
    return q, k, v


def last_rows(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> Tensor:
    """Attention of the last queries over what their block lists: ``[_CHECKED, h, d]`` float64."""
    n, h, d = q.shape[1:]
    result = torch.zeros(_CHECKED, h, d, dtype=torch.float64)
    visible = torch.ones(_CHECKED, n, dtype=torch.bool).tril(n - _CHECKED)
    for x in range(h):
        row = min(x, index.index_heads - 1)
        begin, end = index.indptr[row, -2:].tolist()
        listed = torch.zeros(n, dtype=torch.bool)
        listed.view(-1, index.block_n)[index.indices[begin:end].long()] = True
        if index.columns is not None and index.column_indptr is not None:
            begin, end = index.column_indptr[row, -2:].tolist()
            listed[index.columns[begin:end].long()] = True
        head = x // (h // k.shape[2])
        scores = q[0, -_CHECKED:, x].double() @ k[0, :, head].double().T / d**0.5
        weights = scores.masked_fill(~(visible & listed), -torch.inf).softmax(-1)
        result[:, x] = weights @ v[0, :, head].double()
    return result


@dataclass(frozen=True)
class IndexCase(OpCase):
    """An estimator. Its result is checked by what is true of every index of it."""

    def check(self, sample: Sample) -> None:
        """Lists are those of one thread, and the attention over them is that of the formula."""
        q, k = sample.args
        index = self.op(q, k)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            again = self.op(q, k)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(index.indptr, again.indptr), f"{self.name}: depends on threads"
        assert torch.equal(index.indices, again.indices), f"{self.name}: depends on threads"
        o = block_attention(q, k, k, index)
        assert isinstance(o, Tensor)
        want = last_rows(q, k, k, index)
        error = (o[0, -_CHECKED:].double() - want).norm() / want.norm()
        assert error <= 2.0**-7, f"{self.name}: attention over the index is wrong by {error:.3g}"


@dataclass(frozen=True, kw_only=True)
class IndexProblem(Conditions):
    """Attention over the index that an estimator builds."""

    estimator: str
    h: int
    kv_heads: int
    d: int
    keys: int
    dtype: str

    @cached_property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return _operands(vars(self))

    @cached_property
    def index(self) -> BlockIndex:
        q, k, _ = self.operands
        return ESTIMATORS[self.estimator](q, k)

    @cached_property
    def reference(self) -> NDArray[np.float64]:
        """Of the last queries."""
        rows: NDArray[np.float64] = last_rows(*self.operands, self.index).numpy()
        return rows


def _prepare(problem: IndexProblem) -> Prepared:
    q, k, v = problem.operands
    result: list[Tensor] = [torch.empty(0)]

    def run(group: int) -> None:
        o = block_attention(q, k, v, problem.index)
        if not isinstance(o, Tensor):
            raise CheckError("block_attention: one result expected, got several")
        result[0] = o

    return Prepared(
        run=run,
        groups=1,
        calls=1,
        weight_bytes=k.nbytes + v.nbytes,
        output=lambda: result[0][0, -_CHECKED:].float().numpy(),
    )


def _variants(problem: IndexProblem) -> list[Variant]:
    density = problem.index.density([problem.keys], [problem.keys])
    return [Variant(f"density {density:.2f}", 16, partial(_prepare, problem))]


STEERED = Competitor(name="block_attention", missing=lambda: None, variants=_variants)


def _workload(name: str, h: int, kv_heads: int, d: int, dtype: str) -> Workload:
    # Hot: q and k are larger than caches that are not shared, and are read once.
    params = {
        "estimator": name,
        "h": h,
        "kv_heads": kv_heads,
        "d": d,
        "keys": 8192,
        "dtype": dtype,
        "hot": True,
    }
    return Workload(params, lambda: Sample("workload", _operands(params)[:2]))


def _cost(params: Mapping[str, Any]) -> Cost:
    n, h, g, d = (params[name] for name in ("keys", "h", "kv_heads", "d"))
    probes = _PROBES.get(params["estimator"], 0)
    size = getattr(torch, params["dtype"]).itemsize
    read = (probes or n) * h + n * g
    if params["estimator"] == "index_a_shape":
        return Cost(n // 64 * 4 * (1024 // 64 + 2), 0, "fp32")  # the lists it writes
    unit: Unit = "bf16" if params["dtype"] == "bfloat16" else "fp32"
    return Cost(read * d * size, 2 * probes * n * h * d, unit)


CASES: tuple[OpCase, ...] = tuple(
    IndexCase(
        name,
        op,
        op,
        lambda sample, expected: (),
        raw=lambda sample: sample.args,
        samples=lambda: (),
        rejects=lambda: (),
        workloads=tuple(
            _workload(name, *heads, dtype)
            for heads in ((32, 8, 128), (9, 3, 64))
            for dtype in ("float32", "bfloat16")
        ),
        cost=_cost,
    )
    for name, op in ESTIMATORS.items()
)
