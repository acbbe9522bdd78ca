"""Tokens per second of whole models, in two phases from an empty cache:

    prefill    PREFILL tokens in one call
    decode     DECODE tokens, one call each

Without sampling: the tokens are given, so every engine does the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.models import KVCache, Llama
from openwork.timing import Contender, Times, interleave

PREFILL, DECODE = 512, 64


@dataclass(frozen=True)
class Engine:
    """A loaded model: ``prefill`` and ``decode`` run it over tokens ``[length]``."""

    prefill: Callable[[Tensor], object]
    decode: Callable[[Tensor], object]


@dataclass(frozen=True)
class Speed:
    """Tokens per second, of the median times."""

    prefill: float
    decode: float


def engine(model: Llama) -> Engine:
    """A model of this package, with a cache for either phase."""
    cache = model.new_cache(max(PREFILL, DECODE))
    return Engine(
        prefill=lambda tokens: prefill(model, tokens, cache),
        decode=lambda tokens: decode(model, tokens, cache),
    )


@torch.inference_mode()
def prefill(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Forget what the cache holds and run ``tokens [t]`` in one call.

    Returns:
        ``[vocab]``, the logits after the last token.
    """
    cache.length = 0
    logits: Tensor = model(tokens[None], cache, last_only=True)
    return logits[0, -1]


@torch.inference_mode()
def decode(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor:
    """Forget what the cache holds and run ``tokens [t]`` one by one, ``t`` at least 1.

    Returns:
        ``[vocab]``, the logits after the last token.
    """
    cache.length = 0
    logits: Tensor
    for step in tokens[:, None, None]:
        logits = model(step, cache, last_only=True)
    return logits[0, -1]


def speeds(
    engines: Mapping[str, Engine], tokens: Tensor, *, rounds: int, progress: bool = True
) -> dict[str, Speed]:
    """Time all engines in turns, see :mod:`openwork.timing`.

    Args:
        engines: by name.
        tokens: ``[PREFILL]`` int64 or more, of ordinary text.
        rounds: turns of each engine in each phase, at least 2.
        progress: show a progress bar.
    """
    prefills = {name: one.prefill for name, one in engines.items()}
    decodes = {name: one.decode for name, one in engines.items()}
    first = _time(prefills, tokens[:PREFILL], rounds, "timing prefill" if progress else None)
    second = _time(decodes, tokens[:DECODE], rounds, "timing decode" if progress else None)
    return {name: Speed(1 / first[name].median, 1 / second[name].median) for name in engines}


def _time(
    runs: Mapping[str, Callable[[Tensor], object]], tokens: Tensor, rounds: int, bar: str | None
) -> dict[str, Times]:
    """Seconds per token."""

    def contender(run: Callable[[Tensor], object]) -> Contender:
        return Contender(lambda _: run(tokens), groups=1, calls=len(tokens))

    contenders = {name: contender(run) for name, run in runs.items()}
    return interleave(contenders, rounds=rounds, seconds=0.0, progress=bar)
