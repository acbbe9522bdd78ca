"""Host-side objects of openwork."""

import numpy as np
from numpy.typing import NDArray

class PagePool:
    """Huge-page memory for packed weights."""

    def __init__(self) -> None: ...
    def empty(self, nbytes: int) -> NDArray[np.uint8]:
        """A uint8 array of nbytes, 64-byte aligned; freed with its last view."""
    @property
    def mapped_bytes(self) -> int: ...

class PageAllocator:
    """Numbers of pages, held by rows of a block table."""

    def __init__(self, pages: int) -> None: ...
    def resize(self, table: NDArray[np.int32], counts: NDArray[np.int64]) -> list[int]:
        """Make row r of ``table`` hold ``counts[r]`` pages; returns those that are free by that."""
    def hold(self, pages: NDArray[np.int32]) -> None:
        """One more row holds these pages."""
    def unshare(self, row: NDArray[np.int32], begin: int, end: int) -> list[tuple[int, int]]:
        """Give a row pages of its own; returns (old, new) where it had to change."""
    def free_runs(self, pages: list[int]) -> list[tuple[int, int]]:
        """Runs ``[begin, end)`` of free pages around the given ones, which rise."""
    @property
    def pages(self) -> int: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def shared_pages(self) -> int: ...

def release_memory(pool: NDArray[np.uint8], pages: int, runs: list[tuple[int, int]]) -> None:
    """Give the memory of runs of a pool's pages back to the system."""
