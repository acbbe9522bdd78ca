"""Mutated files: each either loads or raises FormatError; nothing crashes, hangs or allocates.

The mutations aim at the parts that steer the reader: headers, counts, lengths, JSON.
"""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openwork.errors import FormatError
from openwork.models import load

from .checkpoints import add_tokenizer, random_model, write_directory, write_gguf, write_tokenizer

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

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """2 GB above what is mapped now: a believed 64-bit size fails at once and not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutations(pieces: list[bytes]) -> st.SearchStrategy[list[tuple[float, bytes]]]:
    """A few (place as a share of the region, bytes to write there)."""
    value = st.sampled_from(pieces) | st.binary(min_size=1, max_size=8)
    return st.lists(st.tuples(st.floats(0, 1, exclude_max=True), value), min_size=1, max_size=4)


def mutate(data: bytes, region: int, changes: list[tuple[float, bytes]], keep: float) -> bytes:
    """Overwrite within the first ``region`` bytes, then cut the file to the share ``keep``."""
    mutated = bytearray(data)
    for place, value in changes:
        at = int(place * region)
        mutated[at : at + len(value)] = value
    return bytes(mutated[: int(len(mutated) * keep)])


KEEP = st.just(1.0) | st.floats(0, 1)


def load_or_refuse(path: Path) -> None:
    try:
        load(path)
    except FormatError as error:
        assert " expected" in str(error)  # what was wrong, not just that something was
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = random_model(layers=1)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(model, path, metadata=add_tokenizer).read_bytes()


@FUZZ
@given(changes=mutations(EXTREME), keep=KEEP)
def test_gguf(
    tmp_path: Path, gguf_bytes: bytes, changes: list[tuple[float, bytes]], keep: float
) -> None:
    path = tmp_path / "model.gguf"
    header = gguf_bytes.index(b"blk.0.ffn_down.weight") + 100
    path.write_bytes(mutate(gguf_bytes, header, changes, keep))
    load_or_refuse(path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_directory(random_model(layers=1), tmp_path, shards=2)
    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@FUZZ
@given(changes=mutations(JSON_PIECES), keep=KEEP)
def test_json(directory: Path, name: str, changes: list[tuple[float, bytes]], keep: float) -> None:
    path = directory / name
    original = path.read_bytes()
    path.write_bytes(mutate(original, len(original), changes, keep))
    try:
        load_or_refuse(directory)
    except FileNotFoundError as error:
        assert name == "model.safetensors.index.json" and error.filename.startswith(str(directory))
    finally:
        path.write_bytes(original)


@FUZZ
@given(changes=mutations(EXTREME + JSON_PIECES), keep=KEEP)
def test_safetensors(directory: Path, changes: list[tuple[float, bytes]], keep: float) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    original = path.read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0]
    path.write_bytes(mutate(original, header, changes, keep))
    try:
        load_or_refuse(directory)
    finally:
        path.write_bytes(original)
