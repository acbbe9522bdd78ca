"""Key heads of sequences as rows of pages: row ``s * g + x`` is head x of sequence s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openwork import ops
from openwork.kv_pages import KVPages
from openwork.kvcache.budgets import kept_tokens
from openwork.kvcache.policy import Kept, Prompt, State


def query_rows(q: Tensor, g: int) -> Tensor:
    """``[b, t, h, d] -> [b g, t, h / g, d]``: the queries that read each row."""
    b, t, h, d = q.shape
    return q.view(b, t, g, h // g, d).transpose(1, 2).reshape(b * g, t, h // g, d)


def all_heads(x: Tensor, g: int) -> Tensor:
    """``[b g, t, h / g, ...] -> [b, t, h, ...]``."""
    x = x.view(-1, g, *x.shape[1:]).transpose(1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def attend_all(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> State:
    """Attention of any number of queries to every token of the rows.

    Args:
        q: ``[b, t, h, d]``.
        keys: ``[b g, n, d]``; ``values [b g, n, dv]``.
        lengths: ``[b g]``: tokens of each row; what follows them is not read.
        scale: of the scores.
    """
    t, d = q.shape[1], q.shape[3]
    count, g = len(lengths), len(lengths) // q.shape[0]
    held = torch.arange(keys.shape[1]) < lengths.unsqueeze(-1)
    o, lse = ops.block_attention(
        query_rows(q, g).reshape(1, count * t, -1, d),
        keys[held].view(1, -1, 1, d),
        values[held].view(1, -1, 1, values.shape[-1]),
        causal=False,
        scale=scale,
        return_lse=True,
        cu_seqlens_q=torch.arange(0, count * t + 1, t, dtype=torch.int32),
        cu_seqlens_k=F.pad(lengths.cumsum(0), (1, 0)).int(),
    )
    return State(*(all_heads(x.view(count, t, *x.shape[2:]), g) for x in (o, lse)))


class Rows(NamedTuple):
    """Tokens of heads of sequences, each of which is a row of pages.

    Attributes:
        keys: ``[rows, n, d]``; ``values [rows, n, dv]``.
        counts: ``[rows]`` int64: tokens of each; what follows them is anything.
        places: ``[rows, n]`` int64: each token's place in its prompt.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor
    places: Tensor


def kept_rows(prompt: Prompt, kept: Kept | None) -> Rows:
    """What is kept of a prompt, or all of it with None."""
    b, g, n, _ = prompt.keys.shape
    if kept is None:
        places = torch.arange(n).expand(b * g, n)
        whole = prompt.keys.flatten(0, 1), prompt.values.flatten(0, 1)
        return Rows(*whole, torch.full((b * g,), n), places)
    keys = prompt.keys if kept.keys is None else kept.keys
    values = prompt.values if kept.values is None else kept.values
    mask = kept.mask.flatten(0, 1)
    # Rows that keep fewer tokens are filled up with any.
    places = kept_tokens(mask).clamp(max=n - 1)
    index = places.view(b, g, -1, 1)
    keys, values = (
        x.gather(2, index.expand(*index.shape[:3], x.shape[-1])).flatten(0, 1)
        for x in (keys, values)
    )
    return Rows(keys, values, mask.sum(-1), places)


def append_rows(pages: KVPages, parts: Sequence[Rows], first: int) -> None:
    """Fill empty pages.

    Args:
        pages: of as many rows as the parts have together.
        parts: of one sequence after another.
        first: place in the text of a prompt's first token.
    """
    most = max(part.places.shape[1] for part in parts)
    keys, values = (
        torch.cat([F.pad(x, (0, 0, 0, most - x.shape[1])) for x in side])
        for side in ([part.keys for part in parts], [part.values for part in parts])
    )
    positions = None
    if pages.positions is not None:
        places = [F.pad(part.places, (0, most - part.places.shape[1])) for part in parts]
        positions = (torch.cat(places) + first).int()
    ops.kv_append(
        pages,
        keys.unsqueeze(2),
        values.unsqueeze(2),
        counts=torch.cat([part.counts for part in parts]).int(),
        positions=positions,
    )
    # Pages were taken for as many tokens in every row.
    pages.trim()
