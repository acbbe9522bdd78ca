"""Weights in the "sparse-bitmask" and "sparse-24-bitmask" formats of compressed-tensors.

That library has neither written nor read them since March 2026; its earlier versions do. A tensor
``X.weight [n, k]`` is stored as the values that are kept, row by row, and a bit for each of its
places::

    X.compressed   float [values]             in sparse-24-bitmask [n, k / 2]
    X.bitmask      uint8 [n, ceil(k / 8)]     bit c % 8 of byte c // 8, lowest first: is (r, c) kept
    X.shape        int64 [2]                  n, k; in sparse-24-bitmask [2, 1]
    X.row_offsets  int64 [n]                  index of each row's first value; not in the other

    k = 10:  byte 0    bit 0                       7     byte 1   bit 0    1     2
                       | c0 | c1 | c2 | ... | c7 |                | c8 | c9 | 0 ... 0 |

A vector ``[k]`` is stored as a row would be. In sparse-24-bitmask every 4 neighbouring columns keep
exactly 2, which may be 0. Early versions wrote ``X.weight.compressed`` and so on.

Which tensors are stored this way, the file itself shows; the target patterns of the configuration,
regular expressions from an untrusted file, are never run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openwork.errors import FormatError
from openwork.models.config import Fields
from openwork.models.hf import SafetensorsWeights

# "dense": a sparse model stored with its zeros.
_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "dense")


def is_sparse(quantization: Fields) -> bool:
    """Whether a ``quantization_config`` describes sparse weights in one of these formats.

    Raises:
        FormatError: sparse weights in another format, or quantized ones.
    """
    if "sparsity_config" not in quantization:
        return False
    sparsity = quantization.section("sparsity_config")
    stored = sparsity.get("format", str)
    if stored == "dense" and quantization.get("config_groups", dict, {}):
        return False
    if stored not in _FORMATS or quantization.get("config_groups", dict, {}):
        raise FormatError(
            f"{sparsity.where}: format {', '.join(_FORMATS)} and no config_groups expected, got "
            f"{stored!r} and {len(quantization.get('config_groups', dict, {}))}"
        )
    return True


def linear_to_tensors(name: str, weight: Tensor, *, two_of_four: bool) -> dict[str, Tensor]:
    """What to store for a linear whose dense weight would be called ``name``.

    Args:
        name: ends in ``.weight``.
        weight: ``[n, k]`` of any float dtype; what is not zero is kept.
        two_of_four: in sparse-24-bitmask: ``k`` is a multiple of 4, and of every 4 neighbouring
            columns of ``weight`` at most 2 are not zero.

    Example:
        >>> tensors = linear_to_tensors("X.weight", torch.eye(2, 8), two_of_four=True)
        >>> {name: list(tensor.shape) for name, tensor in tensors.items()}
        {'X.compressed': [2, 4], 'X.bitmask': [2, 1], 'X.shape': [2, 1]}
    """
    n, k = weight.shape
    keep = weight != 0
    if two_of_four:
        # Where fewer are kept, the first zeros of the 4 are stored too.
        blocks = keep.view(n, -1, 4).to(torch.uint8)
        first = blocks.argsort(dim=2, descending=True, stable=True)[..., :2]
        keep = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, first, True).view(n, k)
    stored = name.removesuffix(".weight")
    values = weight[keep]
    bits = np.packbits(keep.numpy(), axis=-1, bitorder="little")
    tensors = {
        f"{stored}.compressed": values.view(n, k // 2) if two_of_four else values,
        f"{stored}.bitmask": torch.from_numpy(bits),
        f"{stored}.shape": torch.tensor([[n], [k]] if two_of_four else [n, k]),
    }
    if not two_of_four:
        counts = keep.sum(1)
        tensors[f"{stored}.row_offsets"] = counts.cumsum(0) - counts
    return tensors


def to_config(
    *, two_of_four: bool, structure: str, sparsity: float, dense: list[str]
) -> dict[str, Any]:
    """The ``quantization_config`` of a model with such linears.

    Args:
        two_of_four: they are in sparse-24-bitmask.
        structure: ``"2:4"``, another N:M, or ``"unstructured"``.
        sparsity: share of zeros among the weights of these linears.
        dense: the other linears, such as ``"lm_head"``.
    """
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": {
            "format": "sparse-24-bitmask" if two_of_four else "sparse-bitmask",
            "global_sparsity": sparsity,
            "sparsity_structure": structure,
            "targets": ["Linear"],
            "ignore": dense,
        },
    }


class BitmaskWeights:
    """A :class:`~openwork.models.weights.WeightSource` that sees the dense tensors of a file.

    Args:
        file: the stored tensors.
    """

    def __init__(self, file: SafetensorsWeights) -> None:
        self._file = file
        self.where = file.where

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the dense tensor, or None where there is none.

        Raises:
            FormatError: the stored tensors contradict each other.
        """
        stored = self._stored(name)
        if stored is None:
            return self._file.shape(name)
        given = self._file.shape(f"{stored}.shape")
        if given not in ((1,), (2,), (2, 1)):
            raise self._wrong(f"{stored}.shape of 1 or 2 sizes", given)
        sizes = self._file.read_raw(f"{stored}.shape")
        if sizes.dtype not in (torch.int32, torch.int64):
            raise self._wrong(f"{stored}.shape of integers", sizes.dtype)
        shape = tuple(sizes.flatten().tolist())
        if min(shape) < 1:
            raise self._wrong(f"{stored}.shape of sizes above 0", shape)
        mask = self._file.shape(f"{stored}.bitmask")
        if mask != (*shape[:-1], -(-shape[-1] // 8)):
            raise self._wrong(f"{stored}.bitmask for a tensor of {list(shape)}", mask)
        return shape

    def read(self, name: str) -> Tensor:
        """The dense tensor, in the dtype of its values.

        Raises:
            FormatError: the stored tensors contradict each other.
        """
        stored, shape = self._stored(name), self.shape(name)
        if stored is None or shape is None:
            return self._file.read(name)
        keep = self._mask(stored, shape)
        if self._file.shape(f"{stored}.compressed") is None:
            raise self._wrong(f"{stored}.compressed", None)
        values = self._file.read(f"{stored}.compressed")
        count = int(keep.sum())
        if values.numel() != count:
            raise self._wrong(
                f"{stored}.compressed of {count} values, as {stored}.bitmask says", values.numel()
            )
        if values.dim() == 2:
            self._check_24(stored, keep, tuple(values.shape))
        elif self._file.shape(f"{stored}.row_offsets") is not None:
            self._check_offsets(stored, keep)
        dense = torch.zeros(shape, dtype=values.dtype)
        dense[keep] = values.flatten()
        return dense

    def _stored(self, name: str) -> str | None:
        """What the stored tensors' names begin with, or None for a tensor stored as it is."""
        for prefix in (name.removesuffix(".weight"), name):
            if self._file.shape(f"{prefix}.bitmask") is not None:
                return prefix
        return None

    def _mask(self, stored: str, shape: tuple[int, ...]) -> Tensor:
        packed = self._file.read_raw(f"{stored}.bitmask")
        if packed.dtype != torch.uint8:
            raise self._wrong(f"{stored}.bitmask of uint8", packed.dtype)
        bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
        if bits[..., shape[-1] :].any():
            raise self._wrong(f"{stored}.bitmask with zero bits after {shape[-1]} columns", "ones")
        return torch.from_numpy(bits[..., : shape[-1]].astype(bool))

    def _check_24(self, stored: str, keep: Tensor, got: tuple[int, ...]) -> None:
        rows, k = len(keep), keep.shape[-1]
        if keep.dim() != 2 or k % 4 or got != (rows, k // 2):
            raise self._wrong(
                f"{stored}.compressed with half of the columns of {list(keep.shape)}", got
            )
        if bool((keep.view(rows, -1, 4).sum(2) != 2).any()):
            raise self._wrong(f"{stored}.bitmask that keeps 2 of every 4 columns", "another")

    def _check_offsets(self, stored: str, keep: Tensor) -> None:
        counts = keep.sum(-1).reshape(-1)
        offsets = self._file.read_raw(f"{stored}.row_offsets").reshape(-1)
        if offsets.tolist() != (counts.cumsum(0) - counts).tolist():
            raise self._wrong(f"{stored}.row_offsets as {stored}.bitmask says", "others")

    def _wrong(self, expected: str, got: object) -> FormatError:
        shown = "none" if got is None else got
        return FormatError(f"{self.where}: {expected} expected, got {shown}")
