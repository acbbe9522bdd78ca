"""Tokens that matter less in fewer bits: nothing is dropped, and every byte is counted."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from openwork import KVFormat, ops
from openwork.kvcache import (
    EMS,
    H2O,
    AdaKV,
    Format,
    LayerCache,
    MixedPrecision,
    Policy,
    Saliency,
    SnapKV,
    kivi,
)

from .prompts import probabilities

H, G, D, N = 4, 2, 64, 800


def new_layer(policy: Policy, format: Format, max_len: int = N) -> LayerCache:
    return LayerCache(
        2, H, G, D, max_len, format=format, policy=policy.layer(0), page_size=64,
        dtype=torch.float32, rope=(torch.ones(max_len, D // 2), torch.zeros(max_len, D // 2)),
    )  # fmt: skip


def take(layer: LayerCache, keys: Tensor, values: Tensor, q: Tensor) -> None:
    """A prompt ``[b, n, g, d]`` of which the last queries are q."""
    p = probabilities(q, keys.transpose(1, 2)).float()
    layer.take(keys, keys, values, lambda last: p[:, :, p.shape[2] - last if last else 0 :].sum(2))


def tokens(n: int, t: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, some of which many queries like, and queries."""
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, n, G, D, generator=random).unbind()
    liked = torch.randn(2, 1, G, D, generator=random)
    keys[:, :: n // 20] += 0.7 * liked
    q = torch.randn(2, t, H, D, generator=random) + liked.repeat_interleave(H // G, 2)
    return q, keys, values


def attended(layer: LayerCache, t: int, seed: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What t more tokens make of the cache, and what came in."""
    q, keys, values = tokens(40, t, seed)
    keys, values = keys[:, :t], values[:, :t]
    o = layer.attend(q, keys, keys, values, lambda *_: torch.empty(0))
    return o, q, keys, values


def dense(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    p = probabilities(q, keys.transpose(1, 2))
    values = values.double().repeat_interleave(H // G, 2)
    return torch.einsum("bhtn,bnhd->bthd", p, values)


@pytest.mark.parametrize("t", [1, 5, 30])
@pytest.mark.parametrize(
    "inner",
    [Saliency(60), SnapKV(60, window=8), AdaKV(SnapKV(60, window=8)), Saliency(200)],
    ids=lambda policy: type(policy).__name__,
)
def test_nothing_is_dropped(inner: Policy, t: int) -> None:
    """With the rest in floats it is attention to everything, whatever the choice."""
    q, keys, values = tokens(200, 200)
    layer = new_layer(MixedPrecision(inner, Format()), Format())
    take(layer, keys, values, q)
    budget = getattr(inner, "budget", 60)
    assert layer.lengths.sum(-1).tolist() == [2 * budget] * 2
    for _ in range(2):
        o, new_q, new_keys, new_values = attended(layer, t)
        keys, values = torch.cat((keys, new_keys), 1), torch.cat((values, new_values), 1)
        assert torch.allclose(o.double(), dense(new_q, keys, values), atol=1e-5)


def test_attention_is_that_of_the_two_formats() -> None:
    """Of what both pages read as, in float64."""
    q, keys, values = tokens(400, 400)
    policy = MixedPrecision(Saliency(150), Format(KVFormat(3, "token", 64), KVFormat(2, "token")))
    layer = new_layer(policy, kivi(4, residual=32))
    take(layer, keys, values, q)
    rest = layer.policy._store()  # type: ignore[attr-defined]
    o, new_q, _, _ = attended(layer, 3)
    held = zip(ops.kv_read(rest), ops.kv_read(layer.pages), strict=True)
    sides = (torch.cat([x.view(2, G, -1, D) for x in pair], 2).transpose(1, 2) for pair in held)
    expected = dense(new_q, *sides)
    assert torch.allclose(o.double(), expected, atol=1e-5)


def test_bytes_are_those_of_both_formats() -> None:
    """Of 60 % of the tokens at 4 bits and 40 % at 2, and scales: 5 and 3 bits a number here."""
    n, important = 16384, 9856
    keys, values = torch.randn(2, 2, n, G, D).unbind()
    coarse = Format(KVFormat(2, "channel", 64), KVFormat(2, "token", 64))
    fine = Format(KVFormat(4, "channel", 64), KVFormat(4, "token", 64))
    layers = {}
    scores = torch.rand(2, H, n)
    for name, policy, format in (
        ("fine", None, fine),
        ("coarse", None, coarse),
        ("mixed", MixedPrecision(Saliency(important), coarse), fine),
    ):
        layers[name] = new_layer(policy or Saliency(n), format, n)
        layers[name].take(keys, keys, values, lambda last: scores)
    bits = {name: layer.nbytes * 8 / (2 * G * n * 2 * D) for name, layer in layers.items()}
    # Float32 scales and mins take 1 bit of each number, and room for 128 exact tokens a quarter:
    # a group that waits, and one that a compaction leaves.
    tail = 128 * 32 / n
    assert bits["fine"] == pytest.approx(5 + tail, rel=0.01)
    assert bits["coarse"] == pytest.approx(3 + tail, rel=0.01)
    assert bits["mixed"] == pytest.approx(0.6 * 5 + 0.4 * 3 + 2 * tail, rel=0.02)
    assert layers["mixed"].lengths.unique().tolist() == [important]
    held = layers["mixed"].policy._store()  # type: ignore[attr-defined]
    assert held.lengths.unique().tolist() == [n - important]


def test_important_tokens_deserve_their_bits() -> None:
    """All in 4 bits, the important half, the other half, none: errors rise in that order."""
    q, keys, values = tokens(600, 600, seed=4)

    class Unimportant(Saliency):
        def scores(self, prompt: object) -> Tensor:
            return -super().scores(prompt)  # type: ignore[arg-type]

    two = Format(KVFormat(2, "channel", 32), KVFormat(2, "token", 32))
    errors = []
    for policy in (Saliency(600), MixedPrecision(Saliency(300), two),
                   MixedPrecision(Unimportant(300), two), None):  # fmt: skip
        four = Format(KVFormat(4, "channel", 32), KVFormat(4, "token", 32))
        layer = new_layer(policy or Saliency(600), two if policy is None else four)
        take(layer, keys, values, q)
        o, new_q, new_keys, new_values = attended(layer, 8, seed=4)
        exact = dense(new_q, torch.cat((keys, new_keys), 1), torch.cat((values, new_values), 1))
        errors.append((o.double() - exact).square().mean().item())
    assert errors == sorted(errors)
    assert errors[1] < 0.7 * errors[2]


def test_sequences_go_on_as_their_origins() -> None:
    q, keys, values = tokens(200, 200)
    order = torch.tensor([1, 1])
    policy = MixedPrecision(Saliency(60))
    mixed, other = new_layer(policy, Format()), new_layer(policy, Format())
    take(mixed, keys, values, q)
    take(other, keys[order], values[order], q[order])
    mixed.reorder(order)
    assert torch.allclose(attended(mixed, 2)[0], attended(other, 2)[0], atol=1e-5)


def test_refuses() -> None:
    with pytest.raises(ValueError, match='rest of rotate = "stored" .* got "read" and 0'):
        MixedPrecision(Saliency(4), Format(rotate="read"))
    with pytest.raises(ValueError, match="keeps no account of tokens expected, got H2O"):
        MixedPrecision(H2O(4, 4)).layer(0)
    q, keys, values = tokens(200, 200)
    with pytest.raises(ValueError, match="a policy that merges no tokens expected"):
        take(new_layer(MixedPrecision(EMS(60)), Format()), keys, values, q)
    with pytest.raises(ValueError, match="holds no tokens itself expected .*, got MixedLayer"):
        new_layer(MixedPrecision(cast(Policy, Saliency(4))), Format(rotate="place"))
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        Saliency(0)
