"""Reading Hugging Face directories: ``config.json``, ``*.safetensors``, ``tokenizer.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from openwork.errors import FormatError
from openwork.models.config import config_from_hf
from openwork.models.llama import Llama
from openwork.models.tokenizer import tokenizer_from_file
from openwork.models.weights import build

# Of a bare safetensors header; ours are floats, everything else is not a plain weight.
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: JSON expected, got: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: a JSON object expected, got {type(value).__name__}")
    return value


class SafetensorsWeights:
    """The tensors of a directory: ``model.safetensors``, or the shards an index lists.

    A :class:`~openwork.models.weights.WeightSource`. Files are memory-mapped; nothing is read
    before :meth:`read`.

    Raises:
        OSError: a file is missing or unreadable.
        FormatError: a file is truncated or damaged, or the index points outside the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.where = str(directory)
        index = directory / "model.safetensors.index.json"
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        names = _shards(index) if index.exists() else ["model.safetensors"]
        for name in names:
            self._open(directory / name)

    def _open(self, path: Path) -> None:
        path.open("rb").close()  # so that a missing file is an OSError that names it
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                self._files[name] = file
                self._shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = part.get_dtype()
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f"{path}: a complete safetensors file expected, got: {error}"
            ) from error

    def names(self) -> list[str]:
        """All tensors, in no particular order."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None where there is no such tensor."""
        return self._shapes.get(name)

    def read(self, name: str) -> Tensor:
        """A floating-point tensor, in the dtype it is stored in.

        Raises:
            FormatError: it holds something else.
        """
        if self._dtypes[name] not in _FLOATS:
            raise FormatError(
                f"{self.where}: {name} in one of {', '.join(_FLOATS)} expected, "
                f"got {self._dtypes[name]}"
            )
        return self.read_raw(name)

    def read_raw(self, name: str) -> Tensor:
        """A tensor of any dtype."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _shards(index: Path) -> list[str]:
    """The files an index lists, each a plain name beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map expected, got {weight_map!r}")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        # The index may come from anywhere; it must not make us open other files.
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise FormatError(f"{index}: names of safetensors beside it expected, got {name!r}")
    return names


def load_hf(directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Llama:
    """Load a model from a directory, and its tokenizer where there is a ``tokenizer.json``.

    Raises:
        OSError: a file is missing or unreadable.
        FormatError: one is damaged, or the model is not one this decoder computes.
    """
    directory = Path(directory)
    path = directory / "config.json"
    config = config_from_hf(read_json(path), str(path))
    model = build(config, SafetensorsWeights(directory), dtype)
    if (directory / "tokenizer.json").exists():
        model.tokenizer = tokenizer_from_file(directory / "tokenizer.json")
    return model
