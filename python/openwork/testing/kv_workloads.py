"""Long caches to time operators on: their tables are filled, their tokens are whatever is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kv_format import KVFormat
from ..kv_pages import KVPages
from .case import Cost, Sample, Workload

# Tokens that are appended before the cache is set back to its length.
_ROUND = 4096

FORMATS = {
    "bf16": (KVFormat(16), KVFormat(16)),
    "kivi4": (KVFormat(4, "channel", 32, step=128), KVFormat(4, "token", 32, window=128)),
    "kivi2": (KVFormat(2, "channel", 32, step=128), KVFormat(2, "token", 32, window=128)),
}


@dataclass
class Filled:
    """A cache of one sequence with ``tokens`` tokens, in place of a history."""

    tokens: int
    kv_heads: int
    d: int
    formats: tuple[KVFormat, KVFormat]
    bounds: bool
    page_size: int = 64
    b: int = 1
    cache: KVPages = field(init=False)

    def __post_init__(self) -> None:
        keys, values = self.formats
        self.cache = KVPages.allocate(
            1,
            self.kv_heads,
            self.d,
            self.tokens + 2 * _ROUND,
            keys=keys,
            values=values,
            dtype=torch.bfloat16,
            page_size=self.page_size,
            bounds=self.bounds,
        )
        if self.bounds:
            assert self.cache.key_min is not None
            assert self.cache.key_max is not None
            self.cache.key_min.normal_().abs_().neg_()
            self.cache.key_max.normal_().abs_()
        self.cache.reserve(self.tokens)
        self._set_back()

    def _set_back(self) -> None:
        self.cache.lengths.fill_(self.tokens)
        for fmt, side in zip(self.formats, (self.cache.keys, self.cache.values), strict=True):
            if side.committed is not None:
                due = max(self.tokens - fmt.window, 0) // fmt.step * fmt.step
                side.committed.fill_(due)

    def pages(self) -> KVPages:
        if self.cache.lengths[0, 0] >= self.tokens + _ROUND:
            self._set_back()
        return self.cache

    def state(self, pages: KVPages) -> tuple[Tensor, ...]:
        """What is cheap to look at while others are timed."""
        return (pages.lengths,)

    def reference(self) -> FilledReference:
        return FilledReference(self)

    def reference_state(self, cache: FilledReference) -> tuple[Tensor, ...]:
        return (cache.lengths,)


class FilledReference:
    """What the operators make of a :class:`Filled`, as far as it is checked."""

    def __init__(self, filled: Filled) -> None:
        self.filled = filled
        # The operator has been called once.
        self.lengths = torch.full((1, filled.kv_heads), filled.tokens, dtype=torch.int32)

    def kv_append(self, keys: Tensor, values: Tensor) -> None:
        self.lengths += keys.shape[1]

    def page_scores(
        self, q: Tensor, page_size: int, chunks: bool, sum_: bool
    ) -> list[list[Tensor]]:
        """In float64, one head at a time."""
        pages = self.filled.cache
        assert pages.key_min is not None
        assert pages.key_max is not None
        held = pages.lengths if pages.keys.committed is None else pages.keys.committed
        group = q.shape[2] // self.filled.kv_heads
        scores = []
        for head in range(self.filled.kv_heads):
            table = pages.block_table[0, head, : -(-int(held[0, head]) // page_size)].long()
            low, high = pages.key_min[table].double(), pages.key_max[table].double()
            if not chunks:
                low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
            queries = q[0, :, head * group : (head + 1) * group].reshape(-1, self.filled.d).double()
            products = [torch.maximum(x * low, x * high).sum(-1).amax(-1) for x in queries]
            stacked = torch.stack(products)
            scores.append(stacked.sum(0) if sum_ else stacked.amax(0))
        return [scores]


def append_workloads() -> Iterator[Workload]:
    """One token at 1k to 128k tokens: the time must not depend on them."""
    for name in FORMATS:
        for tokens in (1024, 8192, 32768, 131072):
            params = {"tokens": tokens, "kv_heads": 8, "d": 128, "format": name, "hot": True}
            yield Workload(params, _append_maker(params))


def _append_maker(params: Mapping[str, Any]) -> Any:
    def make() -> Sample:
        filled = Filled(
            params["tokens"], params["kv_heads"], params["d"], FORMATS[params["format"]], False
        )
        x = torch.randn(1, 1, params["kv_heads"], params["d"]).bfloat16()
        return Sample("workload", (filled, x, x))

    return make


def append_cost(params: Mapping[str, Any]) -> Cost:
    """Keys and values are read and written."""
    return Cost(2 * 2 * 2 * params["kv_heads"] * params["d"], 0, "fp32")


def select_workloads() -> Iterator[Workload]:
    """Decoding at 8k to 128k tokens with a budget of 4096 tokens."""
    for method in ("flat", "chunks"):
        for tokens in (8192, 32768, 131072):
            params = {"tokens": tokens, "h": 32, "kv_heads": 8, "d": 128, "method": method}
            yield Workload(params, _select_maker(params))


def _select_maker(params: Mapping[str, Any]) -> Any:
    def make() -> Sample:
        filled = Filled(
            params["tokens"], params["kv_heads"], params["d"], FORMATS["bf16"], bounds=True
        )
        q = torch.randn(1, 1, params["h"], params["d"]).bfloat16()
        return Sample("workload", (filled, q, 64, params["method"], "max"))

    return make


def select_cost(params: Mapping[str, Any]) -> Cost:
    """Two bounds of bf16 for each 16 tokens, and two products with each query."""
    numbers = params["tokens"] // 16 * params["d"]
    return Cost(2 * 2 * params["kv_heads"] * numbers, 4 * params["h"] * numbers, "fp32")
