"""Keys and values of one layer in pages: formats, storage, and which pages are in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _host
from .kv_format import GROUPS, KVFormat, KVSide, check, new_side, zero_pool

_BOUND_TOKENS = 16


def _tail_len(formats: Sequence[KVFormat], drafts: int) -> int:
    """Tokens that may wait: a step and a window, and of groups of tokens one unfinished.

    A compaction leaves one where it ends. In whole groups, which do not wrap around.
    """
    groups = [f.group_size if f.axis == "channel" else 0 for f in formats]
    waiting = [f.window + f.step + group for f, group in zip(formats, groups, strict=True)]
    whole = max(32, *groups, 0)
    return -(-(max(waiting) + drafts) // whole) * whole if waiting else 0


@dataclass
class _Room:
    tokens: int = 0


@dataclass(frozen=True)
class KVPages:
    """Keys and values of one layer. Made by :meth:`allocate`, changed by the ``kv_`` operators.

    Every sequence and head, a row, has a length and a list of pages of its own. Token t of a row is
    token ``t % page_size`` of page ``block_table[sequence, head, t // page_size]`` of keys and of
    values, or, while it is not quantized yet, in their tail. The description is frozen, the tensors
    change.

    Attributes:
        key_format, value_format: of the two sides.
        page_size: tokens of a page: 32, 64 or 128.
        block_table: ``[b, kv_heads, max_pages]`` int32 numbers of pages, -1 where there is none.
        lengths: ``[b, kv_heads]`` int32 tokens held.
        keys, values: their storage.
        key_min, key_max: None, or ``[pages, page_size / 16, d]``: bounds of 16 keys each.
        positions: None, or ``[b, kv_heads, max_tokens]`` int32: each token's place in the text.
        allocator: which pages are free.
    """

    key_format: KVFormat
    value_format: KVFormat
    page_size: int
    block_table: Tensor
    lengths: Tensor
    keys: KVSide
    values: KVSide
    key_min: Tensor | None
    key_max: Tensor | None
    positions: Tensor | None
    allocator: _host.PageAllocator
    _room: _Room = field(default_factory=_Room, repr=False)

    @classmethod
    def allocate(
        cls,
        b: int,
        kv_heads: int,
        d: int,
        max_tokens: int,
        *,
        keys: KVFormat,
        values: KVFormat,
        dtype: torch.dtype = torch.float32,
        value_d: int | None = None,
        page_size: int = 64,
        pages: int | None = None,
        drafts: int = 0,
        bounds: bool = False,
        positions: bool = False,
    ) -> KVPages:
        """An empty cache. Pages take memory when they are written to, not before.

        Args:
            b: sequences.
            kv_heads: key heads.
            d: channels of a key.
            max_tokens: a row holds at most; rounded up to whole pages.
            keys, values: formats.
            dtype: of keys and values as they come: float32, bfloat16 or float16.
            value_d: channels of a value, if not d.
            page_size: 32, 64 or 128.
            pages: of the whole cache; None: as many as all rows of ``max_tokens`` take.
            drafts: tokens that may be appended without being committed, beyond window and step.
            bounds: keep bounds of the keys, for :func:`openwork.ops.select_pages`.
            positions: keep the tokens' positions.

        Raises:
            ValueError: sizes and formats that do not fit each other.

        Example:
            >>> four = openwork.KVFormat(4, "channel", 32)
            >>> pages = openwork.KVPages.allocate(1, 2, 64, 1000, keys=four, values=four)
            >>> pages.max_tokens, pages.allocated_pages
            (1024, 0)
        """
        op = "KVPages"
        value_d = d if value_d is None else value_d
        check(page_size in GROUPS, f"{op}: page_size must be 32, 64 or 128, got {page_size}")
        check(
            min(b, kv_heads, d, value_d, max_tokens) >= 1 and drafts >= 0,
            f"{op}: sizes must be at least 1, got b = {b}, kv_heads = {kv_heads}, d = {d}, "
            f"value_d = {value_d}, max_tokens = {max_tokens}, drafts = {drafts}",
        )
        check(max(d, value_d) <= 1024, f"{op}: d must be at most 1024, got {max(d, value_d)}")
        for part, fmt, width in (("keys", keys, d), ("values", values, value_d)):
            check(
                fmt.dense or fmt.group_size in GROUPS or fmt.group_size == width,
                f"{op}: {part} must have groups of 32, 64, 128 or d = {width} channels, got "
                f"{fmt.group_size}",
            )
        max_pages = -(-max_tokens // page_size)
        count = b * kv_heads * max_pages if pages is None else pages
        check(1 <= count < 2**31, f"{op}: pages must be in 1 .. 2 ** 31 - 1, got {count}")
        rows = (b, kv_heads)
        tail_len = _tail_len([f for f in (keys, values) if not f.dense], drafts)
        bound_shape = [count, page_size // _BOUND_TOKENS, d]
        table = torch.full((*rows, max_pages), -1, dtype=torch.int32)
        return cls(
            key_format=keys,
            value_format=values,
            page_size=page_size,
            block_table=table,
            lengths=torch.zeros(rows, dtype=torch.int32),
            keys=new_side("keys", keys, d, rows, count, page_size, tail_len, dtype),
            values=new_side("values", values, value_d, rows, count, page_size, tail_len, dtype),
            key_min=zero_pool(bound_shape, dtype) if bounds else None,
            key_max=zero_pool(bound_shape, dtype) if bounds else None,
            positions=zero_pool([*rows, max_pages * page_size], torch.int32) if positions else None,
            allocator=_host.PageAllocator(count),
        )

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors as operators take them (``csrc/ops/kv_pages.h``)."""
        rest = [t for t in (self.key_min, self.key_max, self.positions) if t is not None]
        return [self.block_table, self.lengths, *self.keys.tensors(), *self.values.tensors(), *rest]

    @cached_property
    def format(self) -> list[int]:
        """The numbers that operators take with :attr:`tensors`."""
        numbers = [self.page_size]
        for fmt, d in ((self.key_format, self.d), (self.value_format, self.value_d)):
            axis = 0 if fmt.axis == "channel" else 1
            numbers += [d, fmt.bits, axis, fmt.group_size, fmt.window, fmt.step, fmt.outliers]
            numbers.append(int(fmt.codebook is not None))
        return [*numbers, int(self.key_min is not None), int(self.positions is not None)]

    @property
    def dtype(self) -> torch.dtype:
        tensor = self.keys.rows if self.key_format.dense else self.keys.tail
        assert tensor is not None
        return tensor.dtype

    @property
    def d(self) -> int:
        tensor = self.keys.rows if self.key_format.dense else self.keys.tail
        assert tensor is not None
        return tensor.shape[-1]

    @property
    def value_d(self) -> int:
        tensor = self.values.rows if self.value_format.dense else self.values.tail
        assert tensor is not None
        return tensor.shape[-1]

    @property
    def max_tokens(self) -> int:
        """Tokens that a row can hold."""
        return self.block_table.shape[2] * self.page_size

    @property
    def allocated_pages(self) -> int:
        """Pages in use; one that rows share counts once."""
        return self.allocator.pages - self.allocator.free_pages

    @property
    def page_bytes(self) -> int:
        """Of keys, values and bounds of a page."""
        return sum(pool.nbytes for pool in self._pools()) // self.allocator.pages

    def bytes(self) -> int:
        """Bytes of the pages in use, and of the tails."""
        tails = [t for t in (self.keys.tail, self.values.tail) if t is not None]
        return self.allocated_pages * self.page_bytes + sum(t.nbytes for t in tails)

    def reserve(self, tokens: int, op: str = "KVPages", counts: Tensor | None = None) -> None:
        """Make sure that every row has pages for ``tokens`` more tokens, as operators expect.

        Args:
            tokens: to be appended to each row.
            op: who asks, for messages.
            counts: ``[b]`` int32: of each sequence, if not ``tokens``; at most as many.

        Raises:
            ValueError: rows longer than ``max_tokens``, too few free pages, or damaged tables.
        """
        if tokens <= self._room.tokens and self.allocator.shared_pages == 0:
            self._room.tokens -= tokens
            return
        length = self._rows(self.lengths)
        sides = self._committed()
        for end in (int(length.min(initial=0)), int(length.max(initial=0))):
            check(
                0 <= end <= self.max_tokens,
                f"{op}: lengths must be in 0 .. {self.max_tokens} (max_pages * page_size), got "
                f"{end}",
            )
        added = np.full(len(length), tokens)
        if counts is not None and counts.shape == self.lengths.shape[:1]:
            added = np.repeat(counts.numpy().clip(0, tokens), self.lengths.shape[1])
        end = int((length + added).max(initial=0))
        check(
            end <= self.max_tokens,
            f"{op}: pages must have room for {end} tokens, got max_pages * page_size = "
            f"{self.max_tokens}",
        )
        # Never fewer pages than there are: dropping some is the work of trim.
        pages = self._pages_of_rows()
        held = np.maximum(*(committed for _, committed in sides))
        short = int((-(-held // self.page_size) - pages).max(initial=0))
        check(short <= 0, f"{op}: block_table must hold pages for its tokens, got {short} too few")
        after = np.maximum(*(fmt.committed_at(held, length + added) for fmt, held in sides))
        wanted = np.maximum(-(-after // self.page_size), pages)
        self._resize(op, wanted)
        if self.allocator.shared_pages:
            self._unshare(np.minimum(*(committed for _, committed in sides)))
        places = wanted * self.page_size
        room = np.minimum(*(fmt.room(held, length, places) for fmt, held in sides)) - added
        self._room.tokens = int(room.min()) if room.size else 0

    def own(self, dropped: int) -> None:
        """Give every row pages of its own from where it would end without ``dropped`` tokens."""
        if self.allocator.shared_pages:
            ends = np.maximum(self._rows(self.lengths) - dropped, 0)
            self._unshare(ends)

    def trim(self) -> None:
        """Give pages past the tokens held back, and their memory to the system."""
        held = np.maximum(*(committed for _, committed in self._committed()))
        self._release(self._resize("KVPages", -(-held // self.page_size)))
        self._room.tokens = 0

    def share(self, source: int, target: int) -> None:
        """Let sequence ``target``, which must be empty, begin as ``source`` is, in the same pages.

        A page that either of them then changes is copied first.

        Raises:
            ValueError: a target that is not empty.
        """
        check(
            not bool(self.lengths[target].any()),
            f"KVPages: sequence {target} must be empty to share {source}, got tokens",
        )
        pages = self._pages_of_rows().reshape(self.lengths.shape)
        pages[target] = 0
        self._resize("KVPages", pages.reshape(-1))
        table = self.block_table[source].contiguous().view(-1).numpy()
        self.allocator.hold(np.ascontiguousarray(table[table >= 0]))
        for tensor in (self.block_table, *self._row_tensors()):
            tensor[target] = tensor[source]
        self._room.tokens = 0

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` go on as sequence ``order[i]`` was; some may go on twice, or not.

        Those of one origin have the same pages, and a page that one of them then changes is copied
        first.

        Args:
            order: ``[b]`` int64.

        Raises:
            ValueError: another shape or dtype, or numbers of sequences that are not there.
        """
        b = len(self.lengths)
        check(
            order.shape == (b,) and order.dtype == torch.int64,
            f"KVPages: order must be [{b}] int64, got {list(order.shape)} {order.dtype}",
        )
        check(
            bool(((order >= 0) & (order < b)).all()),
            f"KVPages: order must be in 0 .. {b - 1}, got {order.tolist()}",
        )
        table = self.block_table[order]
        pages = table.view(-1).numpy()
        # Held anew before the old rows let go, so that no page that goes on is free in between.
        self.allocator.hold(np.ascontiguousarray(pages[pages >= 0]))
        self._release(self._resize("KVPages", np.zeros(len(self._table()), dtype=np.int64)))
        self.block_table.copy_(table)
        for tensor in self._row_tensors():
            tensor.copy_(tensor[order])
        self._room.tokens = 0

    def _row_tensors(self) -> list[Tensor]:
        """What each row has beside its list of pages."""
        sides = (self.keys.committed, self.keys.tail, self.values.committed, self.values.tail)
        return [t for t in (self.lengths, self.positions, *sides) if t is not None]

    def _release(self, freed: list[int]) -> None:
        """Give the memory of free pages back to the system."""
        if freed:
            runs = self.allocator.free_runs(freed)
            for pool in self._pools():
                raw = pool.view(-1).view(torch.uint8).numpy()
                _host.release_memory(raw, self.allocator.pages, runs)

    def _pools(self) -> list[Tensor]:
        bounds = [t for t in (self.key_min, self.key_max) if t is not None]
        return [*self.keys.pools(), *self.values.pools(), *bounds]

    def _rows(self, tensor: Tensor) -> NDArray[np.int64]:
        return tensor.view(-1).numpy().astype(np.int64)

    def _committed(self) -> list[tuple[KVFormat, NDArray[np.int64]]]:
        pairs = ((self.key_format, self.keys), (self.value_format, self.values))
        return [
            (fmt, self._rows(self.lengths if side.committed is None else side.committed))
            for fmt, side in pairs
        ]

    def _table(self) -> NDArray[np.int32]:
        table: NDArray[np.int32] = self.block_table.view(-1, self.block_table.shape[2]).numpy()
        return table

    def _pages_of_rows(self) -> NDArray[np.int64]:
        gaps = self._table() < 0
        pages: NDArray[np.int64] = np.where(gaps.any(1), gaps.argmax(1), gaps.shape[1])
        return pages

    def _resize(self, op: str, counts: NDArray[np.int64]) -> list[int]:
        try:
            return self.allocator.resize(self._table(), counts)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{op}: {error}") from None

    def _unshare(self, first: NDArray[np.int64]) -> None:
        """Own pages from the one on that token ``first[row]`` is in, or comes to."""
        ends = self._pages_of_rows()
        begins = np.minimum(first // self.page_size, ends)
        for row, begin, end in zip(self._table(), begins, ends, strict=True):
            for old, new in self.allocator.unshare(row, int(begin), int(end)):
                for pool in self._pools():
                    pool[new] = pool[old]
