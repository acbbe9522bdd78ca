"""Reading GGUF files: header, metadata and dequantized tensors.

::

    "GGUF" | version u32 | tensors u64 | entries u64
    entry:  key string | type u32 | value              string: length u64, bytes
    tensor: name string | dims u32 | dim u64 ... | type u32 | offset u64
    padding | data, each tensor at a multiple of general.alignment

Types, block sizes, tensor names and dequantization come from the ``gguf`` package. Its
``GGUFReader`` is not used: it believes the counts in the file (a damaged one keeps it allocating
without end), and makes several numpy objects of every string of the vocabulary, which takes twenty
times as long as the reading here.
"""

from __future__ import annotations

import math
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from openwork.errors import FormatError
from openwork.models.gguf_config import config_from_gguf
from openwork.models.llama import Llama
from openwork.models.tokenizer import tokenizer_from_gguf
from openwork.models.weights import build

_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class GGUFTensor(NamedTuple):
    """Where a tensor lies in the file and how.

    Attributes:
        shape: rows first, as in torch (GGUF itself stores the innermost dimension first).
        kind: the storage type.
        offset: of the first byte, from the start of the file.
        nbytes: stored bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file; use it in a ``with`` statement.

    Args:
        path: the file.

    Attributes:
        metadata: key -> str, int, float, bool or list of one of them.
        tensors: name -> :class:`GGUFTensor`, every one within the file.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it is not a GGUF file, or is truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with ExitStack() as on_error:
            self._file: BinaryIO = on_error.enter_context(self.path.open("rb"))
            self._size = self._file.seek(0, 2)
            self._file.seek(0)
            self._position = 0
            self.metadata: dict[str, Any] = {}
            self.tensors: dict[str, GGUFTensor] = {}
            self._read_header()
            on_error.pop_all()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Read and dequantize one tensor.

        Returns:
            ``tensors[name].shape`` float32.

        Raises:
            FormatError: a storage type the ``gguf`` package cannot dequantize.
        """
        tensor = self.tensors[name]
        self._file.seek(tensor.offset)
        # The header's check covers this read; what is left is a file that shrank since.
        self._position = tensor.offset
        data = np.frombuffer(self._take(tensor.nbytes, f"data of {name}"), dtype=np.uint8)
        rows = data.reshape(*tensor.shape[:-1], -1)
        try:
            values = gguf.quants.dequantize(rows, tensor.kind)
        except NotImplementedError as error:
            raise FormatError(
                f"{self.path}: {name} in a floating-point or block format expected, "
                f"got {tensor.kind.name}"
            ) from error
        # F32 comes back as a view of the read-only bytes, which torch warns about.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _fail(self, what: str, got: object) -> FormatError:
        return FormatError(f"{self.path}: {what} expected at byte {self._position}, got {got}")

    def _take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes, checked against the file's size before they are read."""
        left = self._size - self._position
        if count > left:
            raise self._fail(f"{what} ({count} bytes)", f"{left} bytes to the end of the file")
        data = self._file.read(count)
        if len(data) != count:
            raise self._fail(f"{what} ({count} bytes)", f"{len(data)} bytes")
        self._position += count
        return data

    def _u32(self, what: str) -> int:
        value: int = struct.unpack("<I", self._take(4, what))[0]
        return value

    def _u64(self, what: str) -> int:
        value: int = struct.unpack("<Q", self._take(8, what))[0]
        return value

    def _string(self, what: str) -> str:
        data = self._take(self._u64(f"length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._fail(f"{what} in UTF-8", error) from error

    def _read_header(self) -> None:
        magic = self._take(min(4, self._size), "magic")
        if magic != b"GGUF":
            raise FormatError(
                f"{self.path}: a GGUF file expected, got one that starts with {magic!r}"
            )
        version = self._u32("version")
        if version not in _VERSIONS:
            raise self._fail("version 2 or 3 (little-endian)", version)
        tensors, entries = self._u64("tensor count"), self._u64("entry count")
        for _ in range(entries):
            key = self._string("a key")
            if key in self.metadata:
                raise self._fail("distinct keys", f"{key} twice")
            self.metadata[key] = self._value(key)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._fail("a positive general.alignment", alignment)
        infos = [self._tensor_info() for _ in range(tensors)]
        base = math.ceil(self._position / alignment) * alignment
        for name, tensor in infos:
            end = base + tensor.offset + tensor.nbytes
            if tensor.offset % alignment or end > self._size:
                raise FormatError(
                    f"{self.path}: {name} at a multiple of {alignment} and within the file's "
                    f"{self._size} bytes expected, got bytes {base + tensor.offset} to {end}"
                )
            if name in self.tensors:
                raise FormatError(f"{self.path}: distinct tensor names expected, got {name} twice")
            self.tensors[name] = tensor._replace(offset=base + tensor.offset)

    def _kind(self, what: str) -> GGUFValueType:
        value = self._u32(what)
        try:
            return GGUFValueType(value)
        except ValueError as error:
            raise self._fail(what, value) from error

    def _value(self, key: str) -> Any:
        kind = self._kind(f"type of {key}")
        if kind is GGUFValueType.STRING:
            return self._string(key)
        if kind is not GGUFValueType.ARRAY:
            return self._scalars(kind, 1, key)[0]
        kind = self._kind(f"element type of {key}")
        count = self._u64(f"length of {key}")
        if kind is GGUFValueType.ARRAY:
            raise self._fail(f"{key} of scalars or strings", "an array of arrays")
        if kind is not GGUFValueType.STRING:
            return self._scalars(kind, count, key)
        # Every string takes 8 bytes or more, so the file's size bounds the loop.
        return [self._string(key) for _ in range(count)]

    def _scalars(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self._take(count * dtype.itemsize, what), dtype).tolist()
        return values

    def _tensor_info(self) -> tuple[str, GGUFTensor]:
        name = self._string("a tensor name")
        dims = self._u32(f"dimensions of {name}")
        if not 1 <= dims <= 4:
            raise self._fail(f"1 to 4 dimensions of {name}", dims)
        shape = tuple(self._u64(f"shape of {name}") for _ in range(dims))[::-1]
        value = self._u32(f"type of {name}")
        try:
            kind = GGMLQuantizationType(value)
        except ValueError as error:
            raise self._fail(f"a known type of {name}", value) from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or 0 in shape:
            raise self._fail(f"{name} with rows of whole blocks of {block}", list(shape))
        nbytes = math.prod(shape) // block * block_bytes
        return name, GGUFTensor(shape, kind, self._u64(f"offset of {name}"), nbytes)


class _GGUFWeights:
    """A :class:`~openwork.models.weights.WeightSource` over a GGUF file."""

    def __init__(self, file: GGUFFile, heads: int, kv_heads: int) -> None:
        self.where = str(file.path)
        self._file = file
        # llama.cpp's converter reorders q and k of "llama" models for its own rotary convention.
        permuted = file.metadata["general.architecture"] == "llama"
        self._permuted = {"q_proj": heads, "k_proj": kv_heads} if permuted else {}
        blocks = sum(name.endswith(".attn_norm.weight") for name in file.tensors)
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)

    def _stored_name(self, name: str) -> str:
        # A name past the map's blocks stays as it is, and is then simply not found.
        return self._names.get_name(name, try_suffixes=(".weight", ".bias")) or name

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._file.tensors.get(self._stored_name(name))
        return None if tensor is None else tensor.shape

    def read(self, name: str) -> Tensor:
        tensor = self._file.read(self._stored_name(name))
        heads = self._permuted.get(name.split(".")[-2])
        return tensor if heads is None else unpermute(tensor, heads)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo the row order llama.cpp stores q and k of "llama" models in.

    GGUF pairs neighbours under the rotation, ``x[2 i]`` with ``x[2 i + 1]``; Hugging Face pairs
    halves, ``x[i]`` with ``x[i + e / 2]``. Within each head, row ``2 i + j`` goes to row
    ``i + j e / 2``.

    Args:
        rows: ``[heads * e, ...]``.

    Returns:
        A reordered copy.
    """
    halves = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Llama:
    """Load a model, and its tokenizer where it is a byte-level BPE, from a GGUF file.

    Weights are dequantized to ``dtype``; any block format the ``gguf`` package knows is read.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it is damaged, or a model this decoder does not compute.
    """
    with GGUFFile(path) as file:
        divisors = None
        if "rope_freqs.weight" in file.tensors:
            divisors = tuple(file.read("rope_freqs.weight").flatten().tolist())
        config = config_from_gguf(
            file.metadata,
            str(path),
            tied_head="output.weight" not in file.tensors,
            rope_divisors=divisors,
        )
        model = build(config, _GGUFWeights(file, config.heads, config.kv_heads), dtype)
        model.tokenizer = tokenizer_from_gguf(file.metadata, str(path))
        return model
