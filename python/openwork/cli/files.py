"""Text read from files, and files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from openwork.errors import FormatError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: UTF-8 text expected, got {error.reason}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name beside ``path``, then move it there.

    Raises:
        OSError: it could not be written; ``path`` is as before. The error names ``path``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_writable(path: Path) -> None:
    """Fail now, and not after the work of an hour, if ``path`` cannot be created.

    Makes a temporary file in the nearest folder above ``path`` that exists.

    Raises:
        OSError: it cannot; the error names ``path``.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
