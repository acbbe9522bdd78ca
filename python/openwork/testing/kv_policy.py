"""The operators that shrink pages and choose among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .case import OpCase, Reject, Sample
from .kv_cache import (
    BF16,
    DAMAGES,
    FORMATS,
    History,
    changing,
    changing_reference,
    dense,
    exact,
    reserved,
)
from .kv_workloads import select_cost, select_workloads


def kept_tokens(lists: list[list[list[int]]]) -> Tensor:
    """``[b, kv_heads, n]`` int32, filled up with -1."""
    n = max(len(tokens) for heads in lists for tokens in heads)
    return torch.tensor(
        [[tokens + [-1] * (n - len(tokens)) for tokens in heads] for heads in lists],
        dtype=torch.int32,
    ).view(len(lists), len(lists[0]), n)


def _some(length: int, share: float, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.nonzero(torch.rand(length, generator=generator) < share).flatten().tolist()


def _compact_samples() -> Iterator[Sample]:
    for name, (keys, values) in (*FORMATS.items(), ("dense16", dense(BF16))):
        history = History(keys, values).appended(150, 1)
        # Most, few; none, a group that stays whole; the last tokens.
        lists = [
            [_some(150, 0.9, 1), _some(150, 0.2, 2)],
            [[], [3, *range(32, 64), *range(96, 150)]],
        ]
        yield Sample(name, (history, kept_tokens(lists)))
        path = [[[141, 143, 148], [140, 149]], [[20, 40], [16, 17, 18]]]
        begins = torch.tensor([140, 16], dtype=torch.int32)
        yield Sample(f"{name}-path", (history, kept_tokens(path)), {"begins": begins})
    history = History(*dense(BF16)).appended(5, 1)
    yield Sample("nothing", (history, kept_tokens([[[], []], [[], []]])))


def _compact_rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    good = kept_tokens([[[1, 2], [3]], [[], [69]]])

    def bad(lists: list[list[list[int]]]) -> tuple[History, Tensor]:
        return history, kept_tokens(lists)

    yield Reject("dtype", (history, good.long()), {}, "kept must be int32, got int64")
    yield Reject("rank", (history, good[0]), {}, "kept must be [b, kv_heads, n], got [2, 2]")
    message = "kept must rise in 0 .. 69 and end in -1, got"
    yield Reject("order", bad([[[2, 2], [3]], [[], []]]), {}, message, of_values=True)
    yield Reject("held", bad([[[2, 70], [3]], [[], []]]), {}, message, of_values=True)
    yield Reject("gap", bad([[[-1, 2], [3]], [[], []]]), {}, message, of_values=True)
    begins = torch.tensor([71, 0], dtype=torch.int32)
    yield Reject(
        "begins", (history, good), {"begins": begins}, "begins must be in 0 .. 70", of_values=True
    )
    for name, damage, text in DAMAGES[2:]:
        yield Reject(name, (replace(history, damage=damage), good), {}, text, of_values=True)


Merge = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def merge_lists(pairs: list[list[list[tuple[int, list[int]]]]], seed: int) -> Merge:
    """Arguments of ``kv_merge`` with random weights, of (target, sources) of each row."""
    m = max(len(row) for heads in pairs for row in heads)
    n = max(sum(len(s) for _, s in row) for heads in pairs for row in heads)
    shape = (len(pairs), len(pairs[0]))
    targets = torch.full((*shape, m), -1, dtype=torch.int32)
    indptr = torch.zeros((*shape, m + 1), dtype=torch.int32)
    sources = torch.full((*shape, n), -1, dtype=torch.int32)
    for i, heads in enumerate(pairs):
        for head, row in enumerate(heads):
            count = 0
            for j, (target, mine) in enumerate(row):
                targets[i, head, j] = target
                sources[i, head, count : count + len(mine)] = torch.tensor(mine, dtype=torch.int32)
                count += len(mine)
                indptr[i, head, j + 1 :] = count
    generator = torch.Generator().manual_seed(seed)
    own, weights = (torch.rand((*shape, k), generator=generator) for k in (m, n))
    return targets, own, indptr, sources, weights


def _merge_samples() -> Iterator[Sample]:
    pairs = [
        [[(3, [7, 8]), (5, []), (40, [60, 149, 9]), (148, [2])], [(0, [1])]],
        [[], [(33, [34]), (120, [121, 35]), (149, [130])]],
    ]
    for name, (keys, values) in (*FORMATS.items(), ("dense16", dense(BF16))):
        history = History(keys, values).appended(150, 1)
        yield Sample(name, (history, *merge_lists(pairs, 1)))
        yield Sample(f"{name}-norms", (history, *merge_lists(pairs, 2)), {"norms": True})
    yield Sample("values", (history, *merge_lists(pairs, 3)), {"keys": False})


def _merge_rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    none: list[tuple[int, list[int]]] = []
    args = merge_lists([[[(3, [7, 8])], none], [none, none]], 1)
    targets, own, indptr, sources, weights = args
    yield Reject("own", (history, targets, own[0], *args[2:]), {}, "own must have shape [2, 2, 1]")
    yield Reject("rank", (history, targets[0], *args[1:]), {}, "targets must be [b, kv_heads, n]")
    clash = torch.where(sources == 8, 3, sources)
    for name, lists, message in (
        ("target", (targets.clamp(max=2) * 35, *args[1:]), "targets must rise in 0 .. 69"),
        ("indptr", (targets, own, indptr + 1, sources, weights), "indptr must rise from 0 to at"),
        ("source", (*args[:3], sources + 63, weights), "sources must be tokens in 0 .. 69"),
        ("clash", (*args[:3], clash, weights), "that are no target, got 3"),
    ):
        yield Reject(name, (history, *lists), {}, message, of_values=True)
    for name, damage, text in DAMAGES:
        yield Reject(name, (replace(history, damage=damage), *args), {}, text, of_values=True)


def _raw_merge(sample: Sample) -> tuple[Any, ...]:
    kw = {"keys": True, "values": True, "norms": False, **sample.kwargs}
    return (*sample.args[1:], *kw.values(), *reserved(sample.args[0].pages(), 0))


def _select(history: History, q: Tensor, budget: int, method: str, reduce: str) -> Tensor:
    return ops.select_pages(q, history.pages(), budget, method=method, reduce=reduce)  # type: ignore[arg-type]


def select_pages_reference(
    history: History, q: Tensor, budget: int, method: str, reduce: str
) -> Tensor:
    """All pages sorted by their bounds in float64; the newest first of all."""
    cache = history.reference()
    scores = cache.page_scores(q, history.page_size, method == "chunks", reduce == "sum")
    out = torch.full((history.b, history.kv_heads, budget), -1, dtype=torch.int32)
    for i, heads in enumerate(scores):
        for head, row in enumerate(heads):
            order = torch.sort(row[:-1], descending=True, stable=True).indices.tolist()
            chosen = sorted([len(row) - 1, *order][: min(budget, len(row))])
            out[i, head, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return out


def _select_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(3)
    for name in ("kivi2", "int8", "dense16", "dense32"):
        dtype = torch.float32 if name == "dense32" else BF16
        formats = dense(dtype) if name.startswith("dense") else FORMATS[name]
        history = History(*formats, dtype=dtype, page_size=32 if name == "dense16" else 128)
        ragged = torch.tensor([130, 3], dtype=torch.int32)
        history = history.appended(150, 1).appended(130, 2, counts=ragged)
        for t, heads, budget in ((1, 2, 1), (3, 6, 2), (2, 14, 5)):
            q = torch.randn(2, t, heads, history.d, generator=generator).to(dtype)
            for method, reduce in (("flat", "max"), ("chunks", "sum")):
                yield Sample(
                    f"{name}-{heads}-{method}-{reduce}", (history, q, budget, method, reduce)
                )
    q = torch.randn(2, 1, 2, history.d).to(BF16)
    yield Sample("empty", (History(*dense(BF16)), q, 3, "flat", "sum"))


def _select_rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    q = torch.zeros(2, 1, 4, 20, dtype=BF16)
    how = ("flat", "max")
    yield Reject("dtype", (history, q.float(), 2, *how), {}, "q must be of the dtype of the pages")
    yield Reject("heads", (history, q[:, :, :3], 2, *how), {}, "heads a multiple of 2")
    yield Reject("budget", (history, q, 0, *how), {}, "budget must be in 1 .. 1048576, got 0")
    unbounded = History(*dense(BF16), bounds=False)
    yield Reject("bounds", (unbounded, q, 1, *how), {}, "pages must keep bounds")
    for name, damage, text in DAMAGES[2:]:
        args = (replace(history, damage=damage), q, 2, *how)
        yield Reject(name, args, {}, text, of_values=True)


def _raw_select(sample: Sample) -> tuple[Any, ...]:
    history, q, budget, method, reduce = sample.args
    return (q, *reserved(history.pages(), 0), budget, method == "chunks", reduce == "sum")


CASES = (
    OpCase(
        "kv_compact",
        changing("kv_compact"),
        changing_reference("kv_compact"),
        exact,
        raw=lambda s: (s.args[1], s.kwargs.get("begins"), *reserved(s.args[0].pages(), 0)),
        samples=lambda: list(_compact_samples()),
        rejects=lambda: list(_compact_rejects()),
    ),
    OpCase(
        "kv_merge",
        changing("kv_merge"),
        changing_reference("kv_merge"),
        exact,
        raw=_raw_merge,
        samples=lambda: list(_merge_samples()),
        rejects=lambda: list(_merge_rejects()),
    ),
    OpCase(
        "select_pages",
        _select,
        select_pages_reference,
        # Scores of different pages differ by far more than fp32 rounds.
        exact,
        raw=_raw_select,
        samples=lambda: list(_select_samples()),
        rejects=lambda: list(_select_rejects()),
        workloads=tuple(select_workloads()),
        cost=select_cost,
    ),
)
