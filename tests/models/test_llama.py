"""The decoder against a reference written out in loops, with and without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from kvcache.prompts import probabilities
from torch import Tensor

from openwork.models import DenseLinear, Llama, Llama3Rope
from openwork.models.llama import dense_attention, rope_frequencies

from .checkpoints import QWEN, random_model


def random_tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(model: Llama, tokens: Tensor) -> Tensor:
    """One sequence ``[t] -> [t, vocab]`` in float64: a head and a query at a time."""
    c = model.config
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    t, e, pairs = len(tokens), c.head_dim, c.head_dim // 2

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rotate(x: Tensor, position: int) -> Tensor:
        y = torch.empty_like(x)
        for i in range(pairs):
            angle = position * c.rope_theta ** (-i / pairs)
            y[i] = x[i] * math.cos(angle) - x[i + pairs] * math.sin(angle)
            y[i + pairs] = x[i + pairs] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    x = state["embed.weight"][tokens]
    for i in range(c.layers):
        own = {n.removeprefix(f"layers.{i}."): w for n, w in state.items() if f"layers.{i}." in n}
        qkv = norm(x, own["attn_norm"]) @ own["attn.qkv.weight"].T
        if c.qkv_bias:
            qkv = qkv + own["attn.qkv.bias"]
        heads = qkv.view(t, -1, e).unbind(1)
        outputs = []
        for h in range(c.heads):
            group = h // (c.heads // c.kv_heads)
            keys = [rotate(k, p) for p, k in enumerate(heads[c.heads + group])]
            values = heads[c.heads + c.kv_heads + group]
            rows = []
            for p in range(t):
                q = rotate(heads[h][p], p)
                scores = torch.stack([q @ k / math.sqrt(e) for k in keys[: p + 1]])
                rows.append(scores.softmax(0) @ values[: p + 1])
            outputs.append(torch.stack(rows))
        x = x + torch.cat(outputs, -1) @ own["attn.o.weight"].T
        gate, up = (norm(x, own["mlp_norm"]) @ own["mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ own["mlp.down.weight"].T
    head = state["embed.weight" if c.tied_head else "head.weight"]
    return norm(x, state["norm"]) @ head.T


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding: a few hundred roundings of at most 6e-8 each."""
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < 3e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        QWEN,
        {"kv_heads": 6},
        {"kv_heads": 1},
        {"head_dim": 10},
    ],
    ids=str,
)
def test_matches_the_reference(changes: dict[str, object]) -> None:
    model = random_model(**changes)
    tokens = random_tokens(9)
    assert_close(model(tokens)[0], reference_logits(model, tokens[0]))


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11], [11, 1]], ids=str)
def test_cache_changes_nothing(tiny: Llama, chunks: list[int]) -> None:
    tokens = random_tokens(12, batch=2)
    cache = tiny.new_cache(12, batch=2)
    logits = [tiny(chunk, cache) for chunk in tokens.split(chunks, dim=1)]
    assert cache.length == 12
    assert_close(torch.cat(logits, dim=1), tiny(tokens))


def test_unused_cache_is_never_read(tiny: Llama) -> None:
    tokens = random_tokens(6)
    cache = tiny.new_cache(50)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(math.nan)
    assert tiny(tokens[:, :4], cache).isfinite().all()
    assert tiny(tokens[:, 4:5], cache).isfinite().all()


def test_shortened_cache_forgets(tiny: Llama) -> None:
    tokens = random_tokens(8)
    cache = tiny.new_cache(8)
    tiny(tokens[:, :4], cache)
    tiny(random_tokens(3, seed=1), cache)
    cache.length = 4
    assert_close(tiny(tokens[:, 4:], cache), tiny(tokens)[:, 4:])


def test_cache_serves_inside_and_outside_inference_mode(tiny: Llama) -> None:
    tokens = random_tokens(3)
    with torch.inference_mode():
        cache = tiny.new_cache(3)
        tiny(tokens[:, :2], cache)
    assert_close(tiny(tokens[:, 2:], cache), tiny(tokens)[:, 2:])


def test_last_only(tiny: Llama) -> None:
    tokens = random_tokens(7, batch=3)
    logits = tiny(tokens, last_only=True)
    assert logits.shape == (3, 1, 320)
    assert_close(logits, tiny(tokens)[:, -1:])


def test_rope_table_grows(tiny: Llama) -> None:
    model = random_model()
    short = model.rope(0, 3)[0].clone()
    cos, sin = model.rope(1500, 20)
    exact = torch.outer(torch.arange(1500, 1520).double(), rope_frequencies(model.config).double())
    # float32 positions of 1500 rad are exact to 1500 * 6e-8.
    assert torch.allclose(cos.double(), exact.cos(), atol=2e-4)
    assert torch.allclose(sin.double(), exact.sin(), atol=2e-4)
    assert torch.equal(model.rope(0, 3)[0], short)


def test_llama3_frequencies_leave_fast_ones_and_slow_down_slow_ones() -> None:
    scaling = Llama3Rope(factor=8.0, low=1.0, high=4.0, original_length=512)
    plain = rope_frequencies(random_model().config)
    scaled = rope_frequencies(random_model(rope_scaling=scaling).config)
    turns = 512 * plain / (2 * math.pi)
    assert (turns > 4).any() and (turns < 1).any()
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    assert torch.allclose(scaled[turns < 1], plain[turns < 1] / 8)
    divisors = tuple((plain / scaled).tolist())
    again = rope_frequencies(random_model(rope_scaling=divisors).config)
    assert torch.allclose(again, scaled, rtol=1e-6)


def test_bfloat16_stays_near_float32(tiny: Llama) -> None:
    tokens = random_tokens(10)
    low = random_model().bfloat16()
    logits = low(tokens)
    assert logits.dtype == low.dtype == torch.bfloat16
    cached = low(tokens, low.new_cache(10))
    error = (logits.float() - tiny(tokens)).abs().max() / tiny(tokens).abs().max()
    assert error < 0.1  # 2 layers of 8-bit mantissas, 4e-3 each; a wrong dtype somewhere gives 1
    assert torch.equal(cached, logits)


def test_linears_are_listed_in_order_and_can_be_replaced() -> None:
    model = random_model()
    listed = list(model.linears())
    assert [name for name, _, _ in listed] == [
        f"layers.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.o", "mlp.gate_up", "mlp.down")
    ]
    calls = []

    class Spy(DenseLinear):
        def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
            calls.append((x.shape[-1], add is not None))
            return super().forward(x, add)

    tokens = random_tokens(4)
    expected = model(tokens)
    for name, parent, attribute in listed:
        linear = getattr(parent, attribute)
        assert model.get_submodule(name) is linear
        spy = Spy(linear.in_features, linear.out_features, bias=False)
        spy.weight = linear.weight
        setattr(parent, attribute, spy)
    assert torch.equal(model(tokens), expected)
    assert calls == [(64, False), (96, True), (64, False), (96, True)] * 2


def test_prefill_of_any_split(tiny: Llama) -> None:
    """By tiles, and where queries are few by reading each key once."""
    tokens = random_tokens(140)
    expected = reference_logits(tiny, tokens[0])
    for chunks in ([140], [1, 139], [128, 2, 10], [100, 9, 31]):
        cache = tiny.new_cache(140)
        logits = [tiny(chunk, cache) for chunk in tokens.split(chunks, dim=1)]
        assert_close(torch.cat(logits, dim=1)[0], expected)


@pytest.mark.parametrize(("t", "n"), [(1, 1), (8, 8), (9, 9), (12, 800), (32, 2048), (33, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention(t: int, n: int, dtype: torch.dtype) -> None:
    """Whichever operator serves the sizes, with a gradient and without, strided as in a cache."""
    q = torch.randn(2, t, 6, 16).to(dtype)
    keys, values = torch.randn(2, 2, 2, n + 5, 16).to(dtype)[:, :, :, :n].unbind()
    p = probabilities(q, keys, 0.3)
    expected = (p @ values.repeat_interleave(3, 1).double()).transpose(1, 2).flatten(2)
    bound = 1e-6 if dtype == torch.float32 else 0.02  # of 8-bit mantissas, twice
    o = dense_attention(q, keys, values, scale=0.3)
    assert o.dtype == dtype and (o.double() - expected).abs().max() < bound
    with_gradient = dense_attention(q.requires_grad_(), keys, values, scale=0.3)
    assert (with_gradient.double() - expected).abs().max() < bound
    with_gradient.sum().backward()


def test_gradients_reach_every_parameter() -> None:
    model = random_model().requires_grad_(True)
    model(random_tokens(5)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"\[batch, length > 0\] int64 expected, got \[3\]"),
        (torch.zeros(1, 3), r"int64 expected, got \[1, 3\] torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), r"got \[1, 0\]"),
        (torch.zeros(1, 2049, dtype=torch.int64), "context_length = 2048 expected, got 2049"),
    ],
    ids=["rank", "dtype", "empty", "context"],
)
def test_rejects_tokens(tiny: Llama, tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tokens)


def test_rejects_more_than_the_cache_holds(tiny: Llama) -> None:
    cache = tiny.new_cache(3)
    tiny(random_tokens(2), cache)
    with pytest.raises(ValueError, match="room for 4 tokens needed, got max_len = 3"):
        tiny(random_tokens(2), cache)
    assert cache.length == 2
    with pytest.raises(ValueError, match="1 sequences expected .its batch., got 2"):
        tiny(random_tokens(1, batch=2), cache)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        tiny.new_cache(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kv_heads": 4}, "heads must be a multiple of kv_heads = 4, got 6"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"rope_theta": math.inf}, "rope_theta must be positive and finite, got inf"),
        ({"rope_scaling": (1.0,)}, "head_dim / 2 = 8 divisors, got 1"),
        ({"rope_scaling": (0.0,) * 8}, "divisor must be positive and finite, got 0"),
        ({"rope_scaling": Llama3Rope(8.0, 4.0, 4.0, 512)}, "must be positive and finite, got 0"),
    ],
    ids=str,
)
def test_rejects_senseless_configurations(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(**change)
