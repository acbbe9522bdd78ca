"""From named tensors in a file to a :class:`Llama`: which tensors, of which shapes, and where to.

The names are Hugging Face's, which every checkpoint but GGUF uses; the GGUF reader translates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from openwork.errors import FormatError
from openwork.models.config import LlamaConfig
from openwork.models.llama import Llama


class Part(NamedTuple):
    """A tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """A file, or several, with named tensors. Names are Hugging Face's, such as
    ``model.layers.0.self_attn.q_proj.weight``."""

    @property
    def where(self) -> str:
        """The file's name, for messages."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None where there is no such tensor. Reads no data."""

    def read(self, name: str) -> Tensor:
        """A tensor, in any floating-point dtype."""


def linear_parts(config: LlamaConfig, layer: int) -> dict[str, tuple[Part, ...]]:
    """The fused linears of one layer and the checkpoint's linears they are made of.

    Returns:
        Our name within a layer -> parts ``(name within a layer, (rows, columns))``, to be stacked
        along the rows in this order.

    Example:
        >>> config = LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                      heads=4, kv_heads=2, head_dim=8, context_length=128)
        >>> [part.name for part in linear_parts(config, 0)["attn.qkv"]]
        ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj']
    """
    d, shape = config.hidden_size, config.shape_of(layer)
    q, kv = config.heads_of(layer) * config.head_dim, shape.kv_heads * config.head_dim
    f = shape.ffn_size
    return {
        "attn.qkv": (
            Part("self_attn.q_proj", (q, d)),
            Part("self_attn.k_proj", (kv, d)),
            Part("self_attn.v_proj", (kv, d)),
        ),
        "attn.o": (Part("self_attn.o_proj", (d, q)),),
        "mlp.gate_up": (Part("mlp.gate_proj", (f, d)), Part("mlp.up_proj", (f, d))),
        "mlp.down": (Part("mlp.down_proj", (d, f)),),
    }


def parameters(config: LlamaConfig) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Every parameter of a :class:`Llama` and the checkpoint's tensors stacked in it.

    Lazy, so that a file claiming a billion layers costs nothing: its first missing tensor ends it.

    Yields:
        ``(name in model.state_dict(), parts)``. A tied head is not among them.
    """
    d = config.hidden_size
    yield "embed.weight", (Part("model.embed_tokens.weight", (config.vocab_size, d)),)
    biased = {"attn.qkv": config.qkv_bias} | dict.fromkeys(
        ("attn.o", "mlp.down"), config.output_bias
    )
    for i in range(config.layers):
        prefix = f"model.layers.{i}."
        yield f"layers.{i}.attn_norm", (Part(f"{prefix}input_layernorm.weight", (d,)),)
        for name, parts in linear_parts(config, i).items():
            yield (
                f"layers.{i}.{name}.weight",
                tuple(Part(f"{prefix}{part.name}.weight", part.shape) for part in parts),
            )
            if biased.get(name):
                yield (
                    f"layers.{i}.{name}.bias",
                    tuple(Part(f"{prefix}{part.name}.bias", part.shape[:1]) for part in parts),
                )
        yield (
            f"layers.{i}.mlp_norm",
            (Part(f"{prefix}post_attention_layernorm.weight", (d,)),),
        )
    yield "norm", (Part("model.norm.weight", (d,)),)
    if not config.tied_head:
        yield "head.weight", (Part("lm_head.weight", (config.vocab_size, d)),)


def is_linear(name: str, config: LlamaConfig) -> bool:
    """Whether a parameter is the weight of a linear (and not the embedding, a norm or a bias)."""
    linears = ("head", *linear_parts(config, 0))
    return any(name.endswith(f"{linear}.weight") for linear in linears)


def check_part(source: WeightSource, part: Part) -> None:
    """Check that ``source`` has ``part``.

    Raises:
        FormatError: the tensor is missing or of another shape.
    """
    shape = source.shape(part.name)
    if shape != part.shape:
        got = "no such tensor" if shape is None else f"{list(shape)}"
        raise FormatError(f"{source.where}: {part.name} {list(part.shape)} expected, got {got}")


def read_parts(source: WeightSource, parts: tuple[Part, ...], dtype: torch.dtype) -> Tensor:
    """Stack tensors along their first dimension, holding one of them at a time besides the result.

    Raises:
        FormatError: a tensor is missing, of another shape, or unreadable.
    """
    for part in parts:
        check_part(source, part)
    rows = [part.shape[0] for part in parts]
    result = torch.empty(sum(rows), *parts[0].shape[1:], dtype=dtype)
    for part, target in zip(parts, torch.split(result, rows), strict=True):
        target.copy_(source.read(part.name))
    return result


def build(config: LlamaConfig, source: WeightSource, dtype: torch.dtype) -> Llama:
    """Make a model and fill it from a checkpoint.

    All tensors are checked before the first is read, so nothing is allocated for a checkpoint that
    does not hold what its configuration says.

    Returns:
        The model in ``dtype``, in eval mode, its parameters without gradients.

    Raises:
        FormatError: a tensor is missing, of another shape, or unreadable.
    """
    for _, parts in parameters(config):
        for part in parts:
            check_part(source, part)
    with torch.device("meta"):  # no time or memory for initial values
        model = Llama(config)
    state = {name: read_parts(source, parts, dtype) for name, parts in parameters(config)}
    if config.tied_head:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_head()
    return model.eval().requires_grad_(False)
