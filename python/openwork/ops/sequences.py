"""Checks of queries, keys and the offsets of their sequences (csrc/ops/sequences.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check,
    check_contiguous,
    check_dtype,
    check_float,
    check_last_stride,
    check_range,
)


def check_offsets(op: str, name: str, tensor: Tensor) -> int:
    """Returns the number of sequences."""
    check_dtype(op, name, tensor, torch.int32)
    check(
        tensor.dim() == 1 and tensor.shape[0] >= 1,
        f"{op}: {name} must be [sequences + 1], got {list(tensor.shape)}",
    )
    check_contiguous(op, name, tensor)
    return tensor.shape[0] - 1


def check_sequences(op: str, x_name: str, x: Tensor, name: str, offsets: Tensor | None) -> int:
    """Returns the number of sequences."""
    if offsets is None:
        return x.shape[0]
    count = check_offsets(op, name, offsets)
    check(x.shape[0] == 1, f"{op}: {x_name} must have a batch of 1 with {name}, got {x.shape[0]}")
    return count


def check_same_count(op: str, queries: int, keys: int) -> None:
    check(
        queries == keys,
        f"{op}: keys must come in {queries} sequences (as queries do), got {keys}",
    )


def check_sequence_pairs(
    op: str, q: Tensor, k: Tensor, offsets_q: Tensor | None, offsets_k: Tensor | None
) -> int:
    """Returns the number of sequences."""
    queries = check_sequences(op, "q", q, "cu_seqlens_q", offsets_q)
    check_same_count(op, queries, check_sequences(op, "k", k, "cu_seqlens_k", offsets_k))
    return queries


def check_longest(op: str, name: str, size: int, most: int, offsets: Tensor | None) -> None:
    """A size of the longest sequence, which without offsets is ``most`` and with them no more."""
    check_range(op, name, size, most if offsets is None else 0, most)


def check_heads(op: str, name: str, x: Tensor) -> None:
    check_float(op, name, x)
    check(
        x.dim() == 4 and x.shape[2] >= 1 and x.shape[3] >= 1,
        f"{op}: {name} must be [b, n, heads, d] with heads and d at least 1, got {list(x.shape)}",
    )
    check(
        x.shape[0] < 2**31 and x.shape[1] < 2**31,
        f"{op}: {name} must have fewer than 2^31 sequences and tokens, got {list(x.shape)}",
    )
    check_last_stride(op, name, x)


def check_queries_and_keys(op: str, q: Tensor, k: Tensor) -> None:
    check_heads(op, "q", q)
    check_heads(op, "k", k)
    check_dtype(op, "k", k, q.dtype)
    d, kv_heads = q.shape[3], k.shape[2]
    check(k.shape[3] == d, f"{op}: k must have the d of q, {d}, got {k.shape[3]}")
    check(
        q.shape[2] % kv_heads == 0,
        f"{op}: q must have a multiple of kv_heads = {kv_heads} heads, got {q.shape[2]}",
    )
