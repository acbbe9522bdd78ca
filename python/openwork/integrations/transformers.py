"""Sparse attention and compressed caches for Hugging Face models.

By their own extension points: an attention function and its mask, registered as
``"openwork_block"``, and a ``Cache``. A cache hands the new keys and values back marked with the
layer they belong to, and the attention function, which gets them next, lets that layer attend::

    key, value = cache.update(key, value, layer)     takes note, stores nothing yet
    attention(module, query, key, value, mask)       -> the layer's pages, and their policy

Needs the ``hf`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from openwork import ops
from openwork.attention import Policy, Report
from openwork.attention.enable import Prefill
from openwork.kvcache import Format, KeepAll, LayerCache
from openwork.kvcache import Policy as CachePolicy
from openwork.models.llama import dense_attention

NAME = "openwork_block"

# Queries up to which a decoding operator serves better than one that tiles them.
_DECODE = 8

# The prefill of each attention module; those of models that are gone go too.
_PREFILLS: WeakKeyDictionary[nn.Module, Prefill] = WeakKeyDictionary()


def use_block_attention(
    model: PreTrainedModel, policy: Policy | None = None, *, crossover: int = 2048
) -> Report:
    """Let a model attend by openwork's kernels, and by a policy in long prompts.

    Args:
        model: any decoder whose attention goes through ``AttentionInterface``.
        policy: of prompts; None attends densely.
        crossover: keys below which attention is dense, see
            :func:`openwork.attention.enable`.

    Returns:
        The report that the model's calls add to.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from openwork.attention import AShape
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1,
        ...     intermediate_size=48, num_attention_heads=4, num_key_value_heads=2))
        >>> report = use_block_attention(model, AShape(sinks=4, window=16), crossover=0)
        >>> with torch.inference_mode():
        ...     logits = model(torch.arange(64)[None]).logits
        >>> round(report.density, 3)
        0.524
    """
    report = Report(crossover, model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index is not None:
            _PREFILLS.pop(module, None)
            if policy is not None:
                _PREFILLS[module] = Prefill(policy, index, report)
    model.set_attn_implementation(NAME)
    return report


class PagedCache(transformers.Cache):
    """A compressed cache for ``generate`` and ``forward`` of a model.

    Args:
        model: after :func:`use_block_attention`.
        max_len: tokens it can see; memory is taken for those that are held.
        batch: sequences, all of one length.
        format: how keys and values are stored; the keys come rotated, so ``rotate`` must be
            "stored".
        policy: which tokens are kept and read.
        page_size: tokens of a page: 32, 64 or 128.

    Raises:
        ValueError: a model that attends by something else, which would see the new tokens alone,
            or a format that rotates when reading.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from openwork.kvcache import SnapKV
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1,
        ...     intermediate_size=48, num_attention_heads=4, num_key_value_heads=2))
        >>> report = use_block_attention(model)
        >>> cache = PagedCache(model, 256, policy=SnapKV(budget=32, window=16))
        >>> with torch.inference_mode():
        ...     logits = model(torch.arange(200)[None] % 64, cache=cache).logits
        >>> cache.get_seq_length(), cache.layers[0].pages.lengths.tolist()
        (200, [[32], [32]])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_len: int,
        *,
        batch: int = 1,
        format: Format | Sequence[Format] = Format(),  # noqa: B008  frozen
        policy: CachePolicy = KeepAll(),  # noqa: B008  without state
        page_size: int = 64,
    ) -> None:
        config = model.config.get_text_config()
        count, heads = config.num_hidden_layers, config.num_attention_heads
        formats = [format] * count if isinstance(format, Format) else list(format)
        if len(formats) != count or any(f.rotate != "stored" for f in formats):
            raise ValueError(
                f"PagedCache: a format for each of {count} layers, of rotated keys, expected, got "
                f"{[f.rotate for f in formats]}"
            )
        if getattr(config, "sliding_window", None) is not None:
            raise ValueError(
                f"PagedCache: a model without sliding windows expected, got {config.sliding_window}"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._held = [
            LayerCache(
                batch, heads, config.num_key_value_heads, head_dim, max_len,
                format=formats[index], policy=policy.layer(index), page_size=page_size,
                dtype=model.dtype,
            )
            for index in range(count)
        ]  # fmt: skip
        super().__init__(layers=[PagedLayer(config, max_len, held) for held in self._held])

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages in use, exact tokens and tables."""
        return sum(held.nbytes for held in self._held)


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedCache`."""

    is_croppable = False

    def __init__(self, config: Any, max_len: int, cache: LayerCache) -> None:
        super().__init__()
        self._config, self._max_len, self.cache = config, max_len, cache
        self._seen = 0
        self.is_initialized = True

    @property
    def pages(self) -> Any:
        return self.cache.pages

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: pages are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take note of new tokens; the attention function stores them."""
        if self._config._attn_implementation != NAME:
            raise ValueError(
                f'PagedCache: attention by "{NAME}" expected, got '
                f'"{self._config._attn_implementation}"; call use_block_attention(model)'
            )
        self._seen += key_states.shape[2]
        if self._seen > self._max_len:
            raise ValueError(
                f"PagedCache: room for {self._seen} tokens needed, got max_len = {self._max_len}"
            )
        key_states = key_states.view_as(key_states)
        key_states.openwork_cache = self.cache  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return self._max_len

    def reset(self) -> None:
        raise NotImplementedError("PagedCache: make a new one in place of resetting it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("PagedCache: beams are not supported; generate with one")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered.

    Args:
        module: which layer's.
        query: ``[b, h, t, d]``.
        key: ``[b, g, n, d]``; ``value`` alike.
        attention_mask: None, from :func:`causal`.
        dropout: 0.
        scaling: of the scores.
        sliding_window: last keys that a query sees, or None.
        kwargs: what else a model says; a soft cap is refused.

    Returns:
        ``[b, t, h, d]``, and no probabilities.
    """
    if dropout or kwargs.get("softcap") is not None or kwargs.get("is_causal") is False:
        raise ValueError(f'"{NAME}": causal attention without dropout and softcap expected')
    q = query.transpose(1, 2)
    t, n = q.shape[1], key.shape[2]
    cache: LayerCache | None = getattr(key, "openwork_cache", None)
    if cache is not None:

        def prompt(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(module, q.transpose(1, 2), key, value, None, scaling=scaling)[0]

        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        return cache.attend(q, keys, keys, values, prompt, scaling), None
    if torch.is_grad_enabled() and (q.requires_grad or key.requires_grad):
        scale = 1.0 if scaling is None else scaling * q.shape[-1] ** 0.5
        return dense_attention(q * scale, key, value).view(q.shape), None
    prefill = _PREFILLS.get(module)
    if sliding_window is None and prefill is not None and t > _DECODE:
        return prefill.attend(q, key, value, scale=scaling), None
    if t <= _DECODE and sliding_window is None:
        return ops.decode_attention(q, key, value, n, scaling), None
    o = ops.block_attention(
        q, key.transpose(1, 2), value.transpose(1, 2), scale=scaling, window=sliding_window or 0
    )
    return cast(Tensor, o), None


def causal(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """The mask function that is registered: nothing, since the attention function is causal.

    Raises:
        ValueError: padded sequences, whose mask would have to be more.
    """
    if attention_mask is not None and not bool(attention_mask[:, -kv_length:].all()):
        raise ValueError(
            f'"{NAME}": sequences without padding expected; run those of different lengths one by '
            "one, or prepacked by openwork.attention.prepack"
        )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, causal)
