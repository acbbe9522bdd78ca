"""The ways to attend to less that ``openwork eval-context`` compares, at several budgets each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from openwork import attention as prefill
from openwork import kvcache
from openwork.kv_format import KVFormat
from openwork.kvcache import Cache, Format
from openwork.models import Llama


class Family(str, Enum):
    """What is compared: sparse prefill, which tokens a cache keeps or reads, how it stores them."""

    attention = "attention"
    tokens = "tokens"
    formats = "formats"


class Contender(NamedTuple):
    """A method at one setting.

    Attributes:
        method: its name in the plot.
        setting: of the budget.
        make: a policy for attention, or an empty cache of so many tokens.
    """

    method: str
    setting: str
    make: Callable[[], object]


@dataclass(frozen=True)
class Profile:
    """What methods need to know of a model.

    Attributes:
        model: the model.
        retrieval: ``[layers, g]`` bool, heads that look tokens up.
        patterns: of MInference.
        formats: of KVQuant, by bits.
    """

    model: Llama
    retrieval: Tensor
    patterns: prefill.MInference | None
    formats: dict[int, list[Format]]


def profile(model: Llama, family: Family, calibration: Tensor, length: int) -> Profile:
    """Look at a model and a text, as far as the family's methods need.

    Args:
        model: dense.
        family: which methods.
        calibration: ``[n]`` int64, a text of ``length`` tokens or more, not the one scored on.
        length: of the prompts to come.
    """
    context = model.config.context_length
    period = min(512, context // 4)
    retrieval = torch.empty(0)
    if family is not Family.formats:
        retrieval = kvcache.retrieval_heads(model, length=period)
    patterns = None
    if family is Family.attention:
        patterns = prefill.search_patterns(model, calibration[: min(length, 4096)])
    formats: dict[int, list[Format]] = {}
    if family is Family.formats:
        samples = calibration[: 4 * min(512, length)].view(4, -1)
        formats = kvcache.kvquant_each(model, samples, (4, 3, 2), progress=False)
    return Profile(model, retrieval, patterns, formats)


def contenders(family: Family, known: Profile, length: int) -> Iterator[Contender]:
    """The methods of a family for prompts of ``length`` tokens."""
    if family is Family.attention:
        yield from _prefill(known, length)
    elif family is Family.tokens:
        yield from _tokens(known, length)
    else:
        yield from _formats(known, length)


def _prefill(known: Profile, length: int) -> Iterator[Contender]:
    for part in (16, 8, 4):
        window = length // part
        for method, policy in (
            ("window alone", prefill.AShape(0, window)),
            ("A-shape", prefill.AShape(64, window)),
            ("block top-k", prefill.BlockTopK(max(2, window // 64))),
            ("HiP", prefill.HiP(max(2, window // 128), window=window // 2)),
            ("vertical-slash", prefill.VerticalSlash(window // 2, window // 4)),
        ):
            yield Contender(method, f"1/{part}", _always(policy))
    for gamma in (0.7, 0.9):
        flex = prefill.FlexPrefill(gamma, min_budget=min(512, length // 8))
        yield Contender("FlexPrefill", f"gamma {gamma}", _always(flex))
    lserve = prefill.LServe(known.retrieval, 64, length // 8)
    yield Contender("LServe", "1/8", _always(lserve))
    if known.patterns is not None:
        yield Contender("MInference", "searched", _always(known.patterns))


def _tokens(known: Profile, length: int) -> Iterator[Contender]:
    every = known.retrieval
    for budget in (length // 32, length // 8, length // 4):
        setting = f"{budget} tokens"
        window = min(32, budget // 2)
        snap = kvcache.SnapKV(budget, window=window)
        for method, policy in (
            ("recent alone", kvcache.Recency(0, budget)),
            ("sinks and recent", kvcache.Recency(4, budget - 4)),
            ("H2O", kvcache.H2O(budget - budget // 2, budget // 2)),
            ("TOVA", kvcache.TOVA(budget)),
            ("SnapKV", snap),
            ("AdaKV", kvcache.AdaKV(snap)),
            ("EMS", kvcache.EMS(budget, window=window)),
            ("RazorAttention", kvcache.Razor(every, 4, budget)),
            ("Razor without mean", kvcache.Razor(every, 4, budget, compensation=False)),
            ("Quest", kvcache.Quest(budget)),
            ("LServe", kvcache.LServe(every, budget, 4, budget)),
        ):
            options = {"policy": policy, "page_size": 32}
            yield Contender(method, setting, _cache(known.model, length, **options))


def _formats(known: Profile, length: int) -> Iterator[Contender]:
    model = known.model
    for bits in (8, 4, 3, 2):
        for method, format in {
            "KIVI": kvcache.kivi(bits),
            "KIVI before rotation": kvcache.kivi(bits, rotate="read"),
            "keys per token": Format(
                KVFormat(bits, "token", 32, window=128), KVFormat(bits, "token", 32, window=128)
            ),
        }.items():
            yield Contender(method, f"{bits} bit", _cache(model, length, format=format))
    zipped = kvcache.MixedPrecision(kvcache.Saliency(round(0.6 * length)))
    options = {"format": kvcache.kivi(4), "policy": zipped}
    yield Contender("ZipCache", "4 and 2 bit", _cache(model, length, **options))
    for bits, formats in known.formats.items():
        yield Contender("KVQuant", f"{bits} bit", _cache(model, length, format=formats))


def _always(policy: prefill.Policy) -> Callable[[], prefill.Policy]:
    return lambda: policy


def _cache(model: Llama, length: int, **options: object) -> Callable[[], Cache]:
    return lambda: Cache(model, length, **options)  # type: ignore[arg-type]
