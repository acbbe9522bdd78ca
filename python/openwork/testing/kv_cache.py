"""The operators over pages: samples with a history, and the state they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..kv_format import KVFormat
from ..kv_pages import KVPages
from .case import OpCase, Reject, Sample
from .kv_reference import ReferenceCache
from .kv_workloads import append_cost, append_workloads

State = tuple[Tensor, ...]
Step = tuple[str, tuple[Any, ...], dict[str, Any]]

BF16 = torch.bfloat16
NUQ3 = (0.0, 0.15, 0.3, 0.42, 0.55, 0.7, 0.85, 1.0)
FORMATS: dict[str, tuple[KVFormat, KVFormat]] = {
    "kivi2": (KVFormat(2, "channel", 32, step=64), KVFormat(2, "token", 32, window=40)),
    "kivi4": (KVFormat(4, "channel", 64), KVFormat(4, "token", 64, window=1)),
    "int3": (KVFormat(3, "channel", 32), KVFormat(3, "token", 32)),
    "int8": (KVFormat(8, "token", 128), KVFormat(8, "channel", 32)),
    "swapped3": (KVFormat(2, "token", 64, window=3, step=5), KVFormat(3, "channel", 32, window=7)),
    "outliers3": (
        KVFormat(3, "channel", 32, outliers=2),
        KVFormat(4, "token", 32, window=9, outliers=3),
    ),
    "nuq3": (
        KVFormat(3, "channel", 32, codebook=NUQ3),
        KVFormat(4, "token", 32, codebook=tuple((i / 15) ** 2 for i in range(16)), outliers=1),
    ),
}


def dense(dtype: torch.dtype) -> tuple[KVFormat, KVFormat]:
    return (KVFormat(8 * dtype.itemsize),) * 2


@dataclass(frozen=True)
class History:
    """How a cache came to be: sizes, formats, and the calls that filled it."""

    keys: KVFormat
    values: KVFormat
    b: int = 2
    kv_heads: int = 2
    d: int = 20
    value_d: int = 36
    max_tokens: int = 300
    dtype: torch.dtype = BF16
    page_size: int = 64
    drafts: int = 0
    bounds: bool = True
    steps: Sequence[Step] = ()
    damage: Callable[[KVPages], KVPages] | None = None

    def pages(self) -> KVPages:
        """The cache, and then the damage done to it."""
        pages = KVPages.allocate(
            self.b,
            self.kv_heads,
            self.d,
            self.max_tokens,
            keys=self.keys,
            values=self.values,
            dtype=self.dtype,
            value_d=self.value_d,
            page_size=self.page_size,
            drafts=self.drafts,
            bounds=self.bounds,
            positions=True,
        )
        for name, args, kwargs in self.steps:
            getattr(ops, name)(pages, *args, **kwargs)
        return pages if self.damage is None else self.damage(pages)

    def reference(self) -> ReferenceCache:
        cache = ReferenceCache(
            self.b, self.kv_heads, self.d, self.value_d, self.keys, self.values, self.dtype
        )
        for name, args, kwargs in self.steps:
            getattr(cache, name)(*args, **kwargs)
        return cache

    def state(self, pages: KVPages) -> State:
        return state(pages)

    def reference_state(self, cache: ReferenceCache) -> State:
        return reference_state(cache)

    def tokens(self, t: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of t tokens; some channels of the keys are large."""
        generator = torch.Generator().manual_seed(seed)
        scale = torch.ones(self.d)
        scale[:: max(self.d // 3, 1)] = 12.0
        keys = torch.randn(self.b, t, self.kv_heads, self.d, generator=generator) * scale
        values = torch.randn(self.b, t, self.kv_heads, self.value_d, generator=generator)
        positions = (1000 * seed + torch.arange(t, dtype=torch.int32)).expand(self.b, t)
        return keys.to(self.dtype), values.to(self.dtype), positions.contiguous()

    def appended(self, t: int, seed: int, **kwargs: Any) -> History:
        """With one more call of ``kv_append``."""
        keys, values, positions = self.tokens(t, seed)
        step = ("kv_append", (keys, values), {"positions": positions, **kwargs})
        return replace(self, steps=(*self.steps, step))


def state(pages: KVPages) -> State:
    """All that can be seen of a cache."""
    keys, values = ops.kv_read(pages)
    held = [
        pages.lengths if side.committed is None else side.committed
        for side in (pages.keys, pages.values)
    ]
    chunks = -(-keys.shape[2] // 16)
    bounds = [
        gather_bounds(pages, t, chunks) for t in (pages.key_min, pages.key_max) if t is not None
    ]
    assert pages.positions is not None
    places = torch.arange(keys.shape[2])
    kept = torch.where(places < pages.lengths[..., None], pages.positions[..., : len(places)], 0)
    return (keys, values, pages.lengths.clone(), *(t.clone() for t in held), *bounds, kept)


def gather_bounds(pages: KVPages, pool: Tensor, chunks: int) -> Tensor:
    """``[b, kv_heads, chunks, d]`` of the 16 tokens each that are in pages; zeros elsewhere."""
    committed = pages.lengths if pages.keys.committed is None else pages.keys.committed
    per_page = pages.page_size // 16
    index = torch.arange(chunks)
    page = pages.block_table[..., index // per_page].long().clamp(min=0)
    found = pool[page, index % per_page]
    return torch.where((16 * index < committed[..., None])[..., None], found, 0)


def reference_state(cache: ReferenceCache) -> State:
    """:func:`state` of the slow cache."""
    lengths = cache.lengths()
    end = int(lengths.max())
    kept = torch.zeros(*lengths.shape, end, dtype=torch.int32)
    for i, heads in enumerate(cache.rows):
        for head, row in enumerate(heads):
            kept[i, head, : row.length] = torch.tensor(row.positions, dtype=torch.int32)
    return (
        *(cache.read(part, 0, end) for part in ("keys", "values")),
        lengths,
        *(cache.lengths(part) for part in ("keys", "values")),
        *cache.bounds(-(-end // 16)),
        kept,
    )


def changing(name: str) -> Callable[..., State]:
    """The operator on a new cache with that history: the state it leaves."""

    def run(history: History, *args: Any, **kwargs: Any) -> State:
        pages = history.pages()
        getattr(ops, name)(pages, *args, **kwargs)
        return history.state(pages)

    return run


def changing_reference(name: str) -> Callable[..., State]:
    def run(history: History, *args: Any, **kwargs: Any) -> State:
        cache = history.reference()
        getattr(cache, name)(*args, **kwargs)
        return history.reference_state(cache)

    return run


def exact(sample: Sample, expected: State) -> tuple[float, ...]:
    # The same fp32 operations in the same order, and data that is moved.
    return (0.0,) * len(expected)


def reserved(pages: KVPages, tokens: int) -> tuple[list[Tensor], list[int]]:
    """The pages as the raw operator takes them."""
    pages.reserve(tokens)
    return pages.tensors, pages.format


def _raw_append(sample: Sample) -> tuple[Any, ...]:
    history, keys, values = sample.args
    kw = sample.kwargs
    pages, numbers = reserved(history.pages(), keys.shape[1] if keys.dim() == 4 else 0)
    return (
        keys, values, kw.get("counts"), kw.get("positions"), kw.get("commit", True), pages, numbers
    )  # fmt: skip


def _append_samples() -> Iterator[Sample]:
    for name, (keys, values) in FORMATS.items():
        history = History(keys, values).appended(1, 1).appended(70, 2).appended(3, 3)
        k, v, positions = history.tokens(133, 4)
        yield Sample(name, (history, k, v), {"positions": positions})
        counts = torch.tensor([17, 0], dtype=torch.int32)
        yield Sample(f"{name}-ragged", (history, k, v), {"positions": positions, "counts": counts})
    for dtype in (torch.float32, torch.float16, BF16):
        history = History(*dense(dtype), dtype=dtype, page_size=32, d=1, value_d=17).appended(30, 1)
        k, v, positions = history.tokens(5, 2)
        yield Sample(f"dense-{str(dtype)[6:]}", (history, k, v), {"positions": positions})
    history = History(*FORMATS["kivi4"], dtype=torch.float32, d=64, value_d=128, page_size=128)
    k, v, positions = history.tokens(129, 5)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    yield Sample("strided", (history, *strided), {"positions": positions})
    drafting = replace(history, drafts=64)
    yield Sample("drafts", (drafting, k, v), {"positions": positions, "commit": False})
    none = [x[:, :0] for x in (k, v, positions)]
    yield Sample("none", (history, *none[:2]), {"positions": none[2]})
    constant = [torch.full_like(x, 3.7) for x in (k, v)]
    yield Sample("constant", (history, *constant), {"positions": positions})
    broken = k.clone()
    broken[0, 3, 0, 5], broken[1, 7, 1, 2], broken[0, 70, 1, 1] = float("nan"), float("inf"), 1e38
    broken[0, 71, 1, 1] = -3e38
    yield Sample("broken", (history, broken, v), {"positions": positions})


def _append_rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    k, v, positions = history.tokens(8, 2)
    kw = {"positions": positions}
    yield Reject("dtype", (history, k.float(), v), kw, "keys must be of the dtype of the pages")
    yield Reject("rank", (history, k[0], v), kw, "keys must be [b, t, kv_heads, d], got [8, 2, 20]")
    yield Reject("tokens", (history, k, v[:, :3]), kw, "values must have shape [2, 8, 2, 36]")
    yield Reject("positions", (history, k, v), {}, "positions must be given, as pages hold them")
    yield Reject(
        "counts",
        (history, k, v),
        {**kw, "counts": torch.tensor([9, 0], dtype=torch.int32)},
        "counts must be in 0 .. 8",
        of_values=True,
    )
    many = history.tokens(200, 3)
    full = {"positions": many[2], "commit": False}
    yield Reject(
        "drafts", (history, *many[:2]), full, "the tail must have room for 206 tokens", True
    )
    for name, damage, message in DAMAGES:
        yield Reject(name, (replace(history, damage=damage), k, v), kw, message, of_values=True)


def _damaged(name: str, value: int) -> Callable[[KVPages], KVPages]:
    """Sets the last number of a table."""

    def damage(pages: KVPages) -> KVPages:
        pages.reserve(64)
        tables = {
            "block_table": pages.block_table[..., 0],
            "lengths": pages.lengths,
            "key_committed": pages.keys.committed,
            "value_committed": pages.values.committed,
        }
        table = tables[name]
        assert table is not None
        table[-1, -1] = value
        return pages

    return damage


DAMAGES = (
    ("page number", _damaged("block_table", 20), "block_table must hold pages in 0 .. 19, got 20"),
    ("no page", _damaged("block_table", -1), "block_table must hold pages"),
    ("length", _damaged("lengths", 321), "lengths must be in 0 .. 320"),
    ("negative", _damaged("lengths", -1), "lengths must be in 0 .. 320"),
    ("committed", _damaged("key_committed", 128), "key_committed must be at most the length, 70"),
    ("group", _damaged("key_committed", 33), "key_committed must be whole groups of 32"),
    ("values", _damaged("value_committed", -1), "value_committed must be at most the length, 70"),
)


def kv_read_reference(history: History, begin: int, end: int) -> State:
    """Every token as :class:`ReferenceCache` holds it."""
    cache = history.reference()
    return cache.read("keys", begin, end), cache.read("values", begin, end)


def _read_samples() -> Iterator[Sample]:
    for name, (keys, values) in FORMATS.items():
        ragged = torch.tensor([31, 9], dtype=torch.int32)
        history = History(keys, values).appended(97, 1).appended(31, 2, counts=ragged)
        yield Sample(name, (history, 0, 128))
        yield Sample(f"{name}-part", (history, 61, 111))
    yield Sample("empty", (History(*FORMATS["kivi2"]), 0, 5))
    yield Sample("nothing", (History(*dense(BF16)).appended(3, 1), 2, 2))


def _commit_samples() -> Iterator[Sample]:
    for name, (keys, values) in FORMATS.items():
        history = History(keys, values, drafts=71).appended(50, 1).appended(71, 2, commit=False)
        yield Sample(name, (history,))
    yield Sample("dense", (History(*dense(BF16)).appended(3, 1),))


def _drop(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32)


def _rollback_samples() -> Iterator[Sample]:
    for name, (keys, values) in (*FORMATS.items(), ("dense16", dense(BF16))):
        history = History(keys, values).appended(135, 1)
        yield Sample(f"{name}-none", (history, _drop(0, 0)))
        yield Sample(f"{name}-group", (history, _drop(20, 50)))
        yield Sample(f"{name}-all", (history, _drop(135, 1)))


def _rollback_rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    yield Reject("shape", (history, _drop(1)), {}, "drop must have shape [2], got [1]")
    yield Reject("dtype", (history, _drop(1, 2).long()), {}, "drop must be int32, got int64")
    yield Reject("many", (history, _drop(1, 71)), {}, "drop must be in 0 .. 70", of_values=True)
    yield Reject("negative", (history, _drop(-1, 0)), {}, "drop must be in 0 .. 70", of_values=True)


def _bound_samples() -> Iterator[Sample]:
    for name, (keys, values) in (*FORMATS.items(), ("dense16", dense(BF16))):
        yield Sample(name, (History(keys, values, damage=_forget_bounds).appended(99, 1),))


def _forget_bounds(pages: KVPages) -> KVPages:
    for bounds in (pages.key_min, pages.key_max):
        assert bounds is not None
        bounds.fill_(7)
    return pages


def _table_rejects(*args: Any) -> list[Reject]:
    history = History(*FORMATS["kivi2"]).appended(70, 1)
    return [
        Reject(name, (replace(history, damage=damage), *args), {}, message, of_values=True)
        for name, damage, message in DAMAGES[2:]
    ]


CASES = (
    OpCase(
        "kv_append",
        changing("kv_append"),
        changing_reference("kv_append"),
        exact,
        raw=_raw_append,
        samples=lambda: list(_append_samples()),
        rejects=lambda: list(_append_rejects()),
        workloads=tuple(append_workloads()),
        cost=append_cost,
    ),
    OpCase(
        "kv_commit",
        changing("kv_commit"),
        changing_reference("kv_commit"),
        exact,
        raw=lambda s: reserved(s.args[0].pages(), 0),
        samples=lambda: list(_commit_samples()),
        rejects=lambda: _table_rejects(),
    ),
    OpCase(
        "kv_read",
        lambda history, begin, end: ops.kv_read(history.pages(), begin, end),
        kv_read_reference,
        exact,
        raw=lambda s: (*reserved(s.args[0].pages(), 0), *s.args[1:]),
        samples=lambda: list(_read_samples()),
        rejects=lambda: [
            *_table_rejects(0, 70),
            Reject("places", (History(*dense(BF16)), 0, 321), {}, "begin and end must be in 0 .."),
        ],
    ),
    OpCase(
        "kv_rollback",
        changing("kv_rollback"),
        changing_reference("kv_rollback"),
        exact,
        raw=lambda s: (s.args[1], *reserved(s.args[0].pages(), 0)),
        samples=lambda: list(_rollback_samples()),
        rejects=lambda: [*_rollback_rejects(), *_table_rejects(_drop(1, 1))],
    ),
    OpCase(
        "page_bounds",
        changing("page_bounds"),
        lambda history: reference_state(history.reference()),
        exact,
        raw=lambda s: reserved(s.args[0].pages(), 0),
        samples=lambda: list(_bound_samples()),
        rejects=lambda: [
            *_table_rejects(),
            Reject(
                "none", (History(*dense(BF16), bounds=False),), {}, "pages must keep bounds, got"
            ),
        ],
    ),
)
