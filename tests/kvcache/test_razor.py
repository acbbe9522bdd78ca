"""The compensation token, and heads that look tokens up."""

from __future__ import annotations

import math

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork import ops
from openwork.attention import each_layer
from openwork.kvcache import Compensation, Razor, retrieval_heads

from .prompts import probabilities, random_prompt


def test_exact_for_identical_tokens() -> None:
    """16 equal tokens dropped: attention to the rest and to the mean is attention to all."""
    b, g, group, d, n = 2, 2, 3, 8, 24
    q = torch.randn(b, 1, g * group, d)
    keys, values = torch.randn(2, b, g, n, d).unbind()
    keys[:, :, 8:], values[:, :, 8:] = keys[:, :, 8:9], values[:, :, 8:9]
    gone = Compensation()
    dropped = (torch.arange(n) >= 8).expand(b, g, n)
    gone.add(keys, values, dropped)
    state = gone.state(q, 1 / math.sqrt(d))
    assert state is not None
    kept = ops.block_attention(
        q, keys[:, :, :8].transpose(1, 2), values[:, :, :8].transpose(1, 2), return_lse=True
    )
    o, _ = ops.merge_states(*kept, *state)
    p = probabilities(q, keys)
    expected = (p @ values.double().repeat_interleave(group, 1)).transpose(1, 2)
    assert torch.allclose(o.double(), expected, atol=1e-6)


def test_nothing_dropped_is_a_no_op() -> None:
    keys, values = torch.randn(2, 1, 2, 5, 8).unbind()
    gone = Compensation()
    assert gone.state(torch.randn(1, 1, 2, 8), 1.0) is None
    dropped = torch.zeros(1, 2, 5, dtype=torch.bool)
    dropped[:, 1] = True
    gone.add(keys, values, dropped)
    state = gone.state(torch.randn(1, 1, 2, 8), 1.0)
    assert state is not None
    assert state.lse[0, 0, 0] == -math.inf and (state.o[0, 0, 0] == 0).all()
    assert state.lse[0, 0, 1].isfinite()


def test_incremental_mean_equals_that_of_the_batch() -> None:
    keys, values = torch.randn(2, 1, 2, 9, 8).unbind()
    q, dropped = torch.randn(1, 2, 4, 8), torch.rand(1, 2, 9) < 0.6
    whole, parts = Compensation(), Compensation()
    whole.add(keys, values, dropped)
    for part in (slice(0, 2), slice(2, 7), slice(7, 9)):
        parts.add(keys[:, :, part], values[:, :, part], dropped[:, :, part])
    a, b = whole.state(q, 0.5), parts.state(q, 0.5)
    assert a is not None and b is not None
    assert torch.allclose(a.o, b.o, atol=1e-6) and torch.allclose(a.lse, b.lse, atol=1e-6)


def test_sequences_may_come_one_after_another() -> None:
    keys, values = torch.randn(2, 3, 2, 9, 8).unbind()
    q, dropped = torch.randn(3, 2, 4, 8), torch.rand(3, 2, 9) < 0.6
    whole, parts = Compensation(), Compensation()
    whole.add(keys, values, dropped)
    for s in range(3):
        one = slice(s, s + 1)
        parts.extend(keys[one], values[one], dropped[one])
    assert parts.nbytes == whole.nbytes == 8 * 3 * 2 * (8 + 8 + 1)
    a, b = whole.state(q, 0.5), parts.state(q, 0.5)
    assert a is not None and b is not None
    assert torch.equal(a.o, b.o) and torch.equal(a.lse, b.lse)


def test_retrieval_heads_keep_everything() -> None:
    retrieval = torch.tensor([[True, False]])
    prompt = random_prompt(20, b=1)
    kept = Razor(retrieval, sinks=2, recent=5).layer(0).compress(prompt)
    assert kept is not None and kept.mask.sum(-1).tolist() == [[20, 7]]
    assert Razor(retrieval, sinks=2, recent=18).layer(0).compress(prompt) is None


def test_heads_are_chosen_by_what_they_attend_to() -> None:
    """Scores written out from the probabilities of each head, on the same repeated tokens."""
    model, p, repeats = random_model(layers=2, context_length=512), 12, 4
    tokens = torch.randint(320, (1, p), generator=torch.Generator().manual_seed(5))
    n = p * repeats
    scores: dict[str, list[list[float]]] = {"induction": [], "echo": []}

    def observe(layer: int, q: Tensor, keys: Tensor, values: Tensor) -> None:
        a = probabilities(q, keys.transpose(1, 2))[0]
        echo = [a[:, i, i - p] for i in range(p, n)]
        induction = [a[:, i, i - p + 1] for i in range(p - 1, n)]
        for name, found in (("echo", echo), ("induction", induction)):
            scores[name].append(torch.stack(found).mean(0).tolist())

    with torch.inference_mode():
        each_layer(model, tokens.repeat(1, repeats), observe)
    for name, other in (("echo", "induction"), ("induction", "echo")):
        # Three of all query heads, which belong to key heads of 3 each.
        flat = [(x, layer, head // 3) for layer, heads in enumerate(scores[name])
                for head, x in enumerate(heads)]  # fmt: skip
        expected = torch.zeros(2, 2, dtype=torch.bool)
        for _, layer, group in sorted(flat, reverse=True)[:3]:
            expected[layer, group] = True
        share = {name: 3 / len(flat) - 1e-9, other: 0.0}
        got = retrieval_heads(model, length=p, repeats=repeats, seed=5, **share)
        assert torch.equal(got, expected)


def test_takes_the_asked_share_of_heads() -> None:
    model = random_model(layers=2, context_length=512)
    one = retrieval_heads(model, induction=0.01, echo=0.0, length=16, repeats=3)
    assert one.shape == (2, 2) and one.sum() == 1
    assert retrieval_heads(model, induction=1.0, echo=0.0, length=16, repeats=3).all()
    assert not retrieval_heads(model, induction=0.0, echo=0.0, length=16, repeats=3).any()
    with pytest.raises(ValueError, match="expected, got 2, 0.01, 512 and 4"):
        retrieval_heads(model, induction=2)
