"""The metadata of a GGUF file as a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openwork.errors import FormatError
from openwork.models.config import HF_FAMILIES, Fields, LlamaConfig, checked_config, token_ids

# general.architecture of a GGUF file -> model_type. GGUF stores Mistral as "llama".
GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2"}


def config_from_gguf(
    metadata: Mapping[str, Any],
    where: str,
    *,
    tied_head: bool,
    rope_divisors: tuple[float, ...] | None,
) -> LlamaConfig:
    """Read the metadata of a GGUF file.

    Args:
        metadata: key -> value, as stored.
        where: the file's name, for messages.
        tied_head: the file has no ``output.weight``.
        rope_divisors: the tensor ``rope_freqs.weight``, or None where the file has none.

    Raises:
        FormatError: an architecture or rope scaling this decoder does not compute, or a missing
            or senseless value.
    """
    fields = Fields(metadata, where)
    name = fields.get("general.architecture", str)
    if name not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise FormatError(f"{where}: general.architecture of {known} expected, got {name!r}")
    scaling = fields.get(f"{name}.rope.scaling.type", str, "none")
    experts = fields.get(f"{name}.expert_count", int, 0)
    if scaling != "none" or experts:
        raise FormatError(
            f"{where}: rope scaling 'none' and no experts expected, got {scaling!r} and {experts}"
        )
    family = GGUF_FAMILIES[name]
    heads = fields.get(f"{name}.attention.head_count", int)
    hidden_size = fields.get(f"{name}.embedding_length", int)
    head_dim = fields.get(f"{name}.attention.key_length", int, hidden_size // max(heads, 1))
    rotated = fields.get(f"{name}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise FormatError(
            f"{where}: {name}.rope.dimension_count = head size {head_dim} expected, got {rotated}"
        )
    bos = token_ids(fields, "tokenizer.ggml.bos_token_id")
    eos = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot"))
    return checked_config(
        where,
        family=family,
        vocab_size=fields.get(
            f"{name}.vocab_size", int, len(fields.get("tokenizer.ggml.tokens", list, []))
        ),
        hidden_size=hidden_size,
        ffn_size=fields.get(f"{name}.feed_forward_length", int),
        layers=fields.get(f"{name}.block_count", int),
        heads=heads,
        kv_heads=fields.get(f"{name}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        context_length=fields.get(f"{name}.context_length", int),
        rope_theta=fields.get(f"{name}.rope.freq_base", float, 10000.0),
        norm_eps=fields.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        tied_head=tied_head,
        qkv_bias=HF_FAMILIES[family],
        rope_scaling=rope_divisors,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(i for key in eos for i in token_ids(fields, key))),
    )
