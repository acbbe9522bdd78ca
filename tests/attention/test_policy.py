"""Policies that are masks, against attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork import attention
from openwork.attention import AShape, Dense, LMInfinite, LServe, Policy, lambda_density
from openwork.kvcache import SnapKV
from openwork.models.llama import rope_frequencies

H, G, D = 6, 2, 16
FREQUENCIES = 100.0 ** -(torch.arange(D // 2) / (D // 2))


def qkv(t: int, n: int, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, t, H, D), torch.randn(b, n, G, D), torch.randn(b, n, G, D)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """``mask [t, n]``; float64."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).double() for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k)
    scores = scores * (1 / math.sqrt(D) if scale is None else scale)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def lambda_mask(t: int, n: int, sinks: int, window: int) -> Tensor:
    i, j = torch.arange(n - t, n)[:, None], torch.arange(n)
    return (j <= i) & ((i - j < window) | (j < sinks))


@pytest.mark.parametrize(("t", "n"), [(40, 40), (7, 40), (40, 41), (1, 30)])
@pytest.mark.parametrize(("sinks", "window"), [(3, 9), (0, 5), (50, 2), (4, 1)])
def test_a_shape(t: int, n: int, sinks: int, window: int) -> None:
    q, k, v = qkv(t, n)
    mask = lambda_mask(t, n, sinks, window)
    for scale in (None, 0.1):
        o, density = AShape(sinks, window)(0, q, k, v, scale=scale)
        assert torch.allclose(o.double(), masked(q, k, v, mask, scale), atol=1e-5)
    every = torch.ones(t, n).tril(n - t).sum()
    assert density == pytest.approx(float(mask.sum() / every))


@pytest.mark.parametrize(
    "policy",
    [AShape(8, 40), AShape(40, 1), LMInfinite(FREQUENCIES, 4, 40), LServe(torch.ones(1, G) > 0)],
    ids=["window", "sinks", "infinite", "retrieval"],
)
def test_everything_visible_is_dense(policy: Policy) -> None:
    q, k, v = qkv(40, 40)
    o, density = policy(0, q, k, v)
    assert density == 1
    assert torch.allclose(o, Dense()(0, q, k, v).o, atol=1e-5)


def rotated(x: Tensor, position: int) -> Tensor:
    angles = (position * FREQUENCIES).double()
    x1, x2 = x.double().chunk(2, -1)
    return torch.cat(
        (x1 * angles.cos() - x2 * angles.sin(), x2 * angles.cos() + x1 * angles.sin()), -1
    )


@pytest.mark.parametrize(("t", "n"), [(30, 30), (4, 30)])
def test_lm_infinite_clips_distances(t: int, n: int) -> None:
    """Queries and keys are rotated from scratch here, each pair by its own distance."""
    sinks, window = 3, 8
    q, k, v = qkv(t, n, b=1)
    out = torch.zeros(1, t, H, D, dtype=torch.float64)
    for row in range(t):
        i = n - t + row
        seen = [j for j in range(i + 1) if i - j < window or j < sinks]
        for head in range(H):
            scores = torch.stack(
                [
                    rotated(q[0, row, head], min(i - j, window))
                    @ k[0, j, head // (H // G)].double()
                    / math.sqrt(D)
                    for j in seen
                ]
            )
            # A key behind the window is at the distance `window`, whichever sink it is.
            out[0, row, head] = scores.softmax(0) @ v[0, seen, head // (H // G)].double()
    q_rotated = torch.stack([rotated(q[:, r], n - t + r) for r in range(t)], 1).float()
    k_rotated = torch.stack([rotated(k[:, j], j) for j in range(n)], 1).float()
    o, density = LMInfinite(FREQUENCIES, sinks, window)(0, q_rotated, k_rotated, v)
    assert torch.allclose(o.double(), out, atol=1e-5)
    assert density == pytest.approx(lambda_density(t, n, sinks, window))


def test_lserve_heads() -> None:
    q, k, v = qkv(40, 40)
    o, density = LServe(torch.tensor([[False, True]]), 2, 6)(0, q, k, v)
    group = H // G
    streaming = masked(q, k, v, lambda_mask(40, 40, 2, 6))[:, :, :group]
    assert torch.allclose(o[:, :, :group].double(), streaming, atol=1e-5)
    dense = masked(q, k, v, lambda_mask(40, 40, 0, 40))[:, :, group:]
    assert torch.allclose(o[:, :, group:].double(), dense, atol=1e-5)
    assert density == pytest.approx((1 + lambda_density(40, 40, 2, 6)) / 2)


@pytest.mark.parametrize(
    "policy", [AShape(4, 16), AShape(0, 3), LServe(torch.zeros(1, G) > 0, 2, 6)], ids=str
)
def test_error_is_bounded_by_the_mass_left_out(policy: AShape | LServe) -> None:
    q, k, v = qkv(60, 60)
    mask = lambda_mask(60, 60, policy.sinks, policy.window)
    everything = lambda_mask(60, 60, 0, 60)
    scores = torch.einsum("bihd,bjhd->bihj", q, k.repeat_interleave(H // G, 2)) / math.sqrt(D)
    p = scores.masked_fill(~everything[:, None], -torch.inf).softmax(-1)
    left_out = (p * ~mask[:, None]).sum(-1)
    error = (policy(0, q, k, v).o - masked(q, k, v, everything)).abs().amax(-1)
    assert error.max() > 1e-3
    assert (error <= 2 * left_out * v.abs().max() + 1e-5).all()


def test_enable_and_disable() -> None:
    model = random_model()
    tokens = torch.arange(60)[None]
    with torch.inference_mode():
        dense = model(tokens)
        report = attention.enable(model, AShape(4, 16), crossover=50)
        sparse = model(tokens)
        assert not torch.allclose(sparse, dense, atol=1e-4)
        assert report.density == pytest.approx(lambda_density(60, 60, 4, 16))
        assert [len(layer) for layer in report.densities] == [1, 1]
        short = tokens[:, :49]
        assert torch.allclose(model(short), random_model()(short), atol=1e-5)
        assert report.dense_calls == 2
        report = attention.enable(model, AShape(4, 60), crossover=0)
        assert torch.allclose(model(tokens), dense, atol=1e-5)
        assert report.density == 1
        attention.disable(model)
        assert torch.equal(model(tokens), dense)


def test_gradients_need_dense_attention() -> None:
    model = random_model().requires_grad_(True)
    report = attention.enable(model, AShape(1, 4), crossover=0)
    model(torch.arange(20)[None]).sum().backward()
    assert report.dense_calls == 2 and report.density == 1


def test_lm_infinite_for_a_model() -> None:
    model = random_model()
    tokens = torch.arange(40)[None]
    policy = LMInfinite(rope_frequencies(model.config), 4, 40)
    with torch.inference_mode():
        dense = model(tokens)
        attention.enable(model, policy, crossover=0)
        assert torch.allclose(model(tokens), dense, atol=1e-5)


def test_measures_a_crossover() -> None:
    model = random_model()
    found = attention.measure_crossover(
        model, AShape(1, 8), torch.arange(64), lengths=(16, 64), layers=[0]
    )
    assert found in (None, 16, 64)
    with pytest.raises(ValueError, match="a longer text expected, got 8 tokens"):
        attention.measure_crossover(model, AShape(), torch.arange(8))
    for policy, name in ((SnapKV(64), "eviction.SnapKV"), (AShape, "policy.AShape itself")):
        with pytest.raises(ValueError, match=f"policy of openwork.attention, .* got .*{name}"):
            attention.enable(model, policy)  # type: ignore[arg-type]
    q, k, v = qkv(40, 40)
    for retrieval, message in (
        (torch.ones(1, G), r"must be \[layers, g\] bool, .* got \[1, 2\] float32"),
        (torch.ones(1, 3) > 0, "retrieval of 2 key heads expected, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            LServe(retrieval)(0, q, k, v)
    with pytest.raises(ValueError, match="crossover must be at least 0, got -1"):
        attention.enable(model, AShape(), crossover=-1)


@pytest.mark.parametrize("make", [AShape, lambda s, w: LMInfinite(FREQUENCIES, s, w)])
def test_refuses(make: object) -> None:
    assert callable(make)
    for sinks, window in ((-1, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"expected, got {sinks} and {window}"):
            make(sinks, window)
