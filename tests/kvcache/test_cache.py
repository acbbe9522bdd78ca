"""The cache of a model: limits in which it is exact, and what it holds."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork import KVFormat, KVPages, attention, generate, ops
from openwork.kvcache import (
    EMS,
    H2O,
    TOVA,
    AdaKV,
    Cache,
    Format,
    Held,
    KeepAll,
    LayerCache,
    LayerPolicy,
    LServe,
    MixedPrecision,
    Policy,
    Quest,
    Razor,
    Recency,
    Saliency,
    SnapKV,
    kivi,
)
from openwork.models import Llama
from openwork.models.llama import dense_attention

from .prompts import probabilities

PROMPT, STEPS = 90, 6
TOKENS = torch.randint(0, 320, (2, PROMPT + 40), generator=torch.Generator().manual_seed(3))
SOME = torch.tensor([[True, False], [False, True]])
ALL = PROMPT + 40
POLICIES: dict[str, Policy] = {
    "keep": KeepAll(),
    "recency": Recency(4, ALL),
    "snapkv": SnapKV(ALL),
    "tova": TOVA(ALL),
    "h2o": H2O(ALL, 8),
    "adakv": AdaKV(SnapKV(ALL)),
    "ems": EMS(ALL),
    "saliency": Saliency(ALL),
    "mixed": MixedPrecision(Saliency(ALL)),
    "razor": Razor(SOME, 4, ALL),
    "quest": Quest(ALL + 64, dense_layers=1),
    "lserve": LServe(SOME, ALL + 64, 4, ALL),
}


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model()


def logits(model: Llama, cache: Any, chunks: list[int]) -> Tensor:
    with torch.inference_mode():
        parts = TOKENS[:, : sum(chunks)].split(chunks, dim=1)
        return torch.cat([model(part, cache) for part in parts], dim=1)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_budget_for_everything_is_dense(model: Llama, policy: Policy) -> None:
    chunks = [PROMPT, 1, 3, 20, 1]
    dense = logits(model, model.new_cache(ALL, 2), chunks)
    cache = Cache(model, ALL, batch=2, policy=policy)
    assert torch.allclose(logits(model, cache, chunks), dense, atol=1e-5)
    assert cache.length == sum(chunks)
    assert (cache.held == sum(chunks)).all()


@pytest.mark.parametrize("chunks", [[20], [1] * 9, [3, 17, 1, 9], [40, 1, 8, 9, 1]], ids=str)
@pytest.mark.parametrize(
    "format",
    [Format(), Format(rotate="read"), Format(rotate="place"), Format(exact_first=5)],
    ids=["stored", "read", "place", "exact_first"],
)
def test_every_format_of_floats_is_exact(model: Llama, format: Format, chunks: list[int]) -> None:
    dense = logits(model, model.new_cache(ALL, 2), chunks)
    cache = Cache(model, ALL, batch=2, format=[format] * 2)
    assert torch.allclose(logits(model, cache, chunks), dense, atol=1e-5)


def test_prefill_policies_serve_the_prompt(model: Llama) -> None:
    model = random_model()
    report = attention.enable(model, attention.AShape(4, 16), crossover=0)
    sparse = logits(model, model.new_cache(ALL, 2), [PROMPT])
    assert torch.allclose(logits(model, Cache(model, ALL, batch=2), [PROMPT]), sparse, atol=1e-5)
    assert report.density < 0.5


@pytest.mark.parametrize(
    ("policy", "held"),
    [
        (SnapKV(24, window=8), [24, 24]),
        (TOVA(24), [24, 24]),
        (EMS(24, window=8), [24, 24]),
        (Razor(SOME, 4, 20), [90, 24]),
        (LServe(SOME, 64, 4, 20), [90, 24]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_holds_what_it_says(model: Llama, policy: Policy, held: list[int]) -> None:
    cache = Cache(model, ALL, batch=2, policy=policy, page_size=32)
    logits(model, cache, [PROMPT])
    assert cache.held[0, 0].tolist() == held
    whole = Cache(model, ALL, batch=2, page_size=32)
    logits(model, whole, [PROMPT])
    assert cache.nbytes <= whole.nbytes * (sum(held) + 64) / (2 * PROMPT)


def test_adaptive_budgets_sum_to_the_same(model: Llama) -> None:
    cache = Cache(model, ALL, batch=2, policy=AdaKV(SnapKV(24, window=8)))
    logits(model, cache, [PROMPT])
    assert cache.held.sum(-1).unique().tolist() == [48]
    assert len(cache.held.unique()) > 1


@pytest.mark.parametrize("policy", [Recency(2, 10), H2O(6, 6)], ids=["recency", "h2o"])
def test_stays_within_its_budget_while_decoding(model: Llama, policy: Policy) -> None:
    cache = Cache(model, ALL, batch=2, policy=policy)
    sizes = []
    for t in [5, 4, 8, 20, 1, 1, 1]:
        logits(model, cache, [t])
        sizes.append(cache.held.unique().tolist())
    assert sizes == [[5], [9], *[[12]] * 5]


@pytest.mark.parametrize(
    "policy",
    [SnapKV(20, window=8), TOVA(20), AdaKV(SnapKV(20, window=8)), Recency(4, 16), H2O(10, 10)],
    ids=lambda policy: type(policy).__name__,
)
def test_error_is_bounded_by_the_mass_left_out(model: Llama, policy: Policy) -> None:
    """Of one layer: the output moves by at most 2 (1 - rho) max |v|."""
    torch.manual_seed(1)
    n, h, g, d = 60, 6, 2, 16
    cache = Cache(model, ALL, policy=policy)
    qkv = torch.randn(1, n, h + 2 * g, d)
    cache.attend[0](qkv, *model.rope(0, n))
    kept = cache.layers[0].pages
    step = torch.randn(1, 1, h + 2 * g, d)
    o = cache.attend[0](step, *model.rope(n, 1)).view(h, d)
    every = torch.cat((qkv, step), 1)
    q = ops.rope(step[:, :, :h], *model.rope(n, 1))
    keys = ops.rope(every[:, :, h : h + g], *model.rope(0, n + 1)).transpose(1, 2)
    values = every[:, :, h + g :].transpose(1, 2)
    p = probabilities(q, keys)[0, :, 0]
    dense = torch.stack([p[x] @ values[0, x // 3].double() for x in range(h)])
    held_keys = ops.kv_read(kept)[0].view(g, -1, d)
    for x in range(h):
        seen = (held_keys[x // 3][:, None] == keys[0, x // 3]).all(-1).any(0)
        bound = 2 * (1 - p[x][seen].sum()) * values[0, x // 3].abs().max()
        assert seen.sum() == kept.lengths.flatten()[x // 3] < n
        assert (o[x].double() - dense[x]).abs().max() <= bound + 1e-5


def test_rotation_by_place(model: Llama) -> None:
    """StreamingLLM: what is held lies at 0 .. held - 1, whatever its position was."""
    torch.manual_seed(1)
    h, g, d, sinks, recent = 6, 2, 16, 2, 5
    cache = Cache(model, ALL, format=Format(rotate="place"), policy=Recency(sinks, recent))
    layer = cache.attend[0]
    tokens = torch.randn(1, 20, h + 2 * g, d)
    held: list[int] = []
    for i in range(20):
        step = tokens[:, i : i + 1]
        o = layer(step, *model.rope(i, 1)).view(h, d)
        held.append(i)
        q = ops.rope(step[:, :, :h], *model.rope(len(held) - 1, 1))
        keys = ops.rope(tokens[:, held, h : h + g], *model.rope(0, len(held))).transpose(1, 2)
        p = probabilities(q, keys)[0, :, 0]
        values = tokens[0, held, h + g :].double()
        expected = torch.stack([p[x] @ values[:, x // 3] for x in range(h)])
        assert torch.allclose(o.double(), expected, atol=1e-5)
        if len(held) > sinks + recent:
            del held[sinks]


def test_streams_past_the_context() -> None:
    """By place no distance is longer than the cache, so the text has no end (StreamingLLM)."""
    tokens = torch.randint(0, 320, (1, 200), generator=torch.Generator().manual_seed(7))
    streams = []
    for context in (64, 1024):
        model = random_model(context_length=context)
        cache = Cache(model, 1000, format=Format(rotate="place"), policy=Recency(4, 28))
        with torch.inference_mode():
            parts = tokens.split([50, 1, 3, *[1] * 20, 8, 30, 1, *[1] * 80, 7], dim=1)
            streams.append(torch.cat([model(part, cache) for part in parts], 1))
        assert cache.length == 200 and (cache.held == 32).all() and cache.position == 32
    assert torch.equal(*streams)
    small = random_model(context_length=64)
    whole = Cache(small, 1000, format=Format(rotate="place"))
    with torch.inference_mode():
        small(tokens[:, :40], whole)
        with pytest.raises(ValueError, match="context_length = 64 expected, got 65"):
            small(tokens[:, 40:65], whole)
    with pytest.raises(ValueError, match="context_length = 64 expected, got 1000"):
        Cache(small, 1000, policy=Recency(4, 28))


def test_compensation_is_merged(model: Llama) -> None:
    """Exact where all that is dropped is one key and one value; pages alone are not."""
    h, g, d, n = 6, 2, 16, 40
    torch.manual_seed(1)
    keys, values = torch.randn(2, 1, n, g, d).unbind()
    keys[:, 4:30], values[:, 4:30] = keys[:, 4:5], values[:, 4:5]
    step = torch.randn(1, 1, h + 2 * g, d)
    outputs = {}
    for name, policy in {
        "dense": KeepAll(),
        "razor": Razor(torch.zeros(2, g) > 0, 4, 10),
        "without": Razor(torch.zeros(2, g) > 0, 4, 10, compensation=False),
    }.items():
        cache = Cache(model, ALL, policy=policy)
        cache.layers[0].take(keys, keys, values, lambda last: torch.empty(0))
        outputs[name] = cache.attend[0](step, *model.rope(n, 1))
    assert torch.allclose(outputs["razor"], outputs["dense"], atol=1e-5)
    assert not torch.allclose(outputs["without"], outputs["dense"], atol=1e-3)


@pytest.mark.parametrize("method", ["flat", "chunks"])
@pytest.mark.parametrize("budget", [1, 2, 4, 7, 9])
def test_pages_left_out_bound_the_error(method: Literal["flat", "chunks"], budget: int) -> None:
    h, g, d, n = 6, 2, 16, 200
    torch.manual_seed(1)
    fp32 = KVFormat(32)
    pages = KVPages.allocate(1, g, d, n, keys=fp32, values=fp32, page_size=32, bounds=True)
    keys, values = torch.randn(2, 1, n, g, d).unbind()
    ops.kv_append(pages, keys, values)
    q = torch.randn(1, 1, h, d)
    selected = ops.select_pages(q, pages, budget, method=method)
    o = ops.paged_attention(q, pages, selected=selected)[0, 0]
    dense = ops.paged_attention(q, pages)[0, 0]
    if budget >= n / 32:
        assert torch.allclose(o, dense, atol=1e-5)
    p = probabilities(q, keys.transpose(1, 2))[0, :, 0]
    for x in range(h):
        seen = torch.isin(torch.arange(n) // 32, selected[0, x // 3])
        bound = 2 * (1 - p[x][seen].sum()) * values[0, :, x // 3].abs().max()
        assert (o[x] - dense[x]).abs().max() <= bound + 1e-5


def test_quest_reads_the_pages_of_a_needle(model: Llama) -> None:
    h, g, d, n = 6, 2, 16, 200
    torch.manual_seed(1)
    keys, values = torch.randn(2, 1, n, g, d).unbind()
    step = torch.randn(1, 1, h + 2 * g, d)
    q = step[:, :, :h]
    keys[0, 70] = 30 * q.view(g, 3, d).sum(1)
    outputs = []
    for policy in (KeepAll(), Quest(96, dense_layers=0)):
        cache = Cache(model, 256, policy=policy, page_size=32)
        cache.layers[0].take(keys, keys, values, lambda last: torch.empty(0))
        # At position 0 nothing is rotated, so that q is the needle's.
        outputs.append(cache.attend[0](step, *model.rope(0, 1)))
    assert torch.allclose(*outputs, atol=1e-2)


def test_generates(model: Llama) -> None:
    cache = Cache(model, 64, policy=SnapKV(60))
    tokens = TOKENS[0, :20].tolist()
    with_cache = list(generate(model, tokens, 8, stop=(), cache=cache))
    assert with_cache == list(generate(model, tokens, 8, stop=()))


def test_refuses(model: Llama) -> None:
    with pytest.raises(ValueError, match="max_len and batch must be at least 1, got 0, 1"):
        Cache(model, 0)
    for wrong, got in (
        ([Format()] * 3, "3 Format"), (KVFormat(4), "1 KVFormat"), ("kivi", "4 str"), ([], "0 of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"or one for each of 2 layers expected, got {got}"):
            Cache(model, 8, format=wrong)  # type: ignore[arg-type]
    for policy, name in (
        (attention.AShape(), "attention.policy.AShape"),
        (SnapKV, "SnapKV itself"),
    ):
        with pytest.raises(ValueError, match=f"policy of openwork.kvcache, .* got .*{name}"):
            Cache(model, 8, policy=policy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kivi: residual must be a multiple of group_size = 32"):
        kivi(4, residual=100)
    cache = Cache(model, 8)
    with pytest.raises(ValueError, match="room for 9 tokens needed, got max_len = 8"):
        model(TOKENS[:1, :9], cache)
    with pytest.raises(ValueError, match="1 sequences expected"):
        model(TOKENS[:, :4], cache)
    with pytest.raises(ValueError, match="and 0 with rotation by place, got 2"):
        Format(rotate="place", exact_first=2)
    assert math.prod(cache.held.shape) == 4


def test_a_choice_of_pages_serves_some_steps_in_layers_that_choose(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quest's first layers read everything; LServe chooses every few steps, and at a new page."""
    asked: list[int] = []
    select = ops.select_pages

    def counted(q: Tensor, pages: KVPages, budget: int, **options: Any) -> Tensor:
        asked.append(int(pages.lengths.max()))
        return select(q, pages, budget, **options)

    monkeypatch.setattr(ops, "select_pages", counted)
    for policy, expected in (
        (Quest(32, dense_layers=2), []),
        (Quest(32, dense_layers=1), [91, 92, 93, 94, 95, 96, 97, 98, 99]),
        # Of two layers. Page 2 is full at 96 tokens.
        (LServe(SOME, 32, 4, ALL, refresh=4), [91, 91, 95, 95, 97, 97]),
    ):
        asked.clear()
        cache = Cache(model, ALL, batch=2, policy=policy, page_size=32)
        logits(model, cache, [PROMPT, *[1] * 9])
        assert asked == expected


@pytest.mark.parametrize("t", [1, 3, 12])
@pytest.mark.parametrize("format", [Format(), Format(exact_first=4), Format(rotate="read")])
def test_policies_see_what_steps_attended_to(model: Llama, format: Format, t: int) -> None:
    """Of everything: tokens that are kept apart have their share."""
    h, g, d, n = 6, 2, 16, 30
    seen: list[Tensor] = []

    class Watching(LayerPolicy):
        def trim(self, held: Held) -> Tensor | None:
            seen.append(held.columns())
            return None

    layer = LayerCache(
        2, h, g, d, 64, format=format, policy=Watching(), page_size=32, dtype=torch.float32,
        rope=model.rope(0, 64),
    )  # fmt: skip
    torch.manual_seed(1)
    qkv = torch.randn(2, n + t, h + 2 * g, d)
    for part in (slice(0, n), slice(n, n + t)):
        layer(qkv[:, part], *(x[part] for x in model.rope(0, n + t)), dense_attention_of)
    q, keys = (ops.rope(x, *model.rope(0, n + t)) for x in (qkv[:, :, :h], qkv[:, :, h : h + g]))
    p = probabilities(q[:, n:], keys.transpose(1, 2)).sum(2)
    assert torch.allclose(seen[-1].double(), p[..., format.exact_first :], atol=1e-5)


def dense_attention_of(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return dense_attention(q, keys, values).view(q.shape)
