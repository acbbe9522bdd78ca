"""What serving asks of Hugging Face models: padding, beams, guesses, chunks, sliding windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from openwork.kvcache import (
    EMS,
    H2O,
    AdaKV,
    Format,
    KeepAll,
    MixedPrecision,
    Policy,
    Quest,
    Razor,
    Recency,
    SnapKV,
    kivi,
)

transformers = pytest.importorskip("transformers")

from openwork.attention import AShape  # noqa: E402
from openwork.integrations.transformers import PagedCache, use_block_attention  # noqa: E402

from .test_transformers import TOKENS, random_model  # noqa: E402

pytestmark = pytest.mark.hf
PADS = [0, 17, 41]
SOME = torch.tensor([[True, False], [False, True]])
GREEDY: dict[str, Any] = {
    "max_new_tokens": 14,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
# Windows of which prompts of 60 tokens are longer, in some layers or in all.
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 30}),
    "qwen2": ("Qwen2", {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 30,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def sliding_model(name: str) -> Any:
    kind, changes = SLIDING[name]
    return random_model(kind, **changes)


def padded() -> tuple[Tensor, Tensor]:
    """Sequences with padding on the left, and their mask."""
    tokens = TOKENS[:1, :60].repeat(len(PADS), 1)
    mask = torch.ones_like(tokens)
    for row, pads in enumerate(PADS):
        tokens[row, :pads], mask[row, :pads] = 0, 0
    return tokens, mask


def run(model: Any, tokens: Tensor, cache: Any, steps: list[int], mask: Tensor | None) -> Tensor:
    """Logits of a prompt and of steps that go on with known tokens."""
    after = TOKENS[1, : sum(steps)].repeat(len(tokens), 1)
    parts, begin = [], 0
    for part in (tokens, *after.split(steps, dim=1)):
        begin += part.shape[1]
        options: dict[str, Any] = {}
        if mask is not None:
            seen = torch.nn.functional.pad(mask, (0, begin - tokens.shape[1]), value=1)
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, begin - part.shape[1] :]
            options = {"attention_mask": seen, "position_ids": positions}
        parts.append(model(part, cache=cache, use_cache=True, **options).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows(name: str) -> None:
    model = sliding_model(name)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        said = model.generate(TOKENS[:, :60], attention_mask=torch.ones(2, 60), **GREEDY)
        use_block_attention(model)
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-4)
        for cache in (None, PagedCache(model, 74, batch=2)):
            own = model.generate(
                TOKENS[:, :60], attention_mask=torch.ones(2, 60), cache=cache, **GREEDY
            )
            assert torch.equal(own, said)
        # Chunks that end inside and outside of the first window, and more than 8 at once.
        cache = PagedCache(model, 120, batch=2)
        parts = TOKENS.split([20, 5, 9, 40, 1, 8, 37], dim=1)
        logits = [model(part, cache=cache, use_cache=True).logits for part in parts]
        assert torch.allclose(torch.cat(logits, 1), expected, atol=1e-4)
        assert cache.get_seq_length() == 120
        held = [x.keys.shape[2] for x in cache.layers if getattr(x, "is_sliding", False)]
        assert held == [29] * (2 if name == "mistral" else 1)


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_have_gradients(name: str) -> None:
    model = sliding_model(name)
    gradients = []
    for _ in range(2):
        model.model.embed_tokens.weight.requires_grad_(True).grad = None
        model(TOKENS[:1, :70]).logits.square().mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
        use_block_attention(model)
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[0].abs().max()))


@pytest.mark.parametrize(
    ("policy", "format"),
    [
        (None, Format()),
        (KeepAll(), Format()),
        (SnapKV(20, window=8), Format()),
        (AdaKV(SnapKV(15, window=4)), Format()),
        (EMS(18, window=8), Format()),
        (Recency(2, 18), Format()),
        (Quest(64, dense_layers=0), Format()),
        (H2O(12, 8), Format()),
        (Razor(SOME, 2, 18), Format()),
        (MixedPrecision(SnapKV(20, window=8), Format()), Format()),
        (KeepAll(), Format(exact_first=4)),
        # More than the shortest sequence has: that is held whole.
        (SnapKV(12, window=8), Format(exact_first=25)),
        (H2O(12, 8), Format(exact_first=4)),
        (Razor(SOME, 2, 18), Format(exact_first=2)),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, Format) else f"{x.exact_first}",
)
def test_padded_sequences_are_as_if_alone(policy: Policy | None, format: Format) -> None:
    model = random_model()
    use_block_attention(model)
    tokens, mask = padded()

    def cache(batch: int) -> Any:
        if policy is None:
            return transformers.DynamicCache(config=model.config)
        return PagedCache(model, 120, batch=batch, policy=policy, format=format, page_size=32)

    steps = [1, 3, 12, 1, 1]
    together = cache(len(PADS))
    with torch.inference_mode():
        logits = run(model, tokens, together, steps, mask)
        for row, pads in enumerate(PADS):
            alone = cache(1)
            expected = run(model, tokens[row : row + 1, pads:], alone, steps, None)
            assert torch.allclose(logits[row, pads:], expected[0], atol=1e-4)
            if policy is not None:
                held = zip(together.layers, alone.layers, strict=True)
                assert all(torch.equal(a.cache.lengths[row], b.cache.lengths[0]) for a, b in held)


@pytest.mark.parametrize("drafts", [0, 32])
@pytest.mark.parametrize("format", [Format(), Format(exact_first=30)], ids=["pages", "first"])
def test_padded_sequences_are_taken_back_alike(format: Format, drafts: int) -> None:
    """Also out of first tokens, of which the shortest sequence has fewer than the others."""
    model = random_model()
    use_block_attention(model)
    tokens, mask = padded()
    caches = [
        PagedCache(model, 120, batch=len(PADS), format=format, drafts=drafts) for _ in range(2)
    ]
    wrong = torch.cat((tokens[:, :50], tokens[:, 50:].flip(1)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits_of(cache: Any, tokens: Tensor, begin: int, end: int) -> Tensor:
        part = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        logits: Tensor = model(tokens[:, begin:end], cache=cache, **part).logits
        return logits

    with torch.inference_mode():
        logits_of(caches[0], wrong, 0, 60)
        caches[0].crop(-10)
        assert caches[0].layers[0].cache.lengths.tolist() == [[50] * 2, [33] * 2, [9] * 2]
        logits_of(caches[1], tokens, 0, 50)
        logits = [logits_of(cache, tokens, 50, 60) for cache in caches]
    assert torch.allclose(*logits, atol=1e-5)
    lengths = [cache.layers[1].cache.lengths.tolist() for cache in caches]
    assert lengths[0] == lengths[1] == [[60] * 2, [43] * 2, [19] * 2]


@pytest.mark.parametrize("name", [*SLIDING, "policy"])
def test_padding_with_windows_and_policies(name: str) -> None:
    model = random_model() if name == "policy" else sliding_model(name)
    tokens, mask = padded()
    steps = [1, 3, 12, 1]
    own = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        expected = run(model, tokens, own, steps, mask)
        use_block_attention(model, AShape(4, 200) if name == "policy" else None, crossover=0)
        for cache in (
            transformers.DynamicCache(config=model.config),
            PagedCache(model, 120, batch=len(PADS)),
        ):
            logits = run(model, tokens, cache, steps, mask)
            for row, pads in enumerate(PADS):
                assert torch.allclose(logits[row, pads:], expected[row, pads:], atol=1e-4)


def test_generates_padded() -> None:
    model = random_model()
    tokens, mask = padded()
    with torch.inference_mode():
        expected = model.generate(tokens, attention_mask=mask, **GREEDY)
        use_block_attention(model)
        cache = PagedCache(model, 80, batch=len(PADS))
        assert torch.equal(
            model.generate(tokens, attention_mask=mask, cache=cache, **GREEDY), expected
        )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams(name: str) -> None:
    model = random_model() if name == "llama" else sliding_model(name)
    options = GREEDY | {"num_beams": 3, "attention_mask": torch.ones(2, 60)}
    with torch.inference_mode():
        expected = model.generate(TOKENS[:, :60], **options)
        use_block_attention(model)
        cache = PagedCache(model, 80, batch=6, page_size=32)
        assert torch.equal(model.generate(TOKENS[:, :60], cache=cache, **options), expected)


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(20, window=8),
        H2O(20, 10),
        Recency(2, 18),
        Razor(SOME, 2, 18),
        Quest(64, dense_layers=0),
        MixedPrecision(SnapKV(20, window=8)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_reordered_caches_go_on_as_their_origins(policy: Policy) -> None:
    """Also with quantized pages, and with tokens that may be taken back."""
    model = random_model()
    use_block_attention(model)
    order = torch.tensor([2, 0, 2])
    tokens = torch.stack([TOKENS[0, :60], TOKENS[1, :60], TOKENS[0, 60:]])
    after = torch.stack([TOKENS[1, 60:], TOKENS[0, 60:], TOKENS[1, 60:]])
    for options in ({}, {"format": kivi(4, residual=32)}, {"drafts": 4}):
        caches = [
            PagedCache(model, 130, batch=3, policy=policy, page_size=32, **options)
            for _ in range(2)
        ]
        with torch.inference_mode():
            for cache, begin in zip(caches, (tokens, tokens[order]), strict=True):
                model(begin, cache=cache)
                model(begin[:, :3], cache=cache)
            caches[0].reorder_cache(order)
            for part in after.split([1, 12, 1, 46], dim=1):
                a, b = (model(part, cache=cache).logits for cache in caches)
                # A product may depend on its row's place in the batch, and a code on that.
                assert torch.allclose(a, b, atol=0.1 if "format" in options else 1e-4)
                order2 = torch.tensor([1, 1, 0])
                for cache in caches:
                    cache.reorder_cache(order2)
            held = (cache.layers[0].pages.allocated_pages for cache in caches)
            assert len({*held}) == 1


def test_beams_share_pages_until_they_fork() -> None:
    model = random_model()
    use_block_attention(model)
    cache = PagedCache(model, 120, batch=2, page_size=32)
    with torch.inference_mode():
        model(TOKENS[:, :100], cache=cache)
        pages = cache.layers[0].pages
        assert pages.allocated_pages == 2 * 2 * 4
        cache.reorder_cache(torch.tensor([1, 1]))
        assert pages.allocated_pages == 2 * 4
        model(TOKENS[:, 100:101], cache=cache)
        assert pages.allocated_pages == 2 * (3 + 2)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(
    "policy",
    [KeepAll(), SnapKV(30, window=8), AdaKV(SnapKV(20, window=8)), EMS(20, window=8)],
    ids=lambda policy: type(policy).__name__,
)
def test_assisted_generation_is_greedy(name: str, policy: Policy) -> None:
    model = random_model() if name == "llama" else sliding_model(name)
    # An assistant that is often right: the model itself, and one that is often wrong.
    noisy = random_model() if name == "llama" else sliding_model(name)
    noisy.lm_head.weight.add_(0.1 * torch.randn_like(noisy.lm_head.weight))
    for one in (model, noisy):
        use_block_attention(one)
    prompt = TOKENS[:1, :60].clamp(min=1)  # 0 would be taken for padding
    options = GREEDY | {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24}
    with torch.inference_mode():
        cache = PagedCache(model, 100, policy=policy, page_size=32)
        expected = model.generate(prompt, cache=cache, **options)
        for guesses in (
            {"assistant_model": noisy},
            {"prompt_lookup_num_tokens": 5},
        ):
            cache = PagedCache(model, 100, policy=policy, page_size=32, drafts=32)
            assert torch.equal(model.generate(prompt, cache=cache, **guesses, **options), expected)
            assert cache.get_seq_length() <= 60 + 24


def test_assisted_generation_needs_drafts() -> None:
    model = random_model()
    use_block_attention(model)
    cache = PagedCache(model, 100)
    with pytest.raises(ValueError, match="cache that can be cropped"):
        model.generate(
            TOKENS[:1, :60].clamp(min=1), cache=cache, prompt_lookup_num_tokens=5, **GREEDY
        )


@pytest.mark.parametrize("policy", [SnapKV(20, window=8), H2O(20, 10), EMS(18, window=8)])
def test_prompts_in_chunks(policy: Policy) -> None:
    model = random_model()
    use_block_attention(model)
    whole, chunked = (PagedCache(model, 120, batch=2, policy=policy) for _ in range(2))
    with torch.inference_mode():
        expected = model(TOKENS[:, :90], cache=whole).logits
        with chunked.prefilling():
            parts = TOKENS[:, :90].split([30, 3, 50, 7], dim=1)
            logits = torch.cat([model(part, cache=chunked).logits for part in parts], 1)
        assert torch.allclose(logits, expected, atol=1e-5)
        a, b = (model(TOKENS[:, 90:], cache=cache).logits for cache in (whole, chunked))
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(whole.layers[1].cache.lengths, chunked.layers[1].cache.lengths)


def test_generates_after_chunks() -> None:
    """``generate`` goes on from a prompt of which the cache lacks the last token."""
    model = random_model()
    use_block_attention(model)
    prompt, mask = TOKENS[:, :60], torch.ones(2, 60)
    policy = SnapKV(60, window=8)
    with torch.inference_mode():
        expected = model.generate(
            prompt, attention_mask=mask, cache=PagedCache(model, 80, batch=2), **GREEDY
        )
        cache = PagedCache(model, 80, batch=2, policy=policy)
        with cache.prefilling():
            for part in prompt[:, :59].split(25, dim=1):
                model(part, cache=cache)
        said = model.generate(prompt, attention_mask=mask, cache=cache, **GREEDY)
    assert torch.equal(said, expected)
