"""Exceptions that carry a message meant for the person at the keyboard."""

from __future__ import annotations


class FormatError(ValueError):
    """A model file that cannot be read, or whose parts contradict each other.

    The text is ``<file>: <what> expected, got <actual>``. Everything read from a file is checked
    before it is used, so this is the only exception a damaged or hostile model file causes.
    """


class DownloadError(RuntimeError):
    """A pinned download that failed or did not have the expected SHA-256."""
