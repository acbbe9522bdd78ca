"""Which keys each block of queries attends to: what estimators decide and attention kernels run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_BLOCK, MAX_BLOCK = 16, 128


@dataclass(frozen=True)
class BlockIndex:
    """Lists of key blocks, and optionally of single keys, for each head and block of queries.

    Row ``r`` of head ``x`` attends to the keys of the blocks
    ``indices[indptr[x, r] : indptr[x, r + 1]]`` and to the single keys
    ``columns[column_indptr[x, r] : column_indptr[x, r + 1]]``, of its own sequence. Masks that
    follow from positions (causal, window, sinks) are the operator's and come on top, so an index
    may list keys that a query cannot see. ::

        rows of a batch of two sequences, block_m = 64:
          sequence 0, 100 queries         sequence 1, 65 queries
          r = 0: 0..63   r = 1: 64..99    r = 2: 0..63   r = 3: 64

    Dtypes and shapes are checked here; what the tensors hold is checked by the operators that read
    it, since an index outside of the keys would be read there.

    Attributes:
        indptr: ``[index_heads, rows + 1]`` int32: offsets into ``indices``, rising from 0 to nnz
            through all heads: ``indptr[x, 0] == indptr[x - 1, -1]``. ``index_heads`` is 1, the
            number of key heads, or that of query heads; ``rows`` are the query blocks of all
            sequences in order, ``ceil(sq / block_m)`` of each.
        indices: ``[nnz]`` int32: block ``c`` is the keys ``c * block_n .. (c + 1) * block_n - 1``;
            strictly increasing in a row.
        block_m: queries of a block: a multiple of 16 in 16 .. 128.
        block_n: keys of a block, alike.
        column_indptr: as ``indptr``, into ``columns``; None without columns.
        columns: ``[columns]`` int32: positions of single keys, strictly increasing in a row, none
            inside a listed block of that row; None without columns.

    Example:
        >>> index = openwork.BlockIndex(  # 40 tokens: each block sees itself and token 0
        ...     torch.tensor([[0, 1, 2, 3]], dtype=torch.int32),
        ...     torch.tensor([0, 1, 2], dtype=torch.int32),
        ...     block_m=16,
        ...     block_n=16,
        ...     column_indptr=torch.tensor([[0, 0, 1, 2]], dtype=torch.int32),
        ...     columns=torch.tensor([0, 0], dtype=torch.int32),
        ... )
        >>> index.to_mask([40], [40])[0][0, 39].nonzero().flatten().tolist()
        [0, 32, 33, 34, 35, 36, 37, 38, 39]
        >>> round(index.density([40], [40]), 3)
        0.405
    """

    indptr: Tensor
    indices: Tensor
    block_m: int
    block_n: int
    column_indptr: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if not (MIN_BLOCK <= size <= MAX_BLOCK and size % 16 == 0):
                raise ValueError(
                    f"BlockIndex: {name} must be a multiple of 16 in {MIN_BLOCK} .. {MAX_BLOCK}, "
                    f"got {size}"
                )
        _check_lists("indptr", self.indptr, "indices", self.indices)
        if (self.column_indptr is None) != (self.columns is None):
            raise ValueError("BlockIndex: column_indptr and columns must come together, got one")
        if self.column_indptr is not None and self.columns is not None:
            _check_lists("column_indptr", self.column_indptr, "columns", self.columns)
            if self.column_indptr.shape != self.indptr.shape:
                raise ValueError(
                    f"BlockIndex: column_indptr must have shape {list(self.indptr.shape)}, got "
                    f"{list(self.column_indptr.shape)}"
                )

    @property
    def index_heads(self) -> int:
        return self.indptr.shape[0]

    @property
    def rows(self) -> int:
        return self.indptr.shape[1] - 1

    def density(self, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> float:
        """Listed pairs of query and key over all pairs, of those a causal mask leaves.

        Args:
            q_lengths: queries of each sequence.
            k_lengths: keys of each sequence; the last query is at the last key.

        Returns:
            0 .. 1; 1 for sequences without any pair. Takes O(nnz).
        """
        first, last, k_length = self._row_positions(q_lengths, k_lengths)
        listed = 0
        lists = [(self.indptr, self.indices, self.block_n)]
        if self.column_indptr is not None and self.columns is not None:
            lists.append((self.column_indptr, self.columns, 1))
        for indptr, items, width in lists:
            row = torch.arange(self.rows).repeat(self.index_heads)
            row = row.repeat_interleave(indptr.diff(dim=1).flatten().long())
            begin = items.long() * width
            end = torch.minimum(begin + width, k_length[row])
            listed += int(_causal_pairs(first[row], last[row], begin, end).sum())
        every = _causal_pairs(first, last, torch.zeros_like(first), k_length).sum()
        possible = int(every) * self.index_heads
        return listed / possible if possible else 1.0

    def to_mask(self, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> list[Tensor]:
        """What is listed, as one ``[index_heads, sq, sk]`` bool of each sequence; for tests.

        Args:
            q_lengths: queries of each sequence.
            k_lengths: keys of each sequence.
        """
        self._row_positions(q_lengths, k_lengths)
        masks, row = [], 0
        for sq, sk in zip(q_lengths, k_lengths, strict=True):
            blocks = -(-sq // self.block_m)
            mask = torch.zeros(self.index_heads, blocks, sk + self.block_n, dtype=torch.bool)
            for x in range(self.index_heads):
                for r in range(blocks):
                    for c in _items(self.indptr, self.indices, x, row + r):
                        mask[x, r, c * self.block_n : (c + 1) * self.block_n] = True
                    if self.column_indptr is not None and self.columns is not None:
                        mask[x, r, _items(self.column_indptr, self.columns, x, row + r)] = True
            masks.append(mask.repeat_interleave(self.block_m, dim=1)[:, :sq, :sk])
            row += blocks
        return masks

    def _row_positions(
        self, q_lengths: Sequence[int], k_lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the first and last query of each row, and the keys of its sequence."""
        first, last, keys = [], [], []
        for sq, sk in zip(q_lengths, k_lengths, strict=True):
            begin = torch.arange(0, sq, self.block_m)
            first.append(sk - sq + begin)
            last.append(sk - sq + (begin + self.block_m).clamp(max=sq) - 1)
            keys.append(torch.full_like(begin, sk))
        rows = sum(map(len, first))
        if rows != self.rows:
            raise ValueError(
                f"BlockIndex: q_lengths must make {self.rows} blocks of {self.block_m} queries, "
                f"got {rows}"
            )
        if not first:
            empty = torch.empty(0, dtype=torch.int64)
            return empty, empty, empty
        return torch.cat(first), torch.cat(last), torch.cat(keys)


def _check_lists(indptr_name: str, indptr: Tensor, items_name: str, items: Tensor) -> None:
    for name, tensor, rank, shape in (
        (indptr_name, indptr, 2, "[index_heads, rows + 1]"),
        (items_name, items, 1, "[nnz]"),
    ):
        if tensor.dtype != torch.int32:
            raise ValueError(f"BlockIndex: {name} must be int32, got {str(tensor.dtype)[6:]}")
        if tensor.dim() != rank or (rank == 2 and 0 in tensor.shape):
            raise ValueError(f"BlockIndex: {name} must be {shape}, got {list(tensor.shape)}")


def _items(indptr: Tensor, items: Tensor, head: int, row: int) -> list[int]:
    begin, end = indptr[head, row : row + 2].tolist()
    listed: list[int] = items[begin:end].tolist()
    return listed


def _causal_pairs(first: Tensor, last: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Pairs of a query at ``first .. last`` and a key at ``begin .. end - 1`` not after it."""

    def triangle(x: Tensor) -> Tensor:
        return x.clamp(min=0) * (x.clamp(min=0) + 1) // 2

    # Keys up to the query, less those of them that are at `end` or behind.
    upto = triangle(last - begin + 1) - triangle(first - begin)
    past = triangle(last - end + 1) - triangle(first - end)
    return torch.where(end > begin, upto - past, 0)
