"""Random prompts, and attention written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openwork.kvcache import Held, Prompt


def probabilities(q: Tensor, keys: Tensor, scale: float | None = None) -> Tensor:
    """Causal, bottom-right: ``q [b, t, h, d]``, ``keys [b, g, n, d]`` to ``[b, h, t, n]``."""
    t, n = q.shape[1], keys.shape[2]
    keys = keys.repeat_interleave(q.shape[2] // keys.shape[1], dim=1).double()
    scores = q.transpose(1, 2).double() @ keys.transpose(-1, -2)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    visible = torch.ones(t, n, dtype=torch.bool).tril(n - t)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def random_prompt(n: int, *, b: int = 2, g: int = 2, group: int = 3, d: int = 8) -> Prompt:
    q = 2 * torch.randn(b, n, g * group, d)
    keys, values = torch.randn(2, b, g, n, d).unbind()
    p = probabilities(q, keys).float()

    def columns(last: int) -> Tensor:
        return p[:, :, n - last if last else 0 :].sum(2)

    return Prompt(keys, keys, values, columns)


def held(lengths: Tensor, columns: Tensor, new: int = 1) -> Held:
    """Tokens without keys and values."""
    return Held(lengths, new, lambda: columns, lambda: (torch.empty(0), torch.empty(0)))
