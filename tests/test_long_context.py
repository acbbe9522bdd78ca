"""Samples and scores of long prompts, on a tiny model."""

from __future__ import annotations

import pytest
import torch
from models.checkpoints import random_model

from openwork import attention
from openwork.attention import AShape
from openwork.evaluation.long_context import Sample, samples, score, with_caches, with_policies
from openwork.kvcache import Cache, Recency, SnapKV

TOKENS = torch.randint(0, 320, (300,), generator=torch.Generator().manual_seed(3))


def test_samples_are_spread_over_the_text() -> None:
    found = samples(TOKENS, 3, 40, 10)
    assert [len(s.tokens) for s in found] == [50] * 3
    assert torch.equal(found[1].tokens, TOKENS[100:150])
    assert torch.equal(found[1].targets, TOKENS[140:150])
    with pytest.raises(ValueError, match="one piece of 200 tokens, 2 in all, expected, got a text"):
        samples(TOKENS, 2, 150, 50)


def test_scores() -> None:
    logp = torch.log_softmax(torch.randn(4, 9), -1)
    targets = logp.argmax(-1)
    same = score(logp, logp, targets)
    assert same.kl == pytest.approx(0, abs=1e-7) and same.agreement == 1 and same.found
    other = torch.log_softmax(torch.randn(4, 9), -1)
    result = score(other, logp, targets)
    assert result.kl == pytest.approx((logp.exp() * (logp - other)).sum(-1).mean().item(), rel=1e-5)
    assert result.nll == pytest.approx(-other[range(4), targets].mean().item(), rel=1e-5)
    assert not result.found


def test_policies_against_dense() -> None:
    model, sample = random_model(), Sample(TOKENS[:120], 100)
    found = dict(with_policies(model, sample, {"all": AShape(4, 120), "few": AShape(1, 8)}))
    assert list(found) == ["dense", "all", "few"]
    assert found["all"].score.kl < 1e-6 and found["all"].cost == 1
    assert found["few"].score.kl > 1e-4 and found["few"].cost < 0.2
    assert model.layers[0].prefill is random_model().layers[0].prefill
    attention.disable(model)


def test_caches_share_a_prompt() -> None:
    """As if each had read the prompt itself."""
    model, sample = random_model(), Sample(TOKENS[:120], 100)
    policies = {"all": Recency(4, 120), "snap": SnapKV(40), "few": Recency(1, 8)}
    makers = {
        name: lambda policy=policy: Cache(model, 120, policy=policy)
        for name, policy in policies.items()
    }
    found = dict(with_caches(model, sample, makers))
    assert found["all"].score.kl < 1e-6 and found["all"].cost == found["dense"].cost
    assert found["few"].cost == found["snap"].cost < found["dense"].cost  # a page each
    alone = makers["snap"]()
    with torch.inference_mode():
        model(sample.tokens[None, :99], alone)
        parts = sample.tokens[None, 99:-1].split(8, dim=1)
        logp = torch.cat([model(part, alone)[0] for part in parts]).log_softmax(-1)
    assert found["snap"].score.nll == pytest.approx(
        torch.nn.functional.nll_loss(logp, sample.targets).item(), rel=1e-5
    )
    filled = makers["all"]()
    filled.length = 3
    with pytest.raises(ValueError, match="empty caches expected, got 3 tokens"):
        list(with_caches(model, sample, {"filled": lambda: filled}))
