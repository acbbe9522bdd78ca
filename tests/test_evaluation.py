"""Perplexity, KL divergence and agreement against a token-by-token reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openwork.evaluation import Reference, evaluate, predictions, windows
from openwork.models import Llama, LlamaConfig

TOKENS = torch.randint(0, 90, (70,), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"window": 24, "stride": 16, "progress": False}


def random_model(seed: int, vocab_size: int = 90) -> Llama:
    torch.manual_seed(seed)
    config = LlamaConfig("llama", vocab_size, 24, 32, 1, 2, 1, 12, context_length=64)
    model = Llama(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(1)


@pytest.fixture(scope="module")
def dense() -> Llama:
    return random_model(2)


def one_by_one(model: Llama, tokens: Tensor, window: int, stride: int) -> Tensor:
    """Float64 log-probabilities ``[len - 1, vocab]``, each from a forward pass of its own."""
    rows = []
    for target in range(1, len(tokens)):
        # The first window that holds the target.
        begin = max(0, math.ceil((target - window + 1) / stride)) * stride
        logits = model(tokens[None, begin:target], last_only=True)[0, 0]
        rows.append(logits.double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [2, 10, 24, 25, 40, 41, 70])
def test_matches_one_by_one(model: Llama, dense: Llama, length: int) -> None:
    tokens = TOKENS[:length]
    p, q = (one_by_one(m, tokens, 24, 16) for m in (model, dense))
    result = evaluate(model, tokens, reference=dense, **SIZES)
    assert result.tokens == length - 1
    nll = -p[torch.arange(length - 1), tokens[1:]].mean()
    assert result.ppl == pytest.approx(nll.exp().item(), rel=1e-5)
    assert result.kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-5)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.agreement == pytest.approx(agreed)


def test_chunks_of_positions_change_nothing(
    model: Llama, dense: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, TOKENS, reference=dense, **SIZES)
    monkeypatch.setattr("openwork.evaluation.perplexity._CHUNK", 5)
    parts = evaluate(model, TOKENS, reference=dense, **SIZES)
    assert (parts.tokens, parts.agreement) == (whole.tokens, whole.agreement)
    assert parts.ppl == pytest.approx(whole.ppl, rel=1e-6)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)


def test_kept_predictions_equal_the_model_itself(model: Llama, dense: Llama) -> None:
    kept = predictions(dense, TOKENS, **SIZES)
    assert kept.hidden.shape == (69, 24)
    assert evaluate(model, TOKENS, reference=kept, **SIZES) == evaluate(
        model, TOKENS, reference=dense, **SIZES
    )


def test_a_model_agrees_with_itself(model: Llama) -> None:
    result = evaluate(model, TOKENS, reference=model, **SIZES)
    assert (result.kl, result.agreement) == (0.0, 1.0)


def test_without_a_reference(model: Llama, dense: Llama) -> None:
    result = evaluate(model, TOKENS, **SIZES)
    assert (result.kl, result.agreement) == (None, None)
    assert result.ppl == evaluate(model, TOKENS, reference=dense, **SIZES).ppl


def test_uniform_predictions_have_the_vocabulary_as_perplexity(model: Llama) -> None:
    flat = random_model(1)
    flat.head.weight.zero_()
    assert evaluate(flat, TOKENS, **SIZES).ppl == pytest.approx(90)


def test_hopeless_models_have_infinite_perplexity(model: Llama) -> None:
    hopeless = random_model(1)
    hopeless.head.weight.mul_(1e6)
    assert evaluate(hopeless, TOKENS, **SIZES).ppl == math.inf


@given(length=st.integers(2, 200), window=st.integers(2, 60), data=st.data())
def test_every_token_is_scored_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window - 1))
    spans = list(windows(length, window=window, stride=stride))
    scored = [i for span in spans for i in range(span.first, span.end)]
    assert scored == list(range(1, length))
    for span in spans:
        assert 0 <= span.begin < span.first < span.end <= span.begin + window
        assert span.begin == 0 or span.first - span.begin >= window - stride


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS[None], {}, r"tokens must be \[length\] int64, got \[1, 70\]"),
        (TOKENS.float(), {}, "int64, got .* torch.float32"),
        (TOKENS[:1], {}, "a text of 2 tokens or more.*, got 1, 24 and 16"),
        (TOKENS, {"stride": 24}, "got 70, 24 and 24"),
        (TOKENS, {"stride": 0}, "got 70, 24 and 0"),
        (TOKENS, {"window": 66}, "context_length = 64 expected"),
    ],
    ids=["rank", "dtype", "short", "stride", "no stride", "context"],
)
def test_rejects(model: Llama, tokens: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokens, **SIZES | options)


def test_rejects_a_reference_of_something_else(model: Llama, dense: Llama) -> None:
    kept: Reference = predictions(dense, TOKENS, **SIZES)
    with pytest.raises(ValueError, match="window 24 and stride 8, got 24 and 16"):
        evaluate(model, TOKENS, reference=kept, **SIZES | {"stride": 8})
    with pytest.raises(ValueError, match="of the same tokens, got others"):
        evaluate(model, TOKENS.flip(0), reference=kept, **SIZES)
    with pytest.raises(ValueError, match="vocabulary of the model, 90, got 95"):
        evaluate(model, TOKENS, reference=random_model(3, vocab_size=95), **SIZES)
