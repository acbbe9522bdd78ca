"""The compressed cache of a model: one format, one policy, a layer at a time.

A layer takes a prompt in two steps, which have nothing to do with each other: attention over all
of it, dense or by the model's own prefill policy, and then the choice of what to keep, which waits
for all chunks of the prompt or for tokens that may be taken back. Later tokens attend to what was
kept and to each other::

    attention = pages  (+)  first tokens, exact  (+)  what stands for dropped tokens

where (+) merges states of parts of the keys (``openwork.ops.merge_states``). Every key head of
every sequence is a row of pages of its own, with its own length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from openwork.kvcache.compression import check_plain
from openwork.kvcache.formats import Format, each_format
from openwork.kvcache.layer import LayerCache
from openwork.kvcache.policy import KeepAll, Policy, check_policy
from openwork.models import Llama
from openwork.models.kv_cache import Attend
from openwork.models.llama import Layer


class Cache:
    """Keys and values of a model in a format, as many as a policy keeps.

    Args:
        model: what it is a cache of.
        max_len: tokens it can see; memory is taken for those that are held. With rotation by place
            these alone must fit the model's context, so that it may read on without an end.
        batch: sequences, all of one length.
        format: how keys and values are stored: one for all layers, or one for each.
        policy: which tokens are kept and read.
        page_size: tokens of a page: 32, 64 or 128.
        drafts: tokens of a step that :meth:`rollback` takes back without a trace. Quantization and
            the policy then see a step, or a prompt, when the next one comes.

    Attributes:
        length: tokens seen.
        layers: a :class:`LayerCache` each.

    Example:
        >>> from openwork.kvcache import Cache, SnapKV, kivi
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=256))
        >>> cache = Cache(model, 256, policy=SnapKV(budget=32, window=16))
        >>> with torch.inference_mode():
        ...     logits = model(torch.arange(200)[None] % 64, cache)
        >>> cache.length, cache.held.tolist()
        (200, [[[32, 32]], [[32, 32]]])
    """

    def __init__(
        self,
        model: Llama,
        max_len: int,
        *,
        batch: int = 1,
        format: Format | Sequence[Format] = Format(),  # noqa: B008  frozen
        policy: Policy = KeepAll(),  # noqa: B008  without state
        page_size: int = 64,
        drafts: int = 0,
    ) -> None:
        if max_len < 1 or batch < 1:
            raise ValueError(f"Cache: max_len and batch must be at least 1, got {max_len}, {batch}")
        config = model.config
        formats = each_format("Cache", format, config.layers)
        check_policy("Cache", policy)
        self.max_len, self.batch, self.length = max_len, batch, 0
        self.layers = [
            LayerCache(
                batch,
                config.heads_of(index),
                config.shape_of(index).kv_heads,
                config.head_dim,
                max_len,
                format=formats[index],
                policy=policy.layer(index),
                page_size=page_size,
                dtype=model.dtype,
                drafts=drafts,
                rope=_rope(model, formats[index], max_len),
            )
            for index in range(config.layers)
        ]
        self.attend: Sequence[Attend] = [
            _attend(layer, held)
            for layer, held in zip(cast(Iterable[Layer], model.layers), self.layers, strict=True)
        ]

    @property
    def position(self) -> int:
        """By which the next token is rotated: tokens seen, or those held with rotation by place."""
        first = self.layers[0]
        by_place = first.format.rotate == "place"
        return int(first.lengths.max()) if by_place else self.length

    @property
    def held(self) -> Tensor:
        """``[layers, batch, kv_heads]`` int64: tokens held."""
        return torch.stack([layer.lengths for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes allocated: pages in use, exact tokens and tables."""
        return sum(layer.nbytes for layer in self.layers)

    @contextmanager
    def prefilling(self, *, bounded: bool = False) -> Iterator[None]:
        """Within it, tokens come that are one prompt, in chunks of any length.

        Each chunk attends to all of the prompt so far, and the policy sees the prompt as a whole
        when the context ends: what is kept then is what is kept of a prompt given at once. Until
        then keys, values and queries of the whole prompt are held as they came.

        Args:
            bounded: hold one chunk and what the policy keeps of those before it, as they came; it
                judges by the queries of one chunk at a time, and a head holds as many tokens as the
                one that keeps most. Another text may come of it.

        Raises:
            ValueError: a cache that holds tokens; bounded, with a policy that keeps account of
                tokens (H2O, Razor), or a format that rotates when reading or keeps tokens apart.

        Example:
            >>> from openwork.kvcache import Cache, SnapKV
            >>> from openwork.models import Llama, LlamaConfig
            >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48,
            ...                           layers=1, heads=4, kv_heads=2, head_dim=8,
            ...                           context_length=256))
            >>> cache = Cache(model, 256, policy=SnapKV(budget=32, window=16))
            >>> with torch.inference_mode(), cache.prefilling():
            ...     for chunk in (torch.arange(200) % 64).split(50):
            ...         logits = model(chunk[None], cache)
            >>> cache.length, cache.held.tolist()
            (200, [[[32, 32]]])
        """
        with prefilling(self.layers, bounded=bounded):
            yield

    def rollback(self, n: int) -> None:
        """Forget the last ``n`` tokens.

        Those of the last step, or of a prompt that came in it, leave no trace in a cache with at
        least as many ``drafts`` as the step had tokens. Others can be taken back as far as the
        policy has dropped none and keeps no scores of them; of quantized groups that lose tokens,
        the others stay rounded.

        Raises:
            ValueError: more than can be taken back; the cache is as before.

        Example:
            >>> from openwork.models import Llama, LlamaConfig
            >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48,
            ...                           layers=1, heads=4, kv_heads=2, head_dim=8,
            ...                           context_length=256))
            >>> cache = openwork.kvcache.Cache(model, 256, drafts=4)
            >>> with torch.inference_mode():
            ...     logits = model(torch.tensor([[1, 2, 3]]), cache)
            ...     logits = model(torch.tensor([[4, 5, 6]]), cache)
            >>> cache.rollback(2)
            >>> cache.length, cache.held.tolist()
            (4, [[[4, 4]]])
        """
        roll_back(self.layers, n)
        self.length -= n

    def reserve(self, batch: int, t: int) -> None:
        """Check that ``t`` more tokens of ``batch`` sequences fit.

        Raises:
            ValueError: the cache is too small, or made for another ``batch``.
        """
        if batch != self.batch:
            raise ValueError(f"Cache: {self.batch} sequences expected (its batch), got {batch}")
        if self.length + t > self.max_len:
            raise ValueError(
                f"Cache: room for {self.length + t} tokens needed, got max_len = {self.max_len}"
            )


@contextmanager
def prefilling(layers: Sequence[LayerCache], *, bounded: bool) -> Iterator[None]:
    """Let layers collect a prompt that comes in chunks, and take it up at the end.

    See :meth:`Cache.prefilling`.
    """
    for layer in layers:
        if layer.seen:
            raise ValueError(f"prefilling: an empty cache expected, got {layer.seen} tokens")
        if bounded:
            check_plain("prefilling in bounded memory", layer.format, layer.policy)
    for layer in layers:
        layer.collecting = "bounded" if bounded else "whole"
    try:
        yield
    finally:
        for layer in layers:
            layer.collecting = None
            if layer.drafts == 0:
                layer.settle()


def roll_back(layers: Sequence[LayerCache], n: int) -> None:
    """Take the last ``n`` tokens of all layers back.

    Raises:
        ValueError: more than one of them can; all are as before.
    """
    most = min((layer.revocable for layer in layers), default=n)
    if not 0 <= n <= most:
        raise ValueError(
            f"rollback: at most {most} tokens can be taken back, as the policy has seen the step "
            f"before and dropped tokens or counts their scores, got {n}; make the cache with "
            "drafts of as many tokens as a step may have"
        )
    for layer in layers:
        layer.rollback(n)


def _rope(model: Llama, format: Format, max_len: int) -> tuple[Tensor, Tensor]:
    """The tables of all positions, or of the places that there can be."""
    by_place = format.rotate == "place"
    return model.rope(0, min(max_len, model.config.context_length) if by_place else max_len)


def _attend(layer: Layer, held: LayerCache) -> Attend:
    """What the layer asks of the cache; it attends to a prompt as it would without one."""

    def prompt(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return layer.prefill(q, keys, values).view(q.shape)

    return lambda qkv, cos, sin: held(qkv, cos, sin, prompt)
