"""The three float types on numpy arrays; bf16, which numpy lacks, travels as its bits in uint16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
# Half a unit in the last place, relative: 2**-p for p significant bits.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the distance between subnormals.
UNDERFLOW = {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
# All bits set: a NaN that no kernel computes.
POISON = {"float32": 0xFFFFFFFF, "float16": 0xFFFF, "bfloat16": 0xFFFF}


def store(values: npt.ArrayLike, dtype: str) -> npt.NDArray[np.generic]:
    """Values rounded to nearest even; not for NaN."""
    x = np.ascontiguousarray(values, np.float32)
    if dtype != "bfloat16":
        return x.astype(STORAGE[dtype])
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def load(stored: npt.NDArray[np.generic]) -> FloatArray:
    """What the stored values are, exactly."""
    with np.errstate(invalid="ignore"):  # signalling NaNs become quiet
        if stored.dtype == np.uint16:
            return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return stored.astype(np.float64)


def poisoned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    array = np.empty(shape, STORAGE[dtype])
    bits_of(array)[...] = POISON[dtype]
    return array


def bits_of(array: npt.NDArray[np.generic]) -> npt.NDArray[np.unsignedinteger]:
    """The array's bits, for comparisons that tell NaN from NaN and -0 from 0."""
    return array.view(np.uint32 if array.itemsize == 4 else np.uint16)


def rounding(expected: FloatArray, error: FloatArray, dtype: str) -> FloatArray:
    """The largest distance between ``expected`` and a result off by ``error``, then stored."""
    return error + ROUNDOFF[dtype] * (np.abs(expected) + error) + UNDERFLOW[dtype]
