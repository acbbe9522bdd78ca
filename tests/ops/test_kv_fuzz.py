"""Random histories of a cache, step by step equal to a slow one in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openwork import KVPages, ops
from openwork.testing.kv_cache import History, reference_state, state
from openwork.testing.kv_policy import merge_lists
from openwork.testing.kv_reference import ReferenceCache

from .caches import caches, random_lists

Draw = st.DrawFn
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def _random_merges(cache: ReferenceCache, rng: np.random.Generator) -> tuple[Tensor, ...]:
    def row(length: int) -> list[tuple[int, list[int]]]:
        tokens = rng.permutation(length).tolist()
        targets, sources = sorted(tokens[: min(4, length // 2)]), tokens[length // 2 :][:6]
        return [(t, sources[i::4]) for i, t in enumerate(targets)]

    pairs = [[row(r.length) for r in heads] for heads in cache.rows]
    return merge_lists(pairs, int(rng.integers(1000)))


def _call(draw: Draw, history: History, cache: ReferenceCache, n: int) -> Call:
    lengths = cache.lengths()
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(
        ["append", "append", "append", "draft", "commit", "rollback", "compact", "evict", "merge"]
    ))  # fmt: skip
    if kind in ("append", "draft"):
        room = history.max_tokens - int(lengths.max())
        t = min(
            draw(st.sampled_from([0, 1, 3, 31, 40, 97, 140] if kind == "append" else [1, 7])), room
        )
        keys, values, positions = history.tokens(t, n + 1)
        counts = None
        if draw(st.booleans()):
            counts = torch.from_numpy(rng.integers(0, t + 1, history.b).astype(np.int32))
        options = {"counts": counts, "positions": positions, "commit": kind == "append"}
        return "kv_append", (keys, values), options
    if kind == "rollback":
        shortest = lengths.amin(1).numpy()
        drop = np.minimum(shortest, rng.integers(0, draw(st.sampled_from([2, 60])) + 1, history.b))
        return "kv_rollback", (torch.from_numpy(drop.astype(np.int32)),), {}
    if kind == "compact":
        return (
            "kv_compact",
            (random_lists(cache, rng, draw(st.sampled_from([0.1, 0.9, 1.0]))),),
            {},
        )
    if kind == "evict":
        return "kv_evict", (random_lists(cache, rng, draw(st.sampled_from([0.02, 0.5]))),), {}
    if kind == "merge":
        return "kv_merge", _random_merges(cache, rng), {"norms": draw(st.booleans())}
    return "kv_commit", (), {}


def _same(pages: KVPages, cache: ReferenceCache) -> None:
    for got, want in zip(state(pages), reference_state(cache), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
    held = torch.maximum(cache.lengths("keys"), cache.lengths("values"))
    needed = int((-(-held // pages.page_size)).sum())
    assert pages.allocated_pages >= needed
    pages.trim()
    assert pages.allocated_pages == needed


@pytest.mark.parametrize("calls", [6])
def test_histories_equal_the_reference(isa: str, calls: int) -> None:
    @given(st.data())
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def check(data: st.DataObject) -> None:
        history = data.draw(caches())
        pages, cache = history.pages(), history.reference()
        for n in range(calls):
            name, args, kwargs = data.draw(st.composite(_call)(history, cache, n))
            # Both refuse drafts that the tail has no room for.
            if kwargs.get("commit") is False:
                ops.kv_commit(pages)
                cache.kv_commit()
            getattr(ops, name)(pages, *args, **kwargs)
            getattr(cache, name)(*args, **kwargs)
            _same(pages, cache)

    check()
