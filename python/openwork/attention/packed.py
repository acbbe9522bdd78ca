"""Running a model on prompts of different lengths without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from openwork import ops
from openwork.attention.prepack import prepack
from openwork.models import Llama

if TYPE_CHECKING:
    from openwork.kvcache import Cache


@torch.inference_mode()
def packed_hidden(
    model: Llama,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    caches: Sequence[Cache] | None = None,
) -> list[Tensor]:
    """The final hidden states of prompts, run together.

    They are packed into as few rows of the longest one's length as :func:`prepack` finds; each
    token attends to its own prompt, at its own positions. Nothing is computed for padding, and the
    linears see whole rows.

    Args:
        model: the model; prefill policies are not used.
        prompts: token ids, one or more each.
        caches: an empty one of batch 1 for each prompt, to take it up, so that ``model`` and
            :func:`openwork.generate` go on from there; None: nothing is held.

    Returns:
        ``[length, d]`` of each prompt, in their order; ``model.head`` makes logits of them.

    Raises:
        ValueError: an empty prompt, or one longer than the model's context or than its cache has
            room for; another number of caches, or one that holds tokens.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> states = openwork.attention.packed_hidden(model, [[1, 2, 3], [4], [5, 6]])
        >>> [len(state) for state in states]
        [3, 1, 2]
    """
    packed = prepack(prompts)
    if caches is not None:
        _check(caches, [len(prompt) for prompt in prompts])
        caches = [caches[i] for i in packed.order]
    rows: list[Tensor] = []
    for (tokens, offsets, positions), count in zip(packed.each_bin(), packed.bins, strict=True):
        first = sum(packed.bins[: len(rows)])
        own = [] if caches is None else caches[first : first + count]
        rows.append(_bin(model, tokens, offsets, positions, own))
    return packed.unpack(torch.cat(rows))


def _check(caches: Sequence[Cache], lengths: Sequence[int]) -> None:
    if len(caches) != len(lengths):
        raise ValueError(
            f"packed_hidden: a cache for each of {len(lengths)} prompts expected, got {len(caches)}"
        )
    for cache, length in zip(caches, lengths, strict=True):
        if cache.length:
            raise ValueError(f"packed_hidden: empty caches expected, got {cache.length} tokens")
        cache.reserve(1, length)


def _bin(
    model: Llama, tokens: Tensor, offsets: Tensor, positions: Tensor, caches: Sequence[Cache]
) -> Tensor:
    """Hidden states of the prompts of one bin, which their caches take up, if there are any."""
    cos, sin = (table[positions] for table in model.rope(0, int(positions.max()) + 1))
    config = model.config
    spans = [slice(*span) for span in pairwise(offsets.tolist())]
    x = model.embed(tokens.long())[None]
    for index, layer in enumerate(model.layers):
        h, g = config.heads_of(index), config.shape_of(index).kv_heads

        def attend(
            qkv: Tensor, cos: Tensor, sin: Tensor, h: int = h, g: int = g, index: int = index
        ) -> Tensor:
            qk = ops.rope(qkv[:, :, : h + g], cos, sin)
            q, rotated, values = qk[:, :, :h], qk[:, :, h:], qkv[:, :, h + g :]
            for cache, span in zip(caches, spans, strict=False):
                columns = _columns(q[:, span], rotated[:, span])
                keys = qkv[:, span, h : h + g]
                cache.layers[index].take(keys, rotated[:, span], values[:, span], columns)
            o = ops.block_attention(q, rotated, values, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
            return cast(Tensor, o).flatten(2)

        x = layer(x, cos, sin, attend=attend)
    for cache, span in zip(caches, spans, strict=False):
        cache.length = span.stop - span.start
    return ops.rms_norm(x, model.norm, config.norm_eps)[0]


def _columns(q: Tensor, keys: Tensor) -> Callable[[int], Tensor]:
    """What the last queries of a prompt attend to each key with."""

    def columns(last: int) -> Tensor:
        first = q.shape[1] - last if last else 0
        scores: Tensor = ops.block_attention(q[:, first:], keys, keys, scores="all")[-1]
        return scores

    return columns
