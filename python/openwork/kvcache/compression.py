"""What policies are shown of a prompt and of a step: scores of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openwork import ops
from openwork.kvcache.collected import Tokens
from openwork.kvcache.formats import Format
from openwork.kvcache.policy import LayerPolicy, Prompt


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


def held_scores(q: Tensor, lse: Tensor, keys: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """What queries, the last tokens held, attended to each key with in sum: ``[b, h, n]`` float32.

    Args:
        q: ``[b, t, h, d]``.
        lse: ``[b, t, h]``: of all that each query attended to.
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
    lse = lse.view(b, t, g, h // g, 1).permute(0, 2, 3, 1, 4)
    return (scores - lse).exp().sum(3).flatten(1, 2)


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


def prompt_of(tokens: Tokens, scale: float) -> Prompt:
    """A prompt of rotated keys, as policies see it."""
    keys, values = tokens.rotated.transpose(1, 2), tokens.values.transpose(1, 2)
    return Prompt(keys, keys, values, columns_of(tokens, scale))
