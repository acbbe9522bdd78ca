"""What ``config.json`` says to this library alone, under the key "openwork"::

    {"embedding": "lm_head",                 it equals the quantized head: no need to read its rows
     "sparse": {"layers.0.mlp.down": "2:4",  what to hold without its zeros, and in which pattern:
                ...}}                        N:M, V:N:M or "unstructured"

Other libraries have no form for either. They read the embedding's rows and a dense weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openwork.errors import FormatError
from openwork.prune.masks import NM

_KEY = "openwork"
_EMBEDDING = "lm_head"
_UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class OwnKeys:
    """The same, read.

    Attributes:
        shares_head: the embedding is the quantized weight of the head.
        sparse: names of sparse linears; None stands for zeros anywhere.
    """

    shares_head: bool = False
    sparse: Mapping[str, NM | None] = field(default_factory=dict)

    def to_config(self) -> dict[str, Any]:
        """The entry of ``config.json``, or nothing if there is nothing to say.

        Example:
            >>> OwnKeys(sparse={"layers.0.mlp.down": NM(2, 4)}).to_config()
            {'openwork': {'sparse': {'layers.0.mlp.down': '2:4'}}}
        """
        said: dict[str, Any] = {}
        if self.shares_head:
            said["embedding"] = _EMBEDDING
        if self.sparse:
            said["sparse"] = {name: structure(pattern) for name, pattern in self.sparse.items()}
        return {_KEY: said} if said else {}


def own_keys(values: Mapping[str, Any], where: str) -> OwnKeys:
    """Read the entry of a ``config.json``.

    Raises:
        FormatError: it says what this version does not know.
    """
    found = values.get(_KEY)
    if found is None:
        return OwnKeys()
    known = isinstance(found, dict) and found and found.keys() <= {"embedding", "sparse"}
    if not known or found.get("embedding", _EMBEDDING) != _EMBEDDING:
        raise FormatError(
            f"{where}: openwork = {{'embedding': {_EMBEDDING!r}, 'sparse': ...}}, one of them or "
            f"none expected, got {found!r}"
        )
    sparse = found.get("sparse", {})
    if not isinstance(sparse, dict):
        raise FormatError(f"{where}: openwork.sparse: names and patterns expected, got {sparse!r}")
    patterns = {name: _pattern(text, f"{where}: openwork.sparse") for name, text in sparse.items()}
    return OwnKeys("embedding" in found, patterns)


def structure(pattern: NM | None) -> str:
    """The name of a pattern in a file."""
    return _UNSTRUCTURED if pattern is None else str(pattern)


def _pattern(text: object, where: str) -> NM | None:
    if text == _UNSTRUCTURED:
        return None
    if not isinstance(text, str):
        raise FormatError(f"{where}: a pattern expected, got {text!r}")
    try:
        return NM.parse(text)
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error
