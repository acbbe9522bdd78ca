"""Pages: who holds them, what they cost, and that the memory of free ones leaves the process."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from openwork import KVFormat, KVPages, _host, ops
from openwork.testing.kv_cache import FORMATS, History, dense, state

DENSE = KVFormat(32)
KIVI = (KVFormat(4, "channel", 32, step=128), KVFormat(4, "token", 32, window=128))
MIB = 1 << 20


def _resident(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor that are really there."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            low, high = (int(x, 16) for x in span.groups())
            inside = low < end and begin < high
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def _fill(pages: KVPages, tokens: int) -> None:
    keys = torch.ones(pages.lengths.shape[0], tokens, pages.lengths.shape[1], pages.d)
    ops.kv_append(pages, keys, keys)


def test_memory_follows_the_tokens_held() -> None:
    """Not a mask: the process holds less after an eviction."""
    pages = KVPages.allocate(1, 4, 128, 65536, keys=DENSE, values=DENSE, bounds=True)
    rows = pages.keys.rows
    assert rows is not None and rows.nbytes == 128 * MIB
    assert _resident(rows) < 3 * MIB
    _fill(pages, 8192)
    assert 16 * MIB <= _resident(rows) <= 19 * MIB  # of memory pages of 2 MiB the last is not full
    kept = torch.full((1, 4, 4096), -1, dtype=torch.int32)
    for head, count in enumerate((4096, 100, 1, 0)):
        kept[0, head, :count] = torch.arange(count) * 2
    ops.kv_compact(pages, kept)
    assert pages.allocated_pages == 64 + 2 + 1
    assert pages.bytes() == 67 * pages.page_bytes
    assert _resident(rows) <= 67 * 64 * 512 + 2 * MIB
    assert torch.equal(ops.kv_read(pages)[0][0, 1, :100], torch.ones(100, 128))
    _fill(pages, 64)
    assert pages.allocated_pages == 65 + 3 + 2 + 1


def test_bytes_follow_the_budget_of_each_head() -> None:
    """The sum over heads of what each holds, and less than a page and a group a head more."""
    pages = KVPages.allocate(2, 3, 64, 4096, keys=KIVI[0], values=KIVI[1], dtype=torch.bfloat16)
    tokens = torch.randn(2, 2000, 3, 64).bfloat16()
    ops.kv_append(pages, tokens, tokens)
    budgets = torch.tensor([[2000, 700, 64], [1, 0, 1300]])
    kept = torch.arange(2000, dtype=torch.int32).expand(2, 3, 2000)
    ops.kv_compact(pages, torch.where(kept < budgets[..., None], kept, -1))
    assert torch.equal(pages.lengths, budgets.int())
    tails = [t for t in (pages.keys.tail, pages.values.tail) if t is not None]
    held = pages.bytes() - sum(t.nbytes for t in tails)
    each_token = pages.page_bytes / pages.page_size
    committed = torch.maximum(*[s.committed for s in (pages.keys, pages.values)])  # type: ignore[arg-type]
    assert int(committed.sum()) * each_token <= held
    assert held < (int(committed.sum()) + 6 * pages.page_size) * each_token
    assert (budgets - committed <= 128 + 128).all()


@pytest.mark.parametrize(
    ("formats", "drafts", "tokens"),
    [
        (KIVI, 0, 160),  # 128 that wait for the step, and a group that a compaction leaves
        (KIVI, 8, 192),
        ((KVFormat(2, "channel", 32), KVFormat(2, "token", 64)), 0, 64),
        ((KVFormat(2, "channel", 64, step=128), KVFormat(2, "channel", 32)), 0, 192),
        ((KVFormat(8, "token", 64), KVFormat(4, "token", 64, window=40, step=3)), 0, 64),
        ((DENSE, KVFormat(4, "channel", 32)), 0, 64),
    ],
)
def test_tails_hold_what_may_wait(
    formats: tuple[KVFormat, KVFormat], drafts: int, tokens: int
) -> None:
    """And no more: they are exact, and every head of every layer has them."""
    keys, values = formats
    pages = KVPages.allocate(2, 1, 64, 1024, keys=keys, values=values, page_size=64, drafts=drafts)
    for side, fmt in ((pages.keys, keys), (pages.values, values)):
        assert fmt.dense or (side.tail is not None and side.tail.shape[2] == tokens)
    x = torch.randn(2, 500, 1, 64)
    ops.kv_append(pages, x, x)
    # The most that can wait: all but one of a step, behind a group that was not finished.
    for _ in range(3):
        length = int(pages.lengths.max())
        kept = torch.arange(1, length, dtype=torch.int32).expand(2, 1, -1).contiguous()
        ops.kv_compact(pages, kept)
        ops.kv_append(pages, x[:, :37], x[:, :37])
        if drafts:
            ops.kv_append(pages, x[:, :drafts], x[:, :drafts], commit=False)
            ops.kv_commit(pages)


@pytest.mark.parametrize(
    ("formats", "bits"),
    [
        ((KVFormat(4, "channel", 32), KVFormat(4, "token", 32)), 4 + 32 / 32),
        ((KVFormat(2, "channel", 64), KVFormat(2, "token", 64)), 2 + 32 / 64),
        ((KVFormat(3, "channel", 128), KVFormat(8, "token", 128)), (3 + 8) / 2 + 32 / 128),
        # One channel in 64 exactly: 16 bits, and 8 of its number.
        ((KVFormat(4, "channel", 32, outliers=2),) * 2, 4 + 1 + 24 * 2 / 128),
    ],
)
def test_bits_of_a_number(formats: tuple[KVFormat, KVFormat], bits: float) -> None:
    keys, values = formats
    pages = KVPages.allocate(
        1, 1, 128, 256, keys=keys, values=values, dtype=torch.bfloat16, page_size=128
    )
    assert pages.page_bytes * 8 / (2 * 128 * 128) == bits


@pytest.mark.parametrize("formats", [*FORMATS.values(), dense(torch.bfloat16)])
def test_sequences_that_share_a_prefix(formats: tuple[KVFormat, KVFormat]) -> None:
    """As if each had its own: whatever one of them does, the other's tokens stay."""
    history = History(*formats).appended(200, 1, counts=torch.tensor([200, 0], dtype=torch.int32))
    pages = history.pages()
    alone = pages.allocated_pages
    pages.share(0, 1)
    assert pages.allocated_pages == alone
    assert all(torch.equal(x[0], x[1]) for x in state(pages))
    before = state(pages)
    keys, values, positions = history.tokens(90, 2)
    counts = torch.tensor([0, 90], dtype=torch.int32)
    ops.kv_append(pages, keys, values, counts=counts, positions=positions)
    for x, y in zip(before[:2], state(pages), strict=False):
        assert torch.equal(x[0], y[0, :, :200])
    assert pages.lengths.tolist() == [[200, 200], [290, 290]]
    ops.kv_rollback(pages, torch.tensor([0, 190], dtype=torch.int32))
    none = torch.full((2, 2, 0), -1, dtype=torch.int32)
    ops.kv_compact(pages, none, begins=torch.tensor([200, 1], dtype=torch.int32))
    for x, y in zip(before, state(pages), strict=True):
        assert torch.equal(x[0], y[0])
    assert pages.allocated_pages <= alone + 2
    ops.kv_rollback(pages, torch.tensor([200, 1], dtype=torch.int32))
    pages.trim()
    assert pages.allocated_pages == 0


@pytest.mark.parametrize("formats", [*FORMATS.values(), dense(torch.bfloat16)])
@pytest.mark.parametrize("order", [[1, 0], [1, 1], [0, 0], [0, 1]])
def test_reordered_sequences(formats: tuple[KVFormat, KVFormat], order: list[int]) -> None:
    """Each goes on as its origin would have."""
    history = History(*formats).appended(200, 1, counts=torch.tensor([200, 61], dtype=torch.int32))
    pages, plain = history.pages(), history.pages()

    def assert_same() -> None:
        for x, y in zip(state(plain), state(pages), strict=True):
            # What lies past the longest sequence that went on is not read.
            assert torch.equal(x[order][:, :, : y.shape[2]] if y.dim() > 2 else x[order], y)

    pages.reorder(torch.tensor(order))
    assert_same()
    held = (pages.block_table >= 0).sum((1, 2))
    assert pages.allocated_pages == int(held[: len({*order})].sum())
    keys, values, positions = history.tokens(70, 2)
    drop = torch.tensor([40, 50], dtype=torch.int32)
    for _ in range(2):
        # To a sequence of the new order comes what comes to its origin.
        ops.kv_append(plain, keys, values, positions=positions)
        ops.kv_append(pages, keys[order], values[order], positions=positions)
        ops.kv_rollback(plain, drop)
        ops.kv_rollback(pages, drop[order].contiguous())
    assert_same()


def test_reorder_refuses() -> None:
    pages = History(*FORMATS["kivi2"]).appended(3, 1).pages()
    with pytest.raises(ValueError, match=r"order must be \[2\] int64, got \[3\] torch.int64"):
        pages.reorder(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"order must be in 0 .. 1, got \[0, 2\]"):
        pages.reorder(torch.tensor([0, 2]))


def test_a_shared_target_must_be_empty() -> None:
    pages = History(*FORMATS["kivi2"]).appended(3, 1).pages()
    with pytest.raises(ValueError, match="sequence 1 must be empty to share 0, got tokens"):
        pages.share(0, 1)


def test_too_few_pages_change_nothing() -> None:
    pages = KVPages.allocate(1, 2, 8, 640, keys=DENSE, values=DENSE, pages=5)
    _fill(pages, 128)
    before = pages.block_table.clone()
    with pytest.raises(ValueError, match="kv_append: 2 pages are needed and 1 are free"):
        _fill(pages, 1)
    assert torch.equal(pages.block_table, before)
    assert pages.lengths.tolist() == [[128, 128]]
    with pytest.raises(ValueError, match="pages must have room for 641 tokens, got max_pages"):
        _fill(pages, 513)


def test_allocator_refuses_what_it_does_not_hold() -> None:
    allocator = _host.PageAllocator(4)
    table = np.full((2, 3), -1, np.int32)
    assert allocator.resize(table, np.array([2, 1])) == []
    assert table.tolist() == [[0, 1, -1], [2, -1, -1]]
    damaged = table.copy()
    damaged[0, 1] = 3
    with pytest.raises(IndexError, match="block_table lists page 3, which no row holds"):
        allocator.resize(damaged, np.array([0, 0]))
    with pytest.raises(ValueError, match="a row needs 4 pages of 3"):
        allocator.resize(table, np.array([4, 0]))
    assert allocator.resize(table, np.array([0, 1])) == [0, 1]
    assert allocator.free_runs([0]) == [(0, 2)]
    with pytest.raises(IndexError, match="page 0, which no row holds"):
        allocator.hold(np.array([0], np.int32))
    with pytest.raises(IndexError, match="past the pool"):
        _host.release_memory(np.zeros(4096, np.uint8), 4, [(2, 5)])


def test_formats_that_do_not_fit() -> None:
    for fields, message in (
        ({"bits": 5}, "bits must be 32, 16, 8, 4, 3 or 2, got 5"),
        ({"bits": 4, "axis": "row"}, "axis must be channel or token, got row"),
        ({"bits": 4, "group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
        ({"bits": 4, "step": 40}, "whole groups on the channel axis, got 40"),
        ({"bits": 4, "window": -1}, "window must be at least 0, got -1"),
        ({"bits": 2, "codebook": (0.0, 1.0)}, "2 \\*\\* bits entries"),
        ({"bits": 2, "codebook": (0.0, 1.0, 0.5, 2.0)}, "codebook must be finite and rise"),
    ):
        with pytest.raises(ValueError, match=message):
            KVFormat(**fields)  # type: ignore[arg-type]
    four = KVFormat(4, "channel", 128)
    for options, message in (
        ({"keys": four, "page_size": 64}, "page_size must be a multiple of group_size = 128"),
        ({"keys": KVFormat(16)}, "keys must have 32 bits where they are dense float32, got 16"),
        ({"values": KVFormat(4, "token", 20)}, "values must have groups of 32, 64, 128 or d = 16"),
        ({"page_size": 48}, "page_size must be 32, 64 or 128, got 48"),
        ({"values": KVFormat(4, "token", 32, outliers=17)}, "values must have 0 .. d outliers"),
    ):
        arguments = {"keys": DENSE, "values": DENSE, **options}
        with pytest.raises(ValueError, match=message):
            KVPages.allocate(1, 1, 16, 64, **arguments)  # type: ignore[arg-type]
