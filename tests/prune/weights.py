"""Weights and inputs that pruning tests share."""

from __future__ import annotations

from typing import Any

import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork.models import Llama

SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 72, "head_dim": 12, "layers": 3}


def model(**changes: Any) -> Llama:
    """A tiny model whose rows of 72 and 96 are no multiple of 128, nor 72 of 16."""
    return random_model(**SHAPE | changes)


def tokens(samples: int = 6, length: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (samples, length), generator=generator)


def rounding(dense: Llama) -> float:
    """Of logits, relative to the largest: n eps for the terms of all sums that a token takes."""
    return 2.0**-24 * sum(dense.get_submodule(name).in_features for name, _, _ in dense.linears())


def close_logits(got: Tensor, want: Tensor, dense: Llama) -> None:
    atol = rounding(dense) * float(want.abs().max())
    torch.testing.assert_close(got, want, rtol=0.0, atol=atol)


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(k: int, count: int = 512, seed: int = 1) -> Tensor:
    """``[count, k]``: mixtures of half as many sources, of very different sizes, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k // 2 + 1, k, generator=generator)
    mixing *= torch.rand(k, generator=generator) * 3
    x = torch.randn(count, k // 2 + 1, generator=generator) @ mixing
    return x + 0.1 * torch.randn(count, k, generator=generator)


def moment(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)
