"""Policies that estimate: dense in their limits, bounded by the mass they leave out elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork import attention, ops
from openwork.attention import (
    BlockTopK,
    Dense,
    Estimated,
    FlexPrefill,
    HeadPattern,
    HiP,
    MInference,
    VerticalSlash,
    packed_hidden,
    search_patterns,
)
from openwork.errors import FormatError
from openwork.kvcache import H2O, Cache, Format, KeepAll, SnapKV
from openwork.kvcache import Policy as CachePolicy

N, H, G, D = 300, 6, 2, 16
FULL: list[Estimated] = [
    VerticalSlash(N, 1),
    VerticalSlash(1, N),
    BlockTopK(N),
    FlexPrefill(1.0),
    HiP(N),
    MInference(((HeadPattern("a_shape", 0, N), HeadPattern("block_topk", 99)) * 3,)),
]
SPARSE: list[Estimated] = [
    VerticalSlash(30, 2, sinks=4, window=1),
    BlockTopK(1),
    FlexPrefill(0.3, min_budget=64, block=32),
    HiP(1, window=16),
    MInference(((HeadPattern("a_shape", 4, 20), HeadPattern("vertical_slash", 40, 110)) * 3,)),
]


def qkv(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(1, n, H, D), torch.randn(1, n, G, D), torch.randn(1, n, G, D)


@pytest.mark.parametrize("policy", FULL, ids=repr)
def test_full_budgets_are_dense(policy: Estimated) -> None:
    q, k, v = qkv()
    for scale in (None, 0.1):
        o, density = policy(0, q, k, v, scale=scale)
        assert density == pytest.approx(1)
        assert torch.allclose(o, Dense()(0, q, k, v, scale=scale).o, atol=1e-5)


@pytest.mark.parametrize("policy", FULL[:-1], ids=repr)
def test_full_budgets_are_dense_in_a_model(policy: Estimated) -> None:
    model, tokens = random_model(), torch.arange(N)[None] % 320
    with torch.inference_mode():
        dense = model(tokens)
        report = attention.enable(model, policy, crossover=0)
        assert torch.allclose(model(tokens), dense, atol=1e-5)
    assert report.density == pytest.approx(1)


@pytest.mark.parametrize("policy", SPARSE, ids=repr)
def test_error_is_bounded_by_the_mass_left_out(policy: Estimated) -> None:
    q, k, v = qkv()
    o, density = policy(0, q, k, v)
    assert 0 < density < 0.9
    index = policy.index(0, q, k, None)
    mask = index.to_mask([N], [N])[0].expand(H, N, N)
    scores = torch.einsum("bihd,bjhd->hij", q, k.repeat_interleave(H // G, 2)) / D**0.5
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    p = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    covered = (p * mask).sum(-1).T
    error = (o - Dense()(0, q, k, v).o)[0].abs().amax(-1)
    assert (error <= 2 * (1 - covered) * v.abs().max() + 1e-5).all()


def test_patterns_of_heads_are_kept_apart() -> None:
    q, k, v = qkv()
    near, far = HeadPattern("a_shape", 0, 16), HeadPattern("a_shape", 64, 16)
    o = MInference(((near, far, near, near, far, far),))(0, q, k, v).o
    for head, pattern in enumerate((near, far, near, near, far, far)):
        alone = MInference(((pattern,) * H,))(0, q, k, v).o
        assert torch.allclose(o[:, :, head], alone[:, :, head], atol=1e-6)


def test_patterns_of_another_model_are_refused() -> None:
    q, k, v = qkv()
    near = HeadPattern("a_shape", 0, 16)
    for layer, got in ((0, 4), (1, 0)):
        message = f"patterns of 6 heads expected in layer {layer}, got {got}"
        with pytest.raises(ValueError, match=message):
            MInference(((near,) * 4,))(layer, q, k, v)


def test_patterns_are_saved(tmp_path: Path) -> None:
    policy = MInference(((HeadPattern("a_shape", 4, 20), HeadPattern("block_topk", 3)),) * 2)
    policy.save(tmp_path / "patterns.json")
    assert MInference.load(tmp_path / "patterns.json") == policy
    for damaged in ("{}", "[", '{"heads": [[{"kind": "other", "first": 1}]]}', '{"heads": 3}'):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(FormatError, match=r"damaged.json: patterns of heads expected, got"):
            MInference.load(tmp_path / "damaged.json")


def test_search_takes_the_least_error_that_the_density_allows() -> None:
    model, tokens = random_model(), torch.arange(256) % 320
    full, near = HeadPattern("a_shape", 0, 256), HeadPattern("a_shape", 0, 16)
    sinks = HeadPattern("a_shape", 64, 16)
    found = search_patterns(model, tokens, density=1.0, candidates=[near, full, sinks])
    assert set(sum(found.heads, ())) == {full}
    found = search_patterns(model, tokens, density=0.01, candidates=[full, near, sinks])
    assert set(sum(found.heads, ())) == {near}
    assert [len(layer) for layer in found.heads] == [6, 6]
    report = attention.enable(model, found, crossover=0)
    with torch.inference_mode():
        model(tokens[None])
    assert report.density < 0.7
    with pytest.raises(ValueError, match="expected, got 0 and 0.5"):
        search_patterns(model, tokens, density=0.5, candidates=[])


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize(
    ("policy", "format"),
    [
        (KeepAll(), Format()),
        (SnapKV(20, window=8), Format()),
        (H2O(10, 10), Format(rotate="read")),
        (KeepAll(), Format(exact_first=3)),
    ],
)
def test_packed_prompts_fill_their_caches(policy: CachePolicy, format: Format, drafts: int) -> None:
    """What each holds, and what comes after it, is as if it had been read alone."""
    model = random_model()
    prompts = [torch.randint(0, 320, (n,)) for n in (3, 40, 1, 17, 22)]

    def cache() -> Cache:
        return Cache(model, 64, policy=policy, format=format, drafts=drafts)

    caches, after = [cache() for _ in prompts], torch.tensor([[7, 8, 9]])
    with torch.inference_mode():
        packed_hidden(model, prompts, caches=caches)
        for packed, prompt in zip(caches, prompts, strict=True):
            alone = cache()
            model(prompt[None], alone)
            assert packed.length == alone.length == len(prompt)
            logits = [model(after, x) for x in (packed, alone)]
            assert torch.allclose(*logits, atol=1e-5)
            for a, b in zip(packed.layers, alone.layers, strict=True):
                assert torch.equal(a.lengths, b.lengths)
                for x, y in zip(ops.kv_read(a.pages), ops.kv_read(b.pages), strict=True):
                    assert torch.allclose(x, y, atol=1e-5)
    for wrong, message in (
        (caches, "empty caches expected, got 6 tokens"),
        (caches[:2], "a cache for each of 5 prompts expected, got 2"),
        ([Cache(model, 20) for _ in prompts], "room for 40 tokens needed, got max_len = 20"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_hidden(model, prompts, caches=wrong)


def test_packed_prompts_equal_single_ones() -> None:
    model = random_model()
    prompts = [torch.randint(0, 320, (n,)) for n in (3, 40, 1, 17, 22)]
    with torch.inference_mode():
        for packed, prompt in zip(packed_hidden(model, prompts), prompts, strict=True):
            assert torch.allclose(packed, model.hidden(prompt[None])[0], atol=1e-5)
            assert torch.allclose(model.head(packed), model(prompt[None])[0], atol=1e-5)
    assert len(packed_hidden(model, [[1, 2], [3]])) == 2
