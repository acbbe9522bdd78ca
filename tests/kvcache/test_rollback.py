"""Tokens taken back, and prompts in chunks: what is left is what would have been without."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from models.checkpoints import random_model
from torch import Tensor

from openwork import ops
from openwork.kvcache import (
    EMS,
    H2O,
    TOVA,
    AdaKV,
    Cache,
    Format,
    KeepAll,
    LayerCache,
    LServe,
    MixedPrecision,
    Policy,
    Prompt,
    Quest,
    Razor,
    Recency,
    SnapKV,
    kivi,
)
from openwork.models import Llama, generate
from openwork.models.llama import dense_attention

from .prompts import probabilities

H, G, D, N = 6, 2, 16, 300
SOME = torch.tensor([[True, False], [False, True]])
POLICIES: dict[str, Policy] = {
    "keep": KeepAll(),
    "recency": Recency(4, 40),
    "snapkv": SnapKV(40, window=8),
    "tova": TOVA(40),
    "h2o": H2O(30, 10),
    "adakv": AdaKV(SnapKV(40, window=8)),
    "ems": EMS(40, window=8),
    "mixed": MixedPrecision(SnapKV(40, window=8)),
    "razor": Razor(SOME, 4, 40),
    "quest": Quest(64, dense_layers=0),
    "lserve": LServe(SOME, 64, 4, 40),
}
FORMATS = {
    "float": Format(),
    "kivi": kivi(4, group_size=32, residual=32),
    "read": Format(rotate="read"),
    "exact_first": Format(exact_first=5),
}


def new_layer(policy: Policy, format: Format, drafts: int = 0) -> LayerCache:
    return LayerCache(
        2, H, G, D, N, format=format, policy=policy.layer(0), page_size=32,
        dtype=torch.float32, drafts=drafts, rope=random_model().rope(0, N),
    )  # fmt: skip


class Tokens:
    """Random queries, keys and values by position, and what a layer makes of them."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.qkv = torch.randn(2, N, H + 2 * G, D, generator=random)
        self.cos, self.sin = random_model().rope(0, N)

    def feed(self, layer: LayerCache, begin: int, end: int) -> Tensor:
        part = self.qkv[:, begin:end], self.cos[begin:end], self.sin[begin:end]
        return layer(*part, lambda q, k, v: dense_attention(q, k, v).view(q.shape))


def assert_same(a: LayerCache, b: LayerCache) -> None:
    assert torch.equal(a.lengths, b.lengths) and a.seen == b.seen
    for x, y in zip(ops.kv_read(a.pages), ops.kv_read(b.pages), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_drafts_leave_no_trace(policy: Policy, format: Format) -> None:
    tokens, wrong = Tokens(), Tokens(1)
    plain, drafted = new_layer(policy, format, 12), new_layer(policy, format, 12)
    place = 0
    # (tokens that stay, drafts taken back): the prompt, a group of 32 filled up, more than 8.
    for stay, drafts in ((70, 5), (1, 3), (0, 4), (4, 2), (9, 3), (1, 0), (2, 10), (12, 0)):
        if stay:
            tokens.feed(plain, place, place + stay)
        mixed = Tokens()
        mixed.qkv = torch.cat((tokens.qkv[:, : place + stay], wrong.qkv[:, place + stay :]), 1)
        mixed.feed(drafted, place, place + stay + drafts)
        assert drafted.revocable >= drafts
        drafted.rollback(drafts)
        place += stay
        if stay:
            assert torch.equal(plain.lengths, drafted.lengths) and drafted.seen == place
    for layer in (plain, drafted):
        layer.settle()
    assert_same(plain, drafted)
    outputs = [tokens.feed(layer, place, place + 1) for layer in (plain, drafted)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_takes_back_as_far_as_nothing_was_dropped(format: Format) -> None:
    """To the empty cache, through quantized groups, whose other tokens stay rounded."""
    tokens = Tokens()
    layer, dense = new_layer(KeepAll(), format), new_layer(KeepAll(), Format())
    for begin, end in ((0, 100), (100, 104), (104, 150)):
        tokens.feed(layer, begin, end)
    for left in (149, 97, 50, 3):
        assert layer.revocable == layer.seen
        layer.rollback(layer.seen - left)
        assert (layer.lengths == left).all()
    tokens.feed(layer, 3, 40)
    tokens.feed(dense, 0, 40)
    outputs = [tokens.feed(x, 40, 41) for x in (layer, dense)]
    assert torch.allclose(*outputs, atol=0.2 if format.keys else 1e-5)
    before = layer.pages.allocated_pages
    layer.rollback(41)
    assert (layer.lengths == 0).all() and layer.pages.allocated_pages == 0 < before
    assert torch.equal(tokens.feed(layer, 0, 20), tokens.feed(new_layer(KeepAll(), format), 0, 20))


def feed_chunks(tokens: Tokens, layer: LayerCache, chunks: Sequence[int]) -> Tensor:
    layer.collecting = "whole"
    outputs, place = [], 0
    for t in chunks:
        outputs.append(tokens.feed(layer, place, place + t))
        place += t
    layer.collecting = None
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_chunks_of_a_prompt_are_one(policy: Policy, format: Format) -> None:
    tokens = Tokens()
    whole, chunked = new_layer(policy, format), new_layer(policy, format)
    expected = tokens.feed(whole, 0, 130)
    got = feed_chunks(tokens, chunked, [60, 1, 40, 7, 22])
    assert torch.allclose(got, expected, atol=1e-5)
    assert (chunked.lengths == 130).all()
    kinds = 2 if format.rotate == "stored" else 3  # keys, rotated if not they, and values
    waiting = chunked.nbytes - chunked.pages.bytes()
    assert waiting == 4 * 2 * 130 * D * (H + kinds * G)
    chunked.settle()
    assert_same(whole, chunked)
    assert torch.equal(tokens.feed(whole, 130, 133), tokens.feed(chunked, 130, 133))


def compress(tokens: Tokens, policy: Policy, q: slice, places: Tensor) -> Tensor:
    """What a policy keeps of the tokens at ``places [b, g, n]``, by the queries of ``q``."""
    n = q.stop
    queries = ops.rope(tokens.qkv[:, q, :H], tokens.cos[q], tokens.sin[q])
    keys = ops.rope(tokens.qkv[:, :n, H : H + G], tokens.cos[:n], tokens.sin[:n]).transpose(1, 2)
    values = tokens.qkv[:, :n, H + G :].transpose(1, 2)
    held = [x.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, D)) for x in (keys, values)]
    p = probabilities(queries, held[0]).float()

    def columns(last: int) -> Tensor:
        return p[:, :, p.shape[2] - last if last else 0 :].sum(2)

    kept = policy.layer(0).compress(Prompt(held[0], held[0], held[1], columns))
    assert kept is not None
    return kept.mask


@pytest.mark.parametrize("name", ["snapkv", "tova", "adakv"])
def test_bounded_memory_holds_a_budget_and_a_chunk(name: str) -> None:
    """The policy written out, a chunk at a time, picks the same tokens."""
    tokens, policy = Tokens(), POLICIES[name]
    layer = new_layer(policy, Format())
    layer.collecting = "bounded"
    most = 80 if name == "adakv" else 40  # all of a sequence's budget may go to one head
    places, chunk = torch.empty(2, G, 0, dtype=torch.int64), 0
    for begin, end in ((0, 70), (70, 130), (130, 141), (141, 190)):
        if begin:
            mask = compress(tokens, policy, slice(begin - chunk, begin), places)
            kept = int(mask.sum(-1).max())
            # Heads that keep fewer hold their newest tokens besides.
            for _ in range(kept):
                short = mask.sum(-1) < kept
                newest = (~mask * torch.arange(1, mask.shape[-1] + 1)).argmax(-1, keepdim=True)
                mask = mask | mask.scatter(-1, newest, True) & short.unsqueeze(-1)
            places = places[mask].view(2, G, kept)
        chunk = end - begin
        places = torch.cat((places, torch.arange(begin, end).expand(2, G, chunk)), -1)
        tokens.feed(layer, begin, end)
        assert layer.lengths.unique().tolist() == [places.shape[-1]]
        assert places.shape[-1] <= most + chunk and layer.seen == end
        assert layer.revocable == chunk
    layer.collecting = None
    layer.settle()
    mask = compress(tokens, policy, slice(141, 190), places)
    keys = ops.rope(tokens.qkv[:, :, H : H + G], tokens.cos, tokens.sin).transpose(1, 2)
    read = ops.kv_read(layer.pages)[0].view(2, G, -1, D)
    for s in range(2):
        for g in range(G):
            expected = keys[s, g, places[s, g][mask[s, g]]]
            assert torch.equal(read[s, g, : len(expected)], expected)
            assert int(layer.lengths[s, g]) == len(expected)
    assert tokens.feed(layer, 190, 195).isfinite().all()


@pytest.mark.parametrize("name", ["keep", "snapkv", "ems", "quest", "lserve"])
def test_bounded_memory_with_room_is_the_whole_prompt(name: str) -> None:
    tokens, policy = Tokens(), POLICIES[name]
    if name in ("snapkv", "ems"):
        policy = dataclasses.replace(policy, budget=200)  # type: ignore[type-var]
    whole, chunked = new_layer(policy, Format()), new_layer(policy, Format(), drafts=4)
    expected = tokens.feed(whole, 0, 130)
    chunked.collecting = "bounded"
    got = [tokens.feed(chunked, *part) for part in ((0, 60), (60, 100), (100, 134))]
    chunked.rollback(4)
    chunked.collecting = None
    chunked.settle()
    assert torch.allclose(torch.cat(got, 1)[:, :130], expected, atol=1e-5)
    assert_same(whole, chunked)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model()


def test_cache_takes_chunks_and_takes_back(model: Llama) -> None:
    prompt = torch.randint(0, 320, (1, 90), generator=torch.Generator().manual_seed(3))
    expected = list(generate(model, prompt, 12, stop=(), cache=Cache(model, 120, policy=TOVA(40))))
    cache = Cache(model, 120, policy=TOVA(40), drafts=4)
    with torch.inference_mode(), cache.prefilling():
        for chunk in prompt.split([50, 30, 10], dim=1):
            logits = model(chunk, cache)
    assert cache.length == 90 and (cache.held == 90).all()
    text = [int(logits[0, -1].argmax())]
    with torch.inference_mode():
        while len(text) < 12:
            # The right next tokens, and as many wrong ones.
            right = min(len(text) % 3, 11 - len(text))
            draft = [text[-1], *expected[len(text) : len(text) + right]]
            draft += [(x + 1) % 320 for x in expected[len(text) + right :]][: 4 - len(draft)]
            said = model(torch.tensor([draft]), cache)[0].argmax(-1).tolist()
            agreed = next((i for i, x in enumerate(draft[1:]) if x != said[i]), len(draft) - 1)
            cache.rollback(len(draft) - 1 - agreed)
            text += said[: agreed + 1]
            assert cache.length == 89 + len(text)
    assert text[:12] == expected
    assert (cache.held <= 40 + len(text)).all()


def test_refuses(model: Llama) -> None:
    tokens = torch.arange(60)[None]
    for policy in (H2O(200, 10), Recency(4, 20), SnapKV(40, window=8)):
        cache = Cache(model, 120, policy=policy)
        with torch.inference_mode():
            model(tokens, cache)
        with pytest.raises(ValueError, match="at most 0 tokens can be taken back.*got 3; make"):
            cache.rollback(3)
        with pytest.raises(ValueError, match="prefilling: an empty cache expected, got 60"):
            cache.prefilling().__enter__()
        assert cache.length == 60
    for policy, format in ((H2O(30, 10), Format()), (KeepAll(), Format(rotate="read"))):
        cache = Cache(model, 120, policy=policy, format=format)
        with pytest.raises(ValueError, match="prefilling in bounded memory: a .* expected, got"):
            cache.prefilling(bounded=True).__enter__()
    cache = Cache(model, 120, policy=SnapKV(40, window=8))
    with torch.inference_mode():
        for part in tokens.split([50, 8, 2], dim=1):
            model(part, cache)
    cache.rollback(9)
    with pytest.raises(ValueError, match="at most 1 tokens"):
        cache.rollback(2)
    with pytest.raises(ValueError, match="got -1"):
        cache.rollback(-1)
    assert cache.length == 51 and (cache.held == 41).all()
