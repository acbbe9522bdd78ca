"""Running a model on prompts of different lengths without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from openwork import ops
from openwork.attention.prepack import prepack
from openwork.models import Llama


@torch.inference_mode()
def packed_hidden(model: Llama, prompts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """The final hidden states of prompts, run together.

    They are packed into as few rows of the longest one's length as :func:`prepack` finds; each
    token attends to its own prompt, at its own positions. Nothing is computed for padding, and the
    linears see whole rows.

    Args:
        model: the model; prefill policies are not used.
        prompts: token ids, one or more each.

    Returns:
        ``[length, d]`` of each prompt, in their order; ``model.head`` makes logits of them.

    Raises:
        ValueError: an empty prompt, or one longer than the model's context.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> states = openwork.attention.packed_hidden(model, [[1, 2, 3], [4], [5, 6]])
        >>> [len(state) for state in states]
        [3, 1, 2]
    """
    packed = prepack(prompts)
    rows = [
        _bin(model, tokens, offsets, positions) for tokens, offsets, positions in packed.each_bin()
    ]
    return packed.unpack(torch.cat(rows))


def _bin(model: Llama, tokens: Tensor, offsets: Tensor, positions: Tensor) -> Tensor:
    cos, sin = (table[positions] for table in model.rope(0, int(positions.max()) + 1))
    config = model.config
    x = model.embed(tokens.long())[None]
    for index, layer in enumerate(model.layers):
        h, g = config.heads_of(index), config.shape_of(index).kv_heads

        def attend(qkv: Tensor, cos: Tensor, sin: Tensor, h: int = h, g: int = g) -> Tensor:
            qk = ops.rope(qkv[:, :, : h + g], cos, sin)
            o = ops.block_attention(
                qk[:, :, :h], qk[:, :, h:], qkv[:, :, h + g :],
                cu_seqlens_q=offsets, cu_seqlens_k=offsets,
            )  # fmt: skip
            return cast(Tensor, o).flatten(2)

        x = layer(x, cos, sin, attend=attend)
    return ops.rms_norm(x, model.norm, config.norm_eps)[0]
