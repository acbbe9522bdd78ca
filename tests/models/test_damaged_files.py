"""Damaged files: each either loads or raises FormatError; nothing crashes, hangs or allocates."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given

from openwork.errors import FormatError
from openwork.models import load

from .checkpoints import add_tokenizer, random_model, write_directory, write_gguf, write_tokenizer
from .damage import EXTREME, FUZZ, JSON_PIECES, Damage, damaged, damages, safetensors_header


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """2 GB above what is mapped now: a believed 64-bit size fails at once and not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load_or_refuse(path: Path) -> None:
    try:
        load(path)
    except FormatError as error:
        assert " expected" in str(error)  # what was wrong, not just that something was
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(random_model(layers=1), path, metadata=add_tokenizer)


@FUZZ
@given(damage=damages(EXTREME))
def test_gguf(gguf_file: Path, damage: Damage) -> None:
    header = gguf_file.read_bytes().index(b"blk.0.ffn_down.weight") + 100
    with damaged(gguf_file, damage, header):
        load_or_refuse(gguf_file)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_directory(random_model(layers=1), tmp_path, shards=2)
    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@FUZZ
@given(damage=damages(JSON_PIECES))
def test_json(directory: Path, name: str, damage: Damage) -> None:
    with damaged(directory / name, damage):
        try:
            load_or_refuse(directory)
        except FileNotFoundError as error:
            assert name == "model.safetensors.index.json"
            assert error.filename.startswith(str(directory))


@FUZZ
@given(damage=damages(EXTREME + JSON_PIECES))
def test_safetensors(directory: Path, damage: Damage) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    with damaged(path, damage, safetensors_header(path)):
        load_or_refuse(directory)
