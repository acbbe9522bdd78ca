"""What a policy keeps of a prompt, and appending it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwork import ops
from openwork.kv_pages import KVPages
from openwork.kvcache.collected import Tokens
from openwork.kvcache.formats import Format
from openwork.kvcache.policy import Kept, LayerPolicy, Prompt


def column_scores(
    q: Tensor, keys: Tensor, values: Tensor, last: int, scale: float | None = None
) -> Tensor:
    """What the last queries, or all with 0, attend to each key with: ``[b, h, n]`` float32.

    Args:
        q: ``[b, t, h, d]``.
        keys: ``[b, n, g, d]``; ``values`` alike.
        last: how many queries.
        scale: of the scores; None: ``1 / sqrt(d)``.
    """
    # The last queries alone are a batch of fewer, bottom-right.
    first = q.shape[1] - last if last else 0
    scores: Tensor = ops.block_attention(q[:, first:], keys, values, scale=scale, scores="all")[-1]
    return scores


def held_scores(q: Tensor, keys: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """What queries, the last tokens held, attend to each key with in sum: ``[b, h, n]`` float32.

    Args:
        q: ``[b, t, h, d]``.
        keys: ``[b, g, n, d]``, rotated.
        lengths: ``[b, g]`` int64, tokens held.
        scale: of the scores.
    """
    b, t, h, d = q.shape
    g, n = keys.shape[1:3]
    grouped = q.view(b, t, g, h // g, d).permute(0, 2, 3, 1, 4)
    scores = (grouped.float() @ keys.float().unsqueeze(2).transpose(-1, -2)) * scale
    last = lengths.view(b, g, 1, 1, 1) - t + torch.arange(t).view(-1, 1)
    scores = scores.masked_fill(torch.arange(n) > last, -torch.inf)
    return scores.softmax(-1).sum(3).flatten(1, 2)


def columns_of(tokens: Tokens, scale: float) -> Callable[[int], Tensor]:
    """:func:`column_scores` of a prompt's last queries."""
    return lambda last: column_scores(tokens.q, tokens.rotated, tokens.values, last, scale)


def check_plain(what: str, format: Format, policy: LayerPolicy) -> None:
    """Refuse what depends on every token's place in the text, or on which tokens were dropped.

    Args:
        what: asks for it.
        format, policy: of a layer.

    Raises:
        ValueError: a format that rotates when reading or keeps first tokens apart, or a stateful
            policy.
    """
    if format.rotate != "stored" or format.exact_first:
        raise ValueError(
            f'{what}: a format with rotate = "stored" and exact_first = 0 expected, got '
            f'"{format.rotate}" and {format.exact_first}'
        )
    if policy.stateful:
        raise ValueError(
            f"{what}: a policy that keeps no account of tokens expected, got "
            f"{type(policy).__name__.strip('_')}"
        )


def compress_padded(
    policy: LayerPolicy, tokens: Tokens, starts: Tensor, scale: float
) -> tuple[Prompt, Kept]:
    """Compress sequences of different lengths, of which the policy sees one at a time.

    Args:
        policy: not stateful.
        tokens: of sequences that are padded on the left.
        starts: ``[b]`` int64: their first tokens.
        scale: of the scores.

    Returns:
        The prompt, and what is kept of it; padding is not.
    """
    whole = prompt_of(tokens, scale)
    mask = torch.zeros(whole.keys.shape[:3], dtype=torch.bool)
    keys, values = whole.keys.clone(), whole.values.clone()
    for s, start in enumerate(starts.tolist()):
        own = prompt_of(Tokens(*(x[s : s + 1, start:] for x in tokens)), scale)
        kept = policy.compress(own)
        mask[s, :, start:] = True if kept is None else kept.mask[0]
        if kept is not None and kept.keys is not None and kept.values is not None:
            keys[s, :, start:], values[s, :, start:] = kept.keys[0], kept.values[0]
    return whole, Kept(mask, keys, values)


def prompt_of(tokens: Tokens, scale: float) -> Prompt:
    """A prompt of rotated keys, as policies see it."""
    keys, values = tokens.rotated.transpose(1, 2), tokens.values.transpose(1, 2)
    return Prompt(keys, values, columns_of(tokens, scale))


def append_kept(pages: KVPages, prompt: Prompt, kept: Kept, first: int) -> None:
    """Append what is kept of a prompt, of each row as many tokens as are.

    Args:
        pages: whose rows are heads of sequences.
        prompt: the prompt, without its first tokens.
        kept: what is kept of it.
        first: how many those are.
    """
    keys = prompt.keys if kept.keys is None else kept.keys
    values = prompt.values if kept.values is None else kept.values
    mask = kept.mask.flatten(0, 1)
    order = kept_tokens(mask)
    # Rows that keep fewer tokens are filled up with any.
    places = order.clamp(max=mask.shape[-1] - 1)
    rows = places.view(*kept.mask.shape[:2], -1, 1)
    has_positions = pages.positions is not None
    ops.kv_append(
        pages,
        *(
            x.gather(2, rows.expand(*rows.shape[:3], x.shape[-1])).flatten(0, 1).unsqueeze(2)
            for x in (keys, values)
        ),
        counts=mask.sum(-1).int(),
        positions=(places + first).int() if has_positions else None,
    )
    # Pages were taken for as many tokens in every row.
    pages.trim()


def kept_tokens(mask: Tensor) -> Tensor:
    """``[rows, n]`` bool to ``[rows, most]``: numbers of the true ones, rising, filled with n."""
    n = mask.shape[-1]
    tokens = torch.arange(n).where(mask, n).sort(-1).values
    return tokens[:, : int(mask.sum(-1).max())]
