"""Small unsigned integers packed into 32-bit words with no bit left over.

Value ``i`` of a row takes bits ``i b .. i b + b - 1`` of the row's stream; bit ``t`` of the stream
is bit ``t % 32`` of word ``t // 32``, so a value may straddle two words. Three bits::

    word 0   bit 0                                30  31
             | v0  | v1  | v2  | ...        | v9  | v10'       the low 2 bits of v10
    word 1   | v10'' | v11 | v12 | ...                         its high bit

A row ends with zero bits up to a whole word. This is how compressed-tensors packs since 0.17
(before, 3-bit values did not straddle words); at 2, 4 and 8 bits no value ever straddles one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# One byte per bit exists while packing; rows are done in pieces of about this many bits.
_PIECE = 1 << 25


def word_count(k: int, bits: int) -> int:
    """Words in a packed row of ``k`` values: ``ceil(k bits / 32)``."""
    return -(-k * bits // 32)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack each row of ``values [n, k]`` uint8, all below ``2**bits``, into ``[n, words]`` int32.

    Example:
        >>> pack_words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x321]]
        True
    """
    n, k = values.shape
    words = np.zeros((n, word_count(k, bits)), dtype=np.int32)
    target = words.view(np.uint8)
    source = values.contiguous().numpy()
    step = max(1, _PIECE // (k * bits))
    for begin in range(0, n, step):
        piece = source[begin : begin + step]
        stream = np.unpackbits(piece[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(stream.reshape(len(piece), k * bits), axis=-1, bitorder="little")
        target[begin : begin + step, : packed.shape[1]] = packed
    return torch.from_numpy(words)


def unpack_words(words: Tensor, bits: int, k: int) -> Tensor:
    """The inverse: ``[n, word_count(k, bits)]`` int32 to ``[n, k]`` uint8.

    Example:
        >>> unpack_words(torch.tensor([[0x321]], dtype=torch.int32), 4, 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    n = words.shape[0]
    values = np.empty((n, k), dtype=np.uint8)
    source = words.contiguous().numpy().view(np.uint8)
    step = max(1, _PIECE // (k * bits))
    for begin in range(0, n, step):
        piece = source[begin : begin + step]
        stream = np.unpackbits(piece, axis=-1, count=k * bits, bitorder="little")
        stream = stream.reshape(len(piece), k, bits)
        values[begin : begin + step] = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(values)
