"""Turning a policy on for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from openwork.attention.policy import Dense, Policy, check_policy
from openwork.attention.probe import each_layer
from openwork.models import Llama
from openwork.models.llama import Layer, dense_attention
from openwork.timing import Contender, interleave

# Lengths at which dense and sparse attention are compared.
_LENGTHS = (512, 1024, 2048, 4096, 8192)
_ROUNDS, _SECONDS = 5, 0.02

_DENSE = Dense()


@dataclass
class Report:
    """What a policy did since :func:`enable`.

    Attributes:
        crossover: prompts of fewer keys are attended to densely.
        dense_calls: attentions of a layer that were dense for that reason, or because a gradient
            was needed.
        densities: of each layer, those of the others in order: visited pairs of query and key over
            those of dense causal attention.
    """

    crossover: int
    layers: int
    dense_calls: int = 0
    densities: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.dense_calls = 0
        self.densities = [[] for _ in range(self.layers)]

    @property
    def density(self) -> float:
        """Mean of all densities; 1 if there are none."""
        every = [density for layer in self.densities for density in layer]
        return sum(every) / len(every) if every else 1.0


def enable(model: Llama, policy: Policy, *, crossover: int = 2048) -> Report:
    """Attend by ``policy`` in the prompts of a model.

    It serves attention of more than 8 queries at a time, and replaces a policy enabled before.
    Decoding is not touched: what is read there is up to the cache
    (:class:`openwork.kvcache.Cache`).

    Args:
        model: changed in place; :func:`disable` undoes it.
        policy: for every layer.
        crossover: keys below which dense attention is used; :func:`measure_crossover` finds from
            where on a policy is faster on a machine. 0: always sparse.

    Returns:
        The report, which later calls of the model add to.

    Raises:
        ValueError: a negative crossover, or something else than a policy for attention.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> policy = openwork.attention.AShape(sinks=4, window=16)
        >>> report = openwork.attention.enable(model, policy, crossover=0)
        >>> with torch.inference_mode():
        ...     logits = model(torch.arange(64)[None])
        >>> round(report.density, 3)
        0.524
    """
    check_policy("enable", policy)
    if crossover < 0:
        raise ValueError(f"enable: crossover must be at least 0, got {crossover}")
    report = Report(crossover, len(model.layers))
    for index, layer in enumerate(model.layers):
        cast(Layer, layer).prefill = Prefill(policy, index, report)
    return report


def disable(model: Llama) -> None:
    """Attend densely again."""
    for layer in model.layers:
        cast(Layer, layer).prefill = dense_attention


class Prefill:
    """A layer's attention by a policy, dense below the crossover.

    Args:
        policy: the policy.
        index: of the layer.
        report: counts what is done.
    """

    def __init__(self, policy: Policy, index: int, report: Report) -> None:
        self._policy, self._index, self._report = policy, index, report

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attend(q, keys, values).flatten(2)

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, *, scale: float | None = None
    ) -> Tensor:
        """``q [b, t, h, d]``, ``keys [b, g, n, d]`` to ``[b, t, h, d]``."""
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
        if gradient or keys.shape[2] < self._report.crossover:
            self._report.dense_calls += 1
            return dense_attention(q, keys, values, scale=scale).view(*q.shape[:3], -1)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        o, density = self._policy(self._index, q, k, v, scale=scale)
        self._report.densities[self._index].append(density)
        return o


@torch.inference_mode()
def measure_crossover(
    model: Llama,
    policy: Policy,
    tokens: Tensor,
    *,
    lengths: Sequence[int] = _LENGTHS,
    layers: Sequence[int] | None = None,
) -> int | None:
    """The length from which on a policy is faster than dense attention, by measuring both.

    Both run on queries, keys and values that the model makes of a text; nothing else should use
    the processor meanwhile.

    Args:
        model: the model.
        policy: what to time, the choice of what to visit included.
        tokens: ``[n]`` int64, a text of the longest length, or less if that is the context.
        lengths: to try, rising.
        layers: to time; None for the first, the middle and the last.

    Returns:
        The first length from which on the policy is faster at every longer one; None if it is not
        at the longest.

    Raises:
        ValueError: a text shorter than the first length.
    """
    lengths = [length for length in lengths if length <= len(tokens)]
    if not lengths:
        raise ValueError(f"measure_crossover: a longer text expected, got {len(tokens)} tokens")
    last = len(model.layers) - 1
    wanted = {0, last // 2, last} if layers is None else set(layers)
    faster = dict.fromkeys(lengths, 0.0)

    def time(index: int, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if index not in wanted:
            return
        for length in lengths:
            part = q[:, :length], keys[:, :length], values[:, :length]
            times = interleave(
                {
                    "dense": Contender(lambda _: _DENSE(index, *part), 1, 1),  # noqa: B023
                    "sparse": Contender(lambda _: policy(index, *part), 1, 1),  # noqa: B023
                },
                rounds=_ROUNDS,
                seconds=_SECONDS,
            )
            faster[length] += times["dense"].median - times["sparse"].median

    each_layer(model, tokens[None, : lengths[-1]], time)
    crossover = None
    for length in reversed(lengths):
        if faster[length] <= 0:
            break
        crossover = length
    return crossover
