"""Whole safetensors files: checked reads, and writes that happen completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from openwork.errors import FormatError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata.

    The tensors may be backed by the file itself: replace such a file, never write into it.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it is not a complete safetensors file.
    """
    path.open("rb").close()  # so that a missing file is an OSError that names it
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    # The last two are torch's, for sizes that the library believes: of 0 elements, beyond 64 bits.
    except (safetensors.SafetensorError, RuntimeError, TypeError) as error:
        raise FormatError(f"{path}: a complete safetensors file expected, got: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then move it to ``path``.

    Raises:
        OSError: it could not be written, for want of space or permission; ``path`` is as before.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        safetensors.torch.save_file(dict(tensors), partial, metadata=dict(metadata))
        os.replace(partial, path)
    except safetensors.SafetensorError as error:
        # The library wraps the system's error in its own type and drops the path.
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
