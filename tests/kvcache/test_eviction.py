"""Which tokens each policy keeps, against its definition in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from openwork.kvcache import H2O, TOVA, AdaKV, LServe, Quest, Razor, Recency, Saliency, SnapKV

from .prompts import held, probabilities, random_prompt


def kept(mask: Tensor) -> list[list[set[int]]]:
    return [[set(head.nonzero()[:, 0].tolist()) for head in sequence] for sequence in mask]


@pytest.mark.parametrize(
    "policy", [SnapKV(24, window=8, pool=3), TOVA(24), Recency(4, 20)], ids=repr
)
def test_budget_of_everything_keeps_everything(policy: SnapKV | TOVA | Recency) -> None:
    assert policy.layer(0).compress(random_prompt(24)) is None
    smaller = policy.layer(0).compress(random_prompt(25))
    assert smaller is not None and smaller.mask.sum(-1).unique().tolist() == [24]


def test_snapkv() -> None:
    budget, window, pool, n = 12, 4, 3, 30
    prompt = random_prompt(n)
    result = SnapKV(budget, window, pool).compress(prompt)
    assert result is not None
    sums = prompt.columns(window)
    for s in range(2):
        for head in range(2):
            score = sums[s, 3 * head : 3 * head + 3].mean(0)[: n - window].tolist()
            padded = [0.0, *score, 0.0]
            pooled = [sum(padded[j : j + 3]) / 3 for j in range(len(score))]
            best = sorted(range(len(pooled)), key=lambda j: -pooled[j])[: budget - window]
            assert kept(result.mask)[s][head] == {*best, *range(n - window, n)}


def test_tova_keeps_the_same_tokens_in_all_heads() -> None:
    prompt = random_prompt(20)
    result = TOVA(6).compress(prompt)
    assert result is not None
    last = prompt.columns(1).mean(1)
    for s in range(2):
        order = last[s, :-1].argsort(descending=True)[:5].tolist()
        assert kept(result.mask)[s] == [{*order, 19}] * 2


def test_saliency_is_a_mean_over_the_queries_that_see_a_token() -> None:
    n = 20
    prompt = random_prompt(n)
    result = Saliency(6).compress(prompt)
    assert result is not None
    sums = prompt.columns(0)
    for s in range(2):
        for head in range(2):
            score = sums[s, 3 * head : 3 * head + 3].mean(0).tolist()
            mean = [score[j] / (n - j) for j in range(n)]
            assert kept(result.mask)[s][head] == {*sorted(range(n), key=lambda j: -mean[j])[:6]}


def test_recency_while_decoding() -> None:
    policy = Recency(sinks=2, recent=3)
    lengths = torch.tensor([[5, 6]])
    mask = policy.trim(held(lengths, torch.empty(0)))
    assert mask is not None
    assert mask.tolist() == [[[True] * 5 + [False], [True, True, False, True, True, True]]]
    assert policy.trim(held(torch.tensor([[5, 5]]), torch.empty(0))) is None


def test_h2o_equals_brute_force_on_twenty_steps() -> None:
    """Queries of the steps attend to what is held, and only that is ever counted."""
    heavy, recent, prompt_length, steps = 5, 4, 14, 20
    n = prompt_length + steps
    q, keys = 2 * torch.randn(1, n, 2, 8), torch.randn(1, 1, n, 8)
    prompt = random_prompt(prompt_length, b=1, g=1, group=2)
    p = probabilities(q[:, :prompt_length], keys[:, :, :prompt_length]).float()
    prompt = replace(prompt, columns=lambda last: p.sum(2))
    policy = H2O(heavy, recent).layer(0)

    def best(tokens: list[int], score: dict[int, float]) -> list[int]:
        if len(tokens) <= heavy + recent:
            return tokens
        old = sorted(tokens[:-recent], key=lambda j: -score[j])[:heavy]
        return sorted(old) + tokens[-recent:]

    score = dict(enumerate(p.sum(2).mean(1)[0].tolist()))
    tokens = best(list(range(prompt_length)), score)
    result = policy.compress(prompt)
    assert result is not None and kept(result.mask)[0][0] == set(tokens)
    for step in range(prompt_length, n):
        tokens = [*tokens, step]
        row = probabilities(q[:, step : step + 1], keys[:, :, tokens]).float()[:, :, 0]
        for j, value in zip(tokens, row.mean(1)[0].tolist(), strict=True):
            score[j] = score.get(j, 0.0) + value
        expected = best(tokens, score)
        mask = policy.trim(held(torch.tensor([[len(tokens)]]), row))
        assert mask is not None and mask.sum() == heavy + recent
        assert [tokens[j] for j in mask[0, 0].nonzero()[:, 0].tolist()] == expected
        tokens = expected


def test_h2o_of_sequences_of_different_lengths() -> None:
    """Taken in one after another, they go on together as each would alone."""
    heavy, recent, lengths = 3, 2, (14, 4, 9)
    together = H2O(heavy, recent).layer(0)
    alone = [H2O(heavy, recent).layer(0) for _ in lengths]
    held_now = []
    for n, one in zip(lengths, alone, strict=True):
        prompt = random_prompt(n, b=1)
        results = [policy.compress(prompt) for policy in (together, one)]
        masks = [None if x is None else x.mask.tolist() for x in results]
        assert masks[0] == masks[1]
        held_now.append(min(n, heavy + recent))
    for _ in range(6):
        held_now = [n + 1 for n in held_now]
        most = max(held_now)
        columns = torch.zeros(3, 6, most)
        for s, n in enumerate(held_now):
            columns[s, :, :n] = torch.rand(6, n)
        mask = together.trim(held(torch.tensor(held_now).view(-1, 1).expand(3, 2), columns))
        assert mask is not None
        for s, n in enumerate(held_now):
            own = alone[s].trim(held(torch.full((1, 2), n), columns[s : s + 1, :, :n]))
            expected = torch.ones(2, n, dtype=torch.bool) if own is None else own[0]
            assert torch.equal(mask[s, :, :n], expected) and not mask[s, :, n:].any()
            held_now[s] = min(n, heavy + recent)


def test_h2o_lets_a_short_prompt_grow() -> None:
    policy = H2O(3, 2).layer(0)
    assert policy.compress(random_prompt(4, b=1)) is None
    assert policy.trim(held(torch.full((1, 2), 5), torch.rand(1, 6, 5))) is None
    mask = policy.trim(held(torch.full((1, 2), 6), torch.rand(1, 6, 6)))
    assert mask is not None and mask.sum(-1).tolist() == [[5, 5]]


def test_adakv_shares_the_budget_of_the_layer() -> None:
    prompt = random_prompt(40)
    inner = SnapKV(12, window=4, pool=1)
    result = AdaKV(inner, floor=0.2).compress(prompt)
    assert result is not None
    assert result.mask.flatten(1).sum(1).tolist() == [24, 24]
    assert result.mask[..., -4:].all()
    assert len(set(result.mask.sum(-1).flatten().tolist())) > 1
    assert AdaKV(inner).compress(random_prompt(12)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(8, window=8), "window must be in 1 .. budget - 1, got 8 of 8"),
        (lambda: SnapKV(64, pool=4), "pool must be odd and at least 1, got 4"),
        (lambda: TOVA(0), "TOVA: budget must be at least 1, got 0"),
        (lambda: Recency(-1, 4), "sinks of at least 0 and recent of at least 1 .* -1 and 4"),
        (lambda: Recency(4, 0), "expected, got 4 and 0"),
        (lambda: H2O(-1, 4), "heavy of at least 0 and recent of at least 1 .* -1 and 4"),
        (lambda: AdaKV(SnapKV(64), floor=1.5), "AdaKV: floor must be in 0 .. 1, got 1.5"),
        (lambda: Quest(0), "Quest: budget of at least 1 .* got 0 and 2"),
        (lambda: LServe(torch.ones(2, 2) > 0, refresh=0), "refresh of at least 1 .* 4096 and 0"),
        (lambda: Razor(torch.ones(2, 2)).layer(0), r"\[layers, g\] bool.* got \[2, 2\] float32"),
        (lambda: LServe(torch.ones(2, 2) > 0).layer(2), "of more than 2 layers, got"),
        (
            lambda: Razor(torch.ones(2, 3) > 0).layer(0).compress(random_prompt(20)),
            "retrieval of 2 key heads expected, got 3",
        ),
    ],
)
def test_refuses(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
