"""Sparse attention and compressed caches for Hugging Face models.

By their own extension points: an attention function and its mask, registered as
``"openwork_block"``, and a ``Cache``. A cache hands the new keys and values back marked with the
layer they belong to, and the attention function, which gets them next, lets that layer attend::

    key, value = cache.update(key, value, layer)     takes note, stores nothing yet
    attention(module, query, key, value, mask)       -> the layer's pages, and their policy

Attention is causal by itself, so all that a mask has to say is where sequences start that are
padded on the left. Each of those is attended to without its padding.

Needs the ``hf`` extra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from openwork import ops
from openwork.attention import Policy, Report
from openwork.attention.enable import Prefill
from openwork.attention.policy import check_policy
from openwork.kvcache import Format, KeepAll, LayerCache, prefilling, roll_back
from openwork.kvcache import Policy as CachePolicy
from openwork.kvcache.formats import each_format
from openwork.kvcache.policy import check_policy as check_cache_policy
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
    if policy is not None:
        check_policy("use_block_attention", policy)
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
        model: after :func:`use_block_attention`. Layers with a sliding window hold its keys and
            values as they are, since it moves on by a token a step: its pages, and groups of codes,
            would be made anew at each. Format and policy are for the other layers.
        max_len: tokens it can see, padding among them; memory is taken for those that are held.
        batch: sequences, those of all beams.
        format: how keys and values are stored; the keys come rotated, so ``rotate`` must be
            "stored".
        policy: which tokens are kept and read.
        page_size: tokens of a page: 32, 64 or 128.
        drafts: tokens of a step that may be taken back, for assisted generation: one more than the
            assistant proposes. See :class:`openwork.kvcache.Cache`. A policy that drops tokens or
            chooses pages while decoding does so once a step, so there the text may depend on how
            many tokens its steps have.

    Raises:
        ValueError: a model that attends by something else, which would see the new tokens alone, or
            one with layers of another kind; a format that rotates when reading.

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
        drafts: int = 0,
    ) -> None:
        config = model.config.get_text_config()
        count, heads = config.num_hidden_layers, config.num_attention_heads
        formats = each_format("PagedCache", format, count)
        if any(f.rotate != "stored" for f in formats):
            raise ValueError(
                'PagedCache: formats of rotate = "stored" expected, as keys come rotated, got '
                f'"{", ".join(sorted({f.rotate for f in formats}))}"'
            )
        check_cache_policy("PagedCache", policy)
        windows = _windows(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._held: list[LayerCache] = []
        self._sliding: list[DynamicSlidingWindowLayer] = []
        layers: list[Any] = []
        for index, window in enumerate(windows):
            if window is None:
                held = LayerCache(
                    batch, heads, config.num_key_value_heads, head_dim, max_len,
                    format=formats[index], policy=policy.layer(index), page_size=page_size,
                    dtype=model.dtype, drafts=drafts,
                )  # fmt: skip
                self._held.append(held)
                layers.append(PagedLayer(config, max_len, held))
            else:
                self._sliding.append(DynamicSlidingWindowLayer(window))
                layers.append(self._sliding[-1])
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages in use, exact tokens and tables, and windows."""
        windows = (x for layer in self._sliding for x in (layer.keys, layer.values))
        return sum(x.nbytes for x in self._held) + sum(x.nbytes for x in windows if x is not None)

    @contextmanager
    def prefilling(self, *, bounded: bool = False) -> Iterator[None]:
        """Within it, tokens come that are one prompt, in chunks.

        See :meth:`openwork.kvcache.Cache.prefilling`. ``generate`` goes on from all but the last
        token of its prompt::

            with torch.inference_mode(), cache.prefilling():
                for chunk in prompt[:, :-1].split(512, dim=1):
                    model(chunk, cache=cache)
            model.generate(prompt, cache=cache)
        """
        with prefilling(self._held, bounded=bounded):
            yield

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back.

        See :meth:`openwork.kvcache.Cache.rollback`. Sliding windows can only do so after
        ``activate_past_recording``.
        """
        roll_back(self._held, -tokens_to_remove)
        for layer in self._sliding:
            layer.crop(tokens_to_remove)


def _windows(config: Any) -> list[int | None]:
    """The sliding window of each layer, or None."""
    window = getattr(config, "sliding_window", None)
    own = "full_attention" if window is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [own] * config.num_hidden_layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            "PagedCache: layers of full or sliding attention expected, got "
            f"{', '.join(sorted(set(kinds)))}"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedCache`."""

    def __init__(self, config: Any, max_len: int, cache: LayerCache) -> None:
        super().__init__()
        self._config, self._max_len, self.cache = config, max_len, cache
        self.is_initialized = True
        self.is_croppable = cache.drafts > 0

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
        b, _, t, _ = key_states.shape
        if b != self.cache.batch:
            raise ValueError(
                f"PagedCache: {self.cache.batch} sequences expected (its batch, beams among them), "
                f"got {b}"
            )
        if self.cache.seen + t > self._max_len:
            raise ValueError(
                f"PagedCache: room for {self.cache.seen + t} tokens needed, got max_len = "
                f"{self._max_len}"
            )
        key_states = key_states.view_as(key_states)
        key_states.openwork_cache = self.cache  # type: ignore[attr-defined]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return self._max_len

    def reset(self) -> None:
        raise NotImplementedError("PagedCache: make a new one in place of resetting it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam go on from another; those of one origin share its pages."""
        self.cache.reorder(beam_idx)


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
        attention_mask: from :func:`causal`: ``[b]`` int64, the first key of each sequence that is
            not padding; None: there is none.
        dropout: 0.
        scaling: of the scores.
        sliding_window: last keys that a query sees, or None.
        kwargs: what else a model says; a soft cap is refused.

    Returns:
        ``[b, t, h, d]``, 0 for padding, and no probabilities.
    """
    if dropout or kwargs.get("softcap") is not None or kwargs.get("is_causal") is False:
        raise ValueError(f'"{NAME}": causal attention without dropout and softcap expected')

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if attention_mask is None:
            return _attend(module, q, keys, values, scaling, sliding_window)
        t, n = q.shape[1], keys.shape[2]
        o = q.new_zeros(*q.shape[:3], values.shape[-1])
        for s, start in enumerate(attention_mask.tolist()):
            own = q[s : s + 1, max(0, start - (n - t)) :]
            seen = keys[s : s + 1, :, start:], values[s : s + 1, :, start:]
            o[s : s + 1, t - own.shape[1] :] = _attend(module, own, *seen, scaling, sliding_window)
        return o

    q = query.transpose(1, 2)
    cache: LayerCache | None = getattr(key, "openwork_cache", None)
    if cache is None:
        return attend(q, key, value), None
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    return cache.attend(q, k, k, v, attend, scaling, attention_mask), None


def _attend(
    module: nn.Module,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention without padding: ``q [b, t, h, d]``, ``keys [b, g, n, d]`` to ``[b, t, h, d]``."""
    t, n = q.shape[1], keys.shape[2]
    if sliding_window is not None and t == 1:
        keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
    elif sliding_window is not None and n > sliding_window:
        # With a gradient where one is needed.
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return cast(Tensor, ops.block_attention_train(q, k, v, window=sliding_window, scale=scale))
    prefill = _PREFILLS.get(module)
    if prefill is None or t <= _DECODE:
        return dense_attention(q, keys, values, scale=scale).view(*q.shape[:3], -1)
    return prefill.attend(q, keys, values, scale=scale)


def causal(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that is registered.

    Returns:
        None, since the attention function is causal; of a batch padded on the left ``[b]`` int64,
        the first key of each sequence.

    Raises:
        ValueError: other padding.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[:, -kv_length:].bool()
    starts = (~mask).sum(-1)
    if bool((mask != (torch.arange(mask.shape[-1]) >= starts.unsqueeze(-1))).any()) or not bool(
        mask[:, -1].all()
    ):
        raise ValueError(
            f'"{NAME}": padding on the left expected, with a token of each sequence behind it; '
            'set tokenizer.padding_side = "left"'
        )
    return starts if bool(starts.any()) else None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, causal)
