"""Hugging Face models with openwork's attention and caches, against their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.checkpoints import write_directory
from torch import Tensor

import openwork
from openwork.attention import AShape, lambda_density
from openwork.errors import DownloadError
from openwork.kvcache import H2O, AdaKV, Cache, Format, KeepAll, Policy, Recency, SnapKV
from openwork.models.demo import fetch_model

transformers = pytest.importorskip("transformers")

from openwork.integrations.transformers import PagedCache, use_block_attention  # noqa: E402

pytestmark = pytest.mark.hf
TOKENS = torch.randint(0, 96, (2, 120), generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def random_model(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(1)
    # Of families with several kinds of input, the text alone.
    of_text = getattr(transformers, f"{kind}TextConfig", None)
    config = (of_text or getattr(transformers, f"{kind}Config"))(**(SIZES | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.normal_(0, 0.2)
    return model


def chunked(model: Any, cache: Any, chunks: list[int]) -> Tensor:
    with torch.inference_mode():
        parts = TOKENS[:, : sum(chunks)].split(chunks, dim=1)
        return torch.cat([model(part, cache=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_equals_its_own_attention(kind: str) -> None:
    changes = {"sliding_window": 30} if kind == "Mistral" else {}
    model = random_model(kind, **changes)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        use_block_attention(model)
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-5)
    own = chunked(model, transformers.DynamicCache(config=model.config), [50, 1, 1, 20, 3])
    assert torch.allclose(own, expected[:, :75], atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [KeepAll(), SnapKV(120), AdaKV(SnapKV(120)), H2O(100, 20), Recency(4, 116)],
    ids=lambda policy: type(policy).__name__,
)
def test_a_budget_for_everything_is_dense(policy: Policy) -> None:
    model = random_model()
    with torch.inference_mode():
        expected = model(TOKENS).logits
    use_block_attention(model)
    cache = PagedCache(model, 120, batch=2, policy=policy)
    assert torch.allclose(chunked(model, cache, [90, 1, 8, 20, 1]), expected, atol=1e-5)
    assert cache.get_seq_length() == 120


def test_policy_at_full_density_is_dense_and_below_it_is_not() -> None:
    model = random_model()
    with torch.inference_mode():
        expected = model(TOKENS).logits
        report = use_block_attention(model, AShape(8, 120), crossover=0)
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-5)
        assert report.density == 1
        report = use_block_attention(model, AShape(4, 16), crossover=0)
        assert not torch.allclose(model(TOKENS).logits, expected, atol=1e-3)
        assert report.density == pytest.approx(lambda_density(120, 120, 4, 16))
        assert [len(layer) for layer in report.densities] == [1, 1]


def test_generates_the_same_and_holds_less() -> None:
    model = random_model()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS[:1, :60]
    options["attention_mask"] = torch.ones_like(prompt)
    with torch.inference_mode():
        expected = model.generate(prompt, **options)
        use_block_attention(model)
        whole = PagedCache(model, 80, page_size=32)
        assert torch.equal(model.generate(prompt, cache=whole, **options), expected)
        small = PagedCache(model, 80, policy=SnapKV(24, window=8), page_size=32)
        model.generate(prompt, cache=small, **options)
    assert small.layers[0].cache.lengths.tolist() == [[35, 35]]
    assert small.nbytes < whole.nbytes


def test_gradients_flow() -> None:
    model = random_model()
    expected = model(TOKENS[:1, :20]).logits
    use_block_attention(model)
    model.model.embed_tokens.weight.requires_grad_(True)
    logits = model(TOKENS[:1, :20]).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def test_refuses() -> None:
    model = random_model()
    cache = PagedCache(model, 120, batch=2)
    with pytest.raises(ValueError, match=r'by "openwork_block" expected, got "sdpa"'):
        chunked(model, cache, [8])
    use_block_attention(model)
    with pytest.raises(ValueError, match="room for 120 tokens needed, got max_len = 100"):
        chunked(model, PagedCache(model, 100, batch=2), [120])
    with pytest.raises(ValueError, match='"stored" expected, as keys come rotated, got "read"'):
        PagedCache(model, 100, format=Format(rotate="read"))
    with pytest.raises(
        ValueError, match="2 sequences expected .its batch, beams among them., got 1"
    ):
        model(TOKENS[:1], cache=cache)
    mask = torch.ones_like(TOKENS)
    mask[0, -3:] = 0
    with torch.inference_mode(), pytest.raises(ValueError, match="padding on the left expected"):
        model(TOKENS, attention_mask=mask)
    cache = PagedCache(model, 120, batch=2)
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="memory that is not bounded"),
        cache.prefilling(bounded=True),
    ):
        model(TOKENS, attention_mask=mask.flip(1), cache=cache)
    cache = PagedCache(model, 120, batch=2, policy=H2O(20, 10))
    with torch.inference_mode():
        model(TOKENS[:, :50], cache=cache)
    with pytest.raises(ValueError, match="at most 0 tokens can be taken back"):
        cache.crop(-1)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(
        ValueError, match="full or sliding attention expected, got full_attention, l"
    ):
        PagedCache(model, 100)


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_model(tmp_path: Path) -> None:
    """Both libraries run it, with the same policy, and say the same."""
    try:
        own = openwork.load(fetch_model(progress=False))
    except (DownloadError, OSError) as error:
        pytest.skip(f"the model cannot be had: {error}")
    model = transformers.AutoModelForCausalLM.from_pretrained(write_directory(own, tmp_path))
    assert own.tokenizer is not None
    tokens = torch.tensor([own.tokenizer.encode(openwork.__doc__ or "") * 20])[:, :400]
    with torch.inference_mode():
        expected = model(tokens).logits
        use_block_attention(model)
        error = (model(tokens).logits - expected).abs().max() / expected.abs().max()
        assert error < 1e-4  # 30 layers of fp32 sums in another order
        policy = SnapKV(64)
        said = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False,
            pad_token_id=0, eos_token_id=None, cache=PagedCache(model, 420, policy=policy),
        )[0, 400:]  # fmt: skip
    cache = Cache(own, 420, policy=policy)
    assert said.tolist() == list(openwork.generate(own, tokens[0], 16, stop=(), cache=cache))
