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
