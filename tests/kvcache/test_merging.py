"""Merges of dropped tokens, against the definition in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openwork.kvcache import EMS, merge_tokens

from .prompts import random_prompt


def one_by_one(
    keys: Tensor, values: Tensor, scores: Tensor, centres: Tensor, merged: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    keys, values = keys.double(), values.double()
    new_keys, new_values = keys.clone(), values.clone()
    for s in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            k, v, w = keys[s, head], values[s, head], scores[s, head].double()
            to = centres[s, head].nonzero()[:, 0].tolist()
            members = {c: [c] for c in to}
            for j in merged[s, head].nonzero()[:, 0].tolist():
                cosines = [torch.cosine_similarity(k[j], k[c], dim=0).item() for c in to]
                if to and max(cosines) > threshold:
                    members[to[cosines.index(max(cosines))]].append(j)
            for c, tokens in members.items():
                total = sum(w[j] for j in tokens)
                direction = sum(w[j] * k[j] / k[j].norm() for j in tokens)
                norm = sum(w[j] * k[j].norm() for j in tokens) / total
                new_keys[s, head, c] = direction / direction.norm() * norm
                new_values[s, head, c] = sum(w[j] * v[j] for j in tokens) / total
    return new_keys, new_values


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.4])
def test_matches_one_by_one(threshold: float) -> None:
    keys, values = torch.randn(2, 2, 3, 20, 8).unbind()
    scores = torch.rand(2, 3, 20) + 0.1
    draw = torch.rand(2, 3, 20)
    centres, merged = draw < 0.3, (draw >= 0.3) & (draw < 0.8)
    centres[0, 0], merged[1, 1] = False, False  # a head without centres, and one without merges
    actual = merge_tokens(keys, values, scores, centres, merged, threshold)
    expected = one_by_one(keys, values, scores, centres, merged, threshold)
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a.double(), e, atol=1e-5)
    assert torch.equal(actual[0][~centres], keys[~centres])


def test_norm_of_a_merged_key_is_the_mean_norm() -> None:
    keys, values = torch.randn(2, 1, 1, 10, 8).unbind()
    scores = torch.rand(1, 1, 10)
    centres = torch.arange(10) == 3
    new_keys, _ = merge_tokens(
        keys, values, scores, centres.view(1, 1, -1), ~centres.view(1, 1, -1), -1.0
    )
    mean = (scores * keys.norm(dim=-1)).sum() / scores.sum()
    assert new_keys[0, 0, 3].norm() == pytest.approx(mean.item(), rel=1e-5)


def test_nothing_merges_at_threshold_one() -> None:
    keys = torch.randn(1, 1, 1, 8).repeat(1, 1, 6, 1)  # all the same, so every cosine is 1
    values = torch.randn(1, 1, 6, 8)
    centres = torch.arange(6).view(1, 1, -1) < 2
    same = merge_tokens(keys, values, torch.ones(1, 1, 6), centres, ~centres, 1.0)
    assert torch.equal(same[0], keys) and torch.equal(same[1], values)


def test_ems_at_threshold_one_only_evicts() -> None:
    prompt = random_prompt(40)
    merging, evicting = EMS(12, window=4).compress(prompt), EMS(12, threshold=1, window=4)
    pure = evicting.compress(prompt)
    assert merging is not None and pure is not None
    assert pure.keys is not None and torch.equal(pure.keys, prompt.keys)
    assert torch.equal(merging.mask, pure.mask)
    assert merging.keys is not None and not torch.equal(merging.keys, prompt.keys)
    assert EMS(40).compress(prompt) is None


def test_ems_scores_are_the_larger_of_local_and_global() -> None:
    prompt = random_prompt(30)
    scores = EMS(12, window=4, pool=1).scores(prompt)
    assert torch.isinf(scores[..., -4:]).all()
    local, every = prompt.scores(4)[..., :-4], prompt.scores()[..., :-4]
    every = every * local.mean(-1, keepdim=True) / every.mean(-1, keepdim=True)
    assert torch.allclose(scores[..., :-4], torch.maximum(local, every))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 8, "window": 8}, "window must be in 1 .. budget - 1"),
        ({"budget": 80, "threshold": 2.0}, "threshold in -1 .. 1 expected, got 1.0 and 2.0"),
        ({"budget": 80, "pool": 0}, "pool must be odd"),
    ],
)
def test_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMS(**options)  # type: ignore[arg-type]
