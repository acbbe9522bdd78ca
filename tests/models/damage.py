"""Damage to files: a few bytes written over the parts that steer a reader, and a cut."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Integers that counts, lengths and types are most likely to be wrong at.
EXTREME = [
    struct.pack(kind, value)
    for kind, values in (
        ("<B", (0, 1, 9, 127, 255)),
        ("<I", (0, 1, 2**31 - 1, 2**31, 2**32 - 1)),
        ("<Q", (0, 1, 2**20, 2**32, 2**40, 2**61, 2**63 - 1, 2**64 - 1)),
    )
    for value in values
]
JSON_PIECES = [b"-1", b"0", b"9" * 30, b"1e999", b"null", b"{}", b"[]", b'"', b"true", b"}", b","]

# Fixtures that last for all examples hold the file, which `damaged` puts back after each.
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Damage:
    """What happens to one file.

    Attributes:
        changes: (place as a share of the region, bytes to write there).
        keep: share of the file that is left.
    """

    changes: list[tuple[float, bytes]]
    keep: float

    def of(self, data: bytes, region: int) -> bytes:
        """``data`` with its first ``region`` bytes changed, cut."""
        result = bytearray(data)
        for place, value in self.changes:
            at = int(place * region)
            result[at : at + len(value)] = value
        return bytes(result[: int(len(result) * self.keep)])


def damages(pieces: list[bytes]) -> st.SearchStrategy[Damage]:
    """One to four of ``pieces`` or of random bytes, and in half of the examples a cut."""
    value = st.sampled_from(pieces) | st.binary(min_size=1, max_size=8)
    change = st.tuples(st.floats(0, 1, exclude_max=True), value)
    return st.builds(
        Damage, st.lists(change, min_size=1, max_size=4), st.just(1.0) | st.floats(0, 1)
    )


@contextmanager
def damaged(path: Path, damage: Damage, region: int | None = None) -> Iterator[None]:
    """Damage the first ``region`` bytes of a file, None: all of them, until the block ends."""
    original = path.read_bytes()
    path.write_bytes(damage.of(original, len(original) if region is None else region))
    try:
        yield
    finally:
        path.write_bytes(original)


def safetensors_header(path: Path) -> int:
    """Bytes of the part of a safetensors file that says what the rest is."""
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])
