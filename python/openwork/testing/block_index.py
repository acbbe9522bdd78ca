"""Operators that build an index: the slow truth, and small nasty calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..block_index import BlockIndex
from ..ops.block_index import block_index, largest
from .case import OpCase, Reject, Sample


def index_mask(
    sq: int,
    sk: int,
    blocks: Tensor | None,
    columns: Tensor | None,
    slashes: Tensor | None,
    window: int,
    sinks: int,
    causal: bool,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor]:
    """Blocks and single keys that rows of one head and sequence list, pair by pair.

    Returns:
        ``[rows, key blocks]`` and ``[rows, sk]`` bool.
    """
    rows, key_blocks = -(-sq // block_m), -(-sk // block_n)
    listed = torch.zeros(rows, key_blocks, dtype=torch.bool)
    single = torch.zeros(rows, sk, dtype=torch.bool)
    for r in range(rows):
        positions = [sk - sq + i for i in range(r * block_m, min(sq, (r + 1) * block_m))]
        positions = [p for p in positions if p >= 0]
        for c in range(key_blocks):
            keys = range(c * block_n, min(sk, (c + 1) * block_n))
            if causal and (not positions or keys[0] > positions[-1]):
                continue
            near = {p - j for p in positions for j in keys if p >= j}
            listed[r, c] = (
                keys[0] < sinks
                or min(near, default=window) < window
                or (blocks is not None and bool(blocks[r, c]))
                or (slashes is not None and any(bool(slashes[t]) for t in near))
                or (columns is not None and all(bool(columns[j]) for j in keys))
            )
            if columns is not None and not listed[r, c]:
                for j in keys:
                    single[r, j] = bool(columns[j]) and (not causal or j <= positions[-1])
    return listed, single


def _all_masks(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    blocks: Tensor | None,
    columns: Tensor | None,
    slashes: Tensor | None,
    windows: Tensor,
    sinks: Tensor,
    causal: bool,
    block_m: int,
    block_n: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks of each row of each head, in the order of an index."""
    sizes = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True))
    for x in range(len(windows)):
        for s, (sq, sk) in enumerate(sizes):
            listed, single = index_mask(
                sq,
                sk,
                None if blocks is None else blocks[s, x],
                None if columns is None else columns[s, x],
                None if slashes is None else slashes[s, x],
                int(windows[x]),
                int(sinks[x]),
                causal,
                block_m,
                block_n,
            )
            yield from zip(listed, single, strict=True)


def _numbers(rows: list[Tensor]) -> Tensor:
    found = [row.nonzero().flatten() for row in rows]
    return (torch.cat(found) if found else torch.empty(0)).int()


def _indptr(rows: list[Tensor], heads: int) -> Tensor:
    ends = torch.tensor([0] + [int(row.sum()) for row in rows]).cumsum(0)
    each = len(rows) // heads
    return torch.stack([ends[x * each : (x + 1) * each + 1] for x in range(heads)]).int()


def offsets_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """indptr and column_indptr, counted in the masks."""
    rows = list(_all_masks(*args[:10]))
    heads = len(args[5])
    return (
        _indptr([listed for listed, _ in rows], heads),
        _indptr([single for _, single in rows], heads),
    )


def lists_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """indices and columns, read off the masks."""
    rows = list(_all_masks(*args[:10]))
    return _numbers([listed for listed, _ in rows]), _numbers([single for _, single in rows])


def largest_reference(scores: Tensor, budgets: Tensor, *, by_mass: bool = False) -> Tensor:
    """Marks by sorting; sums in float64."""
    marks = torch.zeros_like(scores, dtype=torch.bool)
    for row, (score, budget) in enumerate(zip(scores.double(), budgets.tolist(), strict=True)):
        # NaN sorts as the largest.
        order = score.argsort(descending=True, stable=True)
        order = order[score[order] != -math.inf]
        mass = score[order].clamp(min=0) if by_mass else torch.ones(len(order)).double()
        total = float(mass.sum())
        if not total > budget:
            marks[row, order] = True
            continue
        before = mass.cumsum(0) - mass
        marks[row, order[before < budget]] = True
    return marks


def _exact(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[float, ...]:
    return (0.0,) * len(expected)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _marks(
    q_lengths: list[int], k_lengths: list[int], heads: int, block_m: int, block_n: int, share: float
) -> tuple[Any, ...]:
    """The arguments of an index up to block_n, with random marks."""
    generator = torch.Generator().manual_seed(len(q_lengths) + block_m)
    sequences, max_q, max_k = len(q_lengths), max(q_lengths, default=0), max(k_lengths, default=0)
    rows, key_blocks = -(-max_q // block_m), -(-max_k // block_n)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    blocks = random(sequences, heads, rows, key_blocks)
    columns = random(sequences, heads, max_k)
    columns[..., block_n : 2 * block_n] = True  # one block that is all columns
    slashes = random(sequences, heads, max_k) & random(sequences, heads, max_k)
    windows = torch.arange(heads).mul(7).int()
    sinks = torch.arange(heads).flip(0).int()
    q_offsets, k_offsets = _offsets(*q_lengths), _offsets(*k_lengths)
    marks = (q_offsets, k_offsets, blocks, columns, slashes, windows, sinks)
    return (*marks, True, block_m, block_n)


def _index_samples() -> Iterator[Sample]:
    for q_lengths, k_lengths, heads, block_m, block_n, share in (
        ([1], [1], 1, 16, 16, 0.5),
        ([70], [70], 2, 16, 16, 0.1),
        ([33, 1, 80], [33, 50, 97], 3, 32, 16, 0.05),
        ([40, 20], [17, 20], 2, 16, 48, 0.1),  # queries before the first key
        ([100], [100], 1, 128, 64, 0.0),
        ([0, 5], [9, 5], 1, 16, 16, 0.2),
        ([], [], 2, 16, 16, 0.2),
    ):
        args = _marks(q_lengths, k_lengths, heads, block_m, block_n, share)
        yield Sample(f"{q_lengths}-{k_lengths}-{heads}-{block_m}x{block_n}", args)
    args = _marks([50], [60], 2, 16, 16, 0.1)
    q_offsets, k_offsets, *_, windows, sinks, causal, block_m, block_n = args
    bare = (q_offsets, k_offsets, None, None, None, windows, sinks, causal, block_m, block_n)
    yield Sample("window-and-sinks", bare)
    for i, name in enumerate(("blocks", "columns", "slashes")):
        only: list[Tensor | None] = [None, None, None]
        only[i] = args[2 + i]
        sizes = (windows, sinks, causal, block_m, block_n)
        yield Sample(name, (q_offsets, k_offsets, *only, *sizes))
    for q_lengths, k_lengths in (([33, 1, 80], [33, 50, 97]), ([40, 20], [17, 20])):
        args = _marks(q_lengths, k_lengths, 2, 32, 16, 0.1)
        yield Sample(f"whole-{q_lengths}-{k_lengths}", (*args[:7], False, *args[8:]))


def _rows(args: tuple[Any, ...]) -> int:
    return int((-(-args[0].diff() // args[8])).sum())


def _as_index(*args: Any) -> BlockIndex:
    q_offsets, k_offsets, blocks, columns, slashes, windows, sinks, causal, block_m, block_n = args[
        :10
    ]
    return block_index(
        q_offsets,
        k_offsets,
        blocks=blocks,
        columns=columns,
        slashes=slashes,
        windows=windows,
        sinks=sinks,
        causal=causal,
        block_m=block_m,
        block_n=block_n,
    )


def _raw_offsets(sample: Sample) -> tuple[Any, ...]:
    args = sample.args
    return args if len(args) == 11 else (*args, _rows(args))


def _raw_lists(sample: Sample) -> tuple[Any, ...]:
    if len(sample.args) == 15:
        return sample.args
    args = _raw_offsets(sample)
    indptr, column_indptr = torch.ops.openwork.block_index_offsets(*args)
    return (*args, indptr, column_indptr, int(indptr[-1, -1]), int(column_indptr[-1, -1]))


def _offsets_op(*args: Any) -> tuple[Tensor, ...]:
    if len(args) == 11:
        found: tuple[Tensor, ...] = torch.ops.openwork.block_index_offsets(*args)
        return found
    raw = _raw_offsets(Sample("", args))
    both: tuple[Tensor, ...] = torch.ops.openwork.block_index_offsets(*raw)
    index = _as_index(*args)
    assert torch.equal(index.indptr, both[0])
    return both


def _lists_op(*args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.ops.openwork.block_index_lists(*_raw_lists(Sample("", args)))
    if len(args) == 10:
        index = _as_index(*args)
        assert torch.equal(index.indices, found[0])
        assert index.columns is None or torch.equal(index.columns, found[1])
    return found


def _index_rejects() -> Iterator[tuple[str, tuple[Any, ...], str, bool]]:
    good: tuple[Any, ...] = (*_marks([70], [80], 2, 16, 16, 0.1), 5)

    def changed(at: int, value: object) -> tuple[Any, ...]:
        return (*good[:at], value, *good[at + 1 :])

    q_offsets, k_offsets, blocks, columns, _, windows, _, *_ = good
    few, near = blocks[..., :4].contiguous(), columns[..., 1:].contiguous()
    yield "block_m", changed(8, 24), "block_m must be a multiple of 16 in 16 .. 128, got 24", False
    yield "block_n", changed(9, 0), "block_n must be a multiple of 16", False
    yield "offsets dtype", changed(0, q_offsets.long()), "cu_seqlens_q must be int32", False
    yield "offsets", changed(1, k_offsets.flip(0)), "cu_seqlens_k must rise from 0", True
    yield "count", changed(1, _offsets(40, 40)), "keys must come in 1 sequences", False
    yield "windows", changed(5, windows.view(1, 2)), "windows must be [heads]", False
    yield "sinks", changed(6, windows[:1]), "sinks must have shape [2], got [1]", False
    yield "rows", changed(10, 6), "rows must be the 5 blocks of queries, got 6", True
    yield "blocks", changed(2, few), "blocks must have shape [1, 2, 5, 5]", True
    yield "columns", changed(3, columns.int()), "columns must be bool, got int32", False
    yield "slashes", changed(4, near), "slashes must have shape [1, 2, 80]", True


def _offsets_rejects() -> Iterator[Reject]:
    for name, args, message, of_values in _index_rejects():
        yield Reject(name, args, {}, message, of_values)


def _lists_rejects() -> Iterator[Reject]:
    good = _raw_lists(Sample("", _marks([70], [80], 2, 16, 16, 0.1)))
    for name, args, message, of_values in _index_rejects():
        if name == "rows":  # which the shape of indptr follows
            message, of_values = "indptr must have shape [2, 7], got [2, 6]", False
        yield Reject(name, (*args, *good[11:]), {}, message, of_values)
    *start, indptr, column_indptr, nnz, column_nnz = good
    wrong = indptr.clone()
    wrong[0, 1] += 1
    tail = (column_indptr, nnz, column_nnz)
    yield Reject("indptr", (*start, wrong, *tail), {}, "indptr must be that of", True)
    yield Reject("indptr shape", (*start, indptr[:1], *tail), {}, "indptr must have shape [2, 6]")
    bad = (*start, indptr, column_indptr, nnz + 1, column_nnz)
    yield Reject("nnz", bad, {}, f"nnz must be the last of indptr, {nnz}", True)
    bad = (*start, indptr, column_indptr, nnz, -1)
    yield Reject("column_nnz", bad, {}, "column_nnz must be in 0 .. 2147483647, got -1")


def _largest_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(5)
    for rows, n in ((1, 1), (3, 17), (5, 300), (0, 4), (2, 0)):
        # Sums of eighths are exact in any order, so ties and budgets met exactly are decided alike.
        scores = torch.randint(0, 24, (rows, n), generator=generator) / 8
        for by_mass in (False, True):
            full = scores.sum(1) if by_mass else torch.full((rows,), float(n))
            for share in (0.0, 0.3, 1.0):
                name = f"{rows}x{n}-{share}-{'mass' if by_mass else 'count'}"
                yield Sample(name, (scores, (full * share).floor()), {"by_mass": by_mass})
    spread = torch.tensor([[1e-30, 3.0, 1e30, -2.0, 5e-39, 0.0, -0.0, 7.0]])
    for count in (1.0, 4.5, 8.0):
        yield Sample(f"spread-{count}", (spread, torch.tensor([count])))
    odd = torch.tensor([[-math.inf, 1.0, -math.inf, math.nan, 2.0, math.inf]])
    for count in (1.0, 2.0, 9.0):
        yield Sample(f"not-finite-{count}", (odd, torch.tensor([count])))
    yield Sample("strided", (torch.rand(9, 4, generator=generator).t(), torch.full((4,), 3.0)))


def _largest_rejects() -> Iterator[Reject]:
    scores, budgets = torch.ones(2, 3), torch.ones(2)
    yield Reject("rank", (scores[0], budgets), {}, "scores must be [rows, n], got [3]")
    yield Reject("dtype", (scores.double(), budgets), {}, "scores must be float32, got float64")
    yield Reject("budgets", (scores, budgets[:1]), {}, "budgets must have shape [2], got [1]")


CASES = (
    OpCase(
        "block_index_offsets",
        _offsets_op,
        offsets_reference,
        _exact,
        raw=_raw_offsets,
        samples=lambda: list(_index_samples()),
        rejects=lambda: list(_offsets_rejects()),
    ),
    OpCase(
        "block_index_lists",
        _lists_op,
        lists_reference,
        _exact,
        raw=_raw_lists,
        samples=lambda: list(_index_samples()),
        rejects=lambda: list(_lists_rejects()),
    ),
    OpCase(
        "largest",
        largest,
        largest_reference,
        _exact,
        raw=lambda s: (*s.args, s.kwargs.get("by_mass", False)),
        samples=lambda: list(_largest_samples()),
        rejects=lambda: list(_largest_rejects()),
    ),
)
