"""A lean Llama-family decoder: Llama, Mistral, Qwen2, SmolLM2.

One layer, with ``d`` the width of the residual stream ``x``, ``h`` query and ``g`` key/value
heads of width ``e``::

    q, k, v = split(qkv(rms_norm(x)), [h e, g e, g e])      qkv      [(h + 2 g) e, d]
    x       = x + o(softmax(rope(q) rope(k)^T / sqrt(e)) v)  o        [d, h e]
    gate,up = split(gate_up(rms_norm(x)), [f, f])            gate_up  [2 f, d]
    x       = x + down(silu(gate) * up)                      down     [d, f]

Decoding one token is a chain of small calls, so the code is shaped by their number: q, k and v
are rows of one linear, gate and up of another; the residual is added inside the linear (``add``);
and norm, rotation (which also fills the cache) and gate are fused operators, which have no
gradient: where one is needed the same formulas run in plain torch. Attention has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openwork import ops
from openwork.models.config import Llama3Rope, LlamaConfig
from openwork.models.decode_plan import DecodePlan
from openwork.models.kv_cache import Attend, KVCache, LayeredCache
from openwork.models.tokenizer import Tokenizer


def _needs_gradient(x: Tensor, weight: Tensor | None = None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or (weight is not None and weight.requires_grad)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32."""
    if not _needs_gradient(x, weight):
        return ops.rms_norm(x, weight, eps)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head; element ``i`` of its first half pairs with element ``i`` of its second::

        y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

    Args:
        x: ``[b, t, heads, e]``.
        cos: ``[t, e / 2]`` float32; ``sin`` alike.

    Returns:
        ``[b, t, heads, e]``, dtype of ``x``, contiguous.
    """
    if not _needs_gradient(x):
        return ops.rope(x, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def _silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``[..., 2 f]`` holding gate, then up; returns ``[..., f]``."""
    if not _needs_gradient(gate_up):
        return ops.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# Queries up to which reading each key once for all of them beats tiling them.
_DECODE = 8

# In float32 it does for more queries if keys are many: 16 over 4096, 9 heads on 3 of 64, take 1.4
# ms and tiles 1.6; 32 heads on 8 of 128, 8.4 and 23. With bfloat16 products tiles win from 9 on.
_FEW, _KEYS_PER_QUERY = 32, 64


def dense_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float | None = None
) -> Tensor:
    """Causal attention of the last ``t`` of ``n`` positions.

    Args:
        q: ``[b, t, h, e]``.
        keys: ``[b, g, n, e]``; ``values`` alike.
        scale: of the scores; None: ``1 / sqrt(e)``.

    Returns:
        ``[b, t, h e]``.
    """
    t, n = q.shape[1], keys.shape[2]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    o: Tensor | tuple[Tensor, ...]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        o = ops.block_attention_train(q, k, v, scale=scale)
    elif t <= _DECODE or (q.dtype == torch.float32 and t <= _FEW and n >= _KEYS_PER_QUERY * t):
        o = ops.decode_attention(q, keys, values, n, scale)
    else:
        o = ops.block_attention(q, k, v, scale=scale)
    return cast(Tensor, o).flatten(2)


class Prefill(Protocol):
    """How a layer attends where there are many queries: :func:`dense_attention`, or less."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As :func:`dense_attention`, with its own scale."""


class DenseLinear(nn.Linear):
    """``x @ weight.T + bias + add``: a plain linear with the call of ``nn.LowbitLinear``."""

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x [..., k] -> [..., n]``; ``add`` has the shape of the result."""
        y = F.linear(x, self.weight, self.bias)
        return y if add is None else y.add_(add)


class Attention(nn.Module):
    """The linears of an attention block; :class:`Layer` runs them."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.heads_of(index)
        rows = (heads + 2 * config.shape_of(index).kv_heads) * config.head_dim
        self.qkv = DenseLinear(d, rows, bias=config.qkv_bias)
        self.o = DenseLinear(heads * config.head_dim, d, bias=config.output_bias)


class MLP(nn.Module):
    """The linears of a feed-forward block; :class:`Layer` runs them."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        d, f = config.hidden_size, config.shape_of(index).ffn_size
        self.gate_up = DenseLinear(d, 2 * f, bias=False)
        self.down = DenseLinear(f, d, bias=config.output_bias)


class Layer(nn.Module):
    """One decoder layer. Hooks belong on it or on its linears; nothing between is called.

    Attributes:
        prefill: attention of more than 8 queries, or of queries without a cache.
    """

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads_of(index), config.shape_of(index).kv_heads
        self.head_dim = config.head_dim
        self.eps = config.norm_eps
        self.prefill: Prefill = dense_attention
        self.attn_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.attn = Attention(config, index)
        self.mlp_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = MLP(config, index)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        start: int = 0,
        attend: Attend | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: ``[b, t, d]``.
            cos: ``[t, head_dim / 2]`` from :meth:`Llama.rope`; ``sin`` alike.
            keys: ``[b, kv_heads, max_len, head_dim]``, this layer's cache, which takes up the
                tokens of ``x``; ``values`` alike. None: attend within ``x``.
            start: tokens the cache holds before these.
            attend: attends in place of all that, with keys and values of its own.

        Returns:
            ``[b, t, d]``.
        """
        b, t, _ = x.shape
        h, g, e = self.heads, self.kv_heads, self.head_dim
        # Looked up where nn.Module keeps them: its __getattr__ takes 0.6 us, and there would be
        # eight of them, together longer than both norms.
        weights: Any = self._parameters
        attn: Any = self._modules["attn"]._modules  # type: ignore[union-attr]
        mlp: Any = self._modules["mlp"]._modules  # type: ignore[union-attr]

        qkv = attn["qkv"](_rms_norm(x, weights["attn_norm"], self.eps)).view(b, t, h + 2 * g, e)
        if attend is not None:
            y = attend(qkv, cos, sin)
        elif keys is None or values is None:
            qk = _rope(qkv.narrow(2, 0, h + g), cos, sin)
            q, keys, values = qk.narrow(2, 0, h), qk.narrow(2, h, g), qkv.narrow(2, h + g, g)
            y = self.prefill(q, keys.transpose(1, 2), values.transpose(1, 2))
        else:
            q = ops.rope_append(qkv, cos, sin, keys, values, start)
            if t <= _DECODE:
                y = ops.decode_attention(q, keys, values, start + t).view(b, t, h * e)
            else:
                y = self.prefill(q, keys[:, :, : start + t], values[:, :, : start + t])
        x = attn["o"](y, add=x)
        gate_up = mlp["gate_up"](_rms_norm(x, weights["mlp_norm"], self.eps))
        return cast(Tensor, mlp["down"](_silu_mul(gate_up), add=x))


class Llama(nn.Module):
    """A decoder of the Llama family.

    Attributes:
        config: the :class:`LlamaConfig`.
        tokenizer: the :class:`~openwork.models.tokenizer.Tokenizer` found beside the weights, or
            None.
        embed, layers, norm, head: embedding, layers, weight of the final norm, and output head.

    Example:
        >>> import torch
        >>> from openwork.models import Llama, LlamaConfig
        >>> config = LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                      heads=4, kv_heads=2, head_dim=8, context_length=128)
        >>> model = Llama(config)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = DenseLinear(config.hidden_size, config.vocab_size, bias=False)
        self._cos, self._sin = torch.empty(0), torch.empty(0)
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head share the embedding's weight, where the configuration says so."""
        if self.config.tied_head:
            self.head.weight = self.embed.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.norm.dtype

    def new_cache(self, max_len: int, batch: int = 1) -> KVCache:
        """An empty :class:`KVCache` for ``batch`` sequences of up to ``max_len`` tokens."""
        return KVCache(self.config, max_len, batch, self.dtype)

    def rope(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of ``position * frequency``, each ``[length, head_dim / 2]`` float32.

        Raises:
            ValueError: a position past the model's context.
        """
        end, context = start + length, self.config.context_length
        if end > context:
            raise ValueError(
                f"Llama: positions below context_length = {context} expected, got {end}"
            )
        if end > len(self._cos):
            # Grown by doubling: contexts of 131072 would make the whole table 64 MB.
            rows = min(max(end, 2 * len(self._cos), 1024), context)
            with torch.inference_mode(False):
                angles = torch.outer(torch.arange(rows).float(), rope_frequencies(self.config))
                self._cos, self._sin = angles.cos(), angles.sin()
        return self._cos[start:end], self._sin[start:end]

    def hidden(self, tokens: Tensor, cache: KVCache | LayeredCache | None = None) -> Tensor:
        """Everything but the head: ``tokens [b, t] -> [b, t, d]`` after the final norm.

        With a cache, the tokens follow those it holds, and it holds them too afterwards.

        Raises:
            ValueError: tokens that are not ``[b, t]`` int64, a full cache or one of another
                batch, or a position past the model's context.
        """
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
            raise ValueError(
                f"Llama: tokens [batch, length > 0] int64 expected, got {list(tokens.shape)} "
                f"{tokens.dtype}"
            )
        t = tokens.shape[1]
        start = 0 if cache is None else cache.length
        cos, sin = self.rope(0 if cache is None else cache.position, t)
        x = self.embed(tokens)
        if cache is None:
            for layer in self.layers:
                x = layer(x, cos, sin)
        else:
            cache.reserve(*tokens.shape)
            x = self._layers(x, cos, sin, cache)
            cache.length = start + t
        return _rms_norm(x, self.norm, self.config.norm_eps)

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | LayeredCache) -> Tensor:
        if not isinstance(cache, KVCache):
            for layer, attend in zip(self.layers, cache.attend, strict=True):
                x = layer(x, cos, sin, attend=attend)
            return x
        start = cache.length
        if cache.plan is None or start == 0 or cache.plan.layers is not self.layers:
            cache.plan = DecodePlan(self.layers)
        plan = cache.plan
        if x.shape[1] <= _DECODE and plan.usable and not torch.is_grad_enabled():
            return ops.decoder_layers(
                x, cos, sin, cache.keys, cache.values, start, plan.weights, plan.linears,
                plan.heads, self.config.norm_eps,
            )  # fmt: skip
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, cos, sin, keys, values, start)
        return x

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | LayeredCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Next-token logits.

        Args:
            tokens: ``[b, t]`` int64.
            cache: holds the tokens before these, and takes these up; None for none before.
            last_only: only the logits after the last token.

        Returns:
            ``[b, t, vocab]``, or ``[b, 1, vocab]`` with ``last_only``, in the model's dtype.

        Raises:
            ValueError: see :meth:`hidden`.
        """
        x = self.hidden(tokens, cache)
        y: Tensor = self.head(x[:, -1:] if last_only and x.shape[1] > 1 else x)
        return y

    def linears(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The linears of the layers in the order they run: ``(name, parent, attribute)``.

        ``getattr(parent, attribute)`` is the linear named ``name``, such as
        ``"layers.3.attn.qkv"``; set it to replace the linear. The head is not among them.
        """
        for i, layer in enumerate(self.layers):
            for block, attribute in (
                ("attn", "qkv"), ("attn", "o"), ("mlp", "gate_up"), ("mlp", "down")
            ):  # fmt: skip
                yield f"layers.{i}.{block}.{attribute}", getattr(layer, block), attribute


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """``theta ** (-2 i / head_dim)`` for ``i < head_dim / 2``, stretched as the model asks.

    Returns:
        ``[head_dim / 2]`` float32, in radians a position.
    """
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3Rope):
        return frequencies / torch.tensor(scaling)
    turns = scaling.original_length * frequencies / (2 * torch.pi)
    s = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return frequencies * (s + (1 - s) / scaling.factor)
