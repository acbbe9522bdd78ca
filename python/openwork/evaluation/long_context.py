"""What sparse attention and compressed caches cost on long prompts.

A sample is a prompt and what follows it. The dense model and every way to attend to less say how
likely each following token is; with ``q`` the dense model's distribution and ``p`` the other's::

    nll       = mean -log p(token)              kl = mean sum_v q(v) log(q(v) / p(v))     nats
    agreement = mean [argmax p = argmax q]      found = every token is the likeliest

A passkey is a sample whose following tokens are the number (:mod:`openwork.evaluation.passkey`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from openwork import attention, ops
from openwork.attention import Policy
from openwork.evaluation.passkey import Passkey
from openwork.kvcache import Cache, column_scores
from openwork.models import Llama
from openwork.models.kv_cache import Attend
from openwork.models.llama import Layer
from openwork.ops.paged_attention import MAX_QUERIES


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows.

    Attributes:
        tokens: ``[n + m]`` int64.
        prompt: ``n``, tokens of the prompt.
    """

    tokens: Tensor
    prompt: int

    @classmethod
    def of(cls, passkey: Passkey) -> Sample:
        return cls(torch.cat((passkey.prompt, passkey.answer)), len(passkey.prompt))

    @property
    def targets(self) -> Tensor:
        """``[m]``: what follows."""
        return self.tokens[self.prompt :]


class Score(NamedTuple):
    """How well what follows was predicted; see the module."""

    nll: float
    kl: float
    agreement: float
    found: bool


class Outcome(NamedTuple):
    """One way to attend, on one sample.

    Attributes:
        score: against the dense model.
        cost: density of the attention, or bytes of the cache after the prompt.
        seconds: of the prompt and what follows, or of a step of up to 8 tokens with the cache.
    """

    score: Score
    cost: float
    seconds: float


def samples(tokens: Tensor, count: int, prompt: int, following: int) -> list[Sample]:
    """Pieces of a text at equal distances from each other.

    Raises:
        ValueError: the text is shorter than the pieces together.
    """
    length = prompt + following
    if len(tokens) < count * length or count < 1:
        raise ValueError(
            f"samples: at least one piece of {length} tokens, {count} in all, expected, got a text "
            f"of {len(tokens)} tokens"
        )
    step = len(tokens) // count
    return [Sample(tokens[i * step : i * step + length], prompt) for i in range(count)]


@torch.inference_mode()
def with_policies(
    model: Llama, sample: Sample, policies: Mapping[str, Policy]
) -> Iterator[tuple[str, Outcome]]:
    """Read a sample with each policy for attention, and densely to compare with.

    Args:
        model: attends densely afterwards.
        sample: read as one prompt, what follows included.
        policies: by name.

    Yields:
        Name and outcome, as soon as it is there; "dense" is the first.
    """
    dense = None
    for name, policy in {"dense": attention.Dense(), **policies}.items():
        report = attention.enable(model, policy, crossover=0)
        begin = time.perf_counter()
        try:
            logp = _log_probabilities(model, sample)
        finally:
            attention.disable(model)
        seconds = time.perf_counter() - begin
        dense = logp if dense is None else dense
        yield name, Outcome(score(logp, dense, sample.targets), report.density, seconds)


def _log_probabilities(model: Llama, sample: Sample) -> Tensor:
    hidden = model.hidden(sample.tokens[None, :-1])[0, sample.prompt - 1 :]
    return torch.log_softmax(model.head(hidden).float(), dim=-1)


@torch.inference_mode()
def with_caches(
    model: Llama, sample: Sample, caches: Mapping[str, Callable[[], Cache]]
) -> Iterator[tuple[str, Outcome]]:
    """Read a sample's prompt once, densely, and what follows with each cache.

    Args:
        model: attends densely afterwards.
        sample: its prompt fills all caches; what follows is read in steps of 8 tokens.
        caches: by name, made empty; a cache that keeps everything is compared with.

    Yields:
        Name and outcome; "dense" is the first.
    """
    filled = {"dense": Cache(model, len(sample.tokens))}
    filled |= {name: make() for name, make in caches.items()}
    shared = SharedPrompt(model, list(filled.values()))
    # The last token of the prompt is the first that asks what the caches hold.
    last = sample.prompt - 1
    attention.enable(model, attention.Dense(), crossover=0)
    try:
        model.hidden(sample.tokens[None, :last], shared)
    finally:
        attention.disable(model)
    dense = None
    for name, cache in filled.items():
        nbytes = cache.nbytes
        parts = sample.tokens[None, last:-1].split(MAX_QUERIES, dim=1)
        begin = time.perf_counter()
        logits = torch.cat([model(part, cache)[0] for part in parts])
        seconds = (time.perf_counter() - begin) / len(parts)
        logp = torch.log_softmax(logits.float(), dim=-1)
        dense = logp if dense is None else dense
        yield name, Outcome(score(logp, dense, sample.targets), nbytes, seconds)


class SharedPrompt:
    """Fills several caches with one prompt, whose attention is computed once.

    Args:
        model: attends to the prompt as it does without a cache.
        caches: empty ones of the model.
    """

    def __init__(self, model: Llama, caches: Sequence[Cache]) -> None:
        self._caches = caches
        self.attend: Sequence[Attend] = [
            self._layer(index, layer)
            for index, layer in enumerate(cast(Iterable[Layer], model.layers))
        ]

    @property
    def length(self) -> int:
        return self._caches[0].length

    @length.setter
    def length(self, length: int) -> None:
        for cache in self._caches:
            cache.length = length

    @property
    def position(self) -> int:
        return self.length

    def reserve(self, batch: int, t: int) -> None:
        for cache in self._caches:
            if cache.length:
                raise ValueError(f"SharedPrompt: empty caches expected, got {cache.length} tokens")
            cache.reserve(batch, t)

    def _layer(self, index: int, layer: Layer) -> Attend:
        h, g = layer.heads, layer.kv_heads

        def attend(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            qk = ops.rope(qkv[:, :, : h + g], cos, sin)
            q, rotated, values = qk[:, :, :h], qk[:, :, h:], qkv[:, :, h + g :]
            known: dict[int, Tensor] = {}

            def columns(last: int) -> Tensor:
                if last not in known:
                    known[last] = column_scores(q, rotated, values, last)
                return known[last]

            for cache in self._caches:
                cache.layers[index].take(qkv[:, :, h : h + g], rotated, values, columns)
            return layer.prefill(q, rotated.transpose(1, 2), values.transpose(1, 2))

        return attend


def score(logp: Tensor, dense: Tensor, targets: Tensor) -> Score:
    """Compare log-probabilities with the dense model's.

    Args:
        logp: ``[m, vocab]`` float32.
        dense: alike.
        targets: ``[m]`` int64, what follows.
    """
    kl = F.kl_div(logp, dense, reduction="none", log_target=True).sum(-1).double().mean()
    likeliest = logp.argmax(-1)
    return Score(
        nll=F.nll_loss(logp, targets).item(),
        kl=kl.item(),
        agreement=(likeliest == dense.argmax(-1)).double().mean().item(),
        found=torch.equal(likeliest, targets),
    )
