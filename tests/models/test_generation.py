"""Sampling: greedy by definition, random by seed, cut by top-k and top-p, and stopping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openwork.models import Llama, generate
from openwork.models.generation import sampling_weights

PROMPT = [5, 17, 200]


def test_greedy_is_argmax_of_the_whole_text(tiny: Llama) -> None:
    text = list(PROMPT)
    for _ in range(10):
        text.append(int(tiny(torch.tensor([text]))[0, -1].argmax()))
    assert list(generate(tiny, PROMPT, 10, stop=())) == text[3:]
    assert list(generate(tiny, torch.tensor(PROMPT), 10, stop=())) == text[3:]


def test_stop_tokens_end_the_text_and_are_not_part_of_it(tiny: Llama) -> None:
    free = list(generate(tiny, PROMPT, 10, stop=()))
    cut = free.index(free[4])
    assert list(generate(tiny, PROMPT, 10, stop=[free[4]])) == free[:cut]


def test_cache_carries_a_text_on(tiny: Llama) -> None:
    whole = list(generate(tiny, PROMPT, 8, stop=()))
    cache = tiny.new_cache(20)
    first = list(generate(tiny, PROMPT, 4, stop=(), cache=cache))
    assert cache.length == 6  # the last token is not in it
    assert first + list(generate(tiny, first[-1:], 4, stop=(), cache=cache)) == whole


def test_seed_decides(tiny: Llama) -> None:
    def sample(seed: int) -> list[int]:
        return list(generate(tiny, PROMPT, 12, temperature=1.5, seed=seed, stop=()))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_1_is_greedy(tiny: Llama) -> None:
    greedy = list(generate(tiny, PROMPT, 10, stop=()))
    assert list(generate(tiny, PROMPT, 10, temperature=3.0, top_k=1, stop=())) == greedy
    assert list(generate(tiny, PROMPT, 10, temperature=1e-30, stop=())) == greedy


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    temperature=st.floats(1e-6, 1e6),
    top_k=st.integers(0, 25),
    top_p=st.floats(1e-6, 1.0),
)
def test_sampling_weights(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    x = torch.tensor(logits)
    weights = sampling_weights(x, temperature=temperature, top_k=top_k, top_p=top_p)
    kept = weights > 0
    assert weights.isfinite().all()
    assert kept[x.argmax()]
    if top_k:
        assert int(kept.sum()) <= top_k
    # Whatever was kept is at least as likely as whatever was not.
    if not kept.all():
        assert x[kept].min() >= x[~kept].max()
    everything = sampling_weights(x, temperature=temperature, top_k=top_k, top_p=1.0)
    # 20 float32 summands of at most 1.
    assert everything[kept].sum() >= top_p - 20 * 6e-8
    assert (weights[kept] == everything[kept]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, "tokens must have at least one token, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, finite, got nan"),
        ({"top_k": -1}, "top_k must be 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"max_new_tokens": 3000}, "context_length = 2048 expected, got 2049"),
    ],
    ids=str,
)
def test_rejects(tiny: Llama, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": PROMPT, "max_new_tokens": 4, "stop": ()} | options
    with pytest.raises(ValueError, match=message):
        list(generate(tiny, **arguments))
