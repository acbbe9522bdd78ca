"""The numbers that define a Llama-family decoder, read from ``config.json`` or GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from openwork.errors import FormatError

T = TypeVar("T")

# model_type of a Hugging Face config.json -> "do q, k and v have a bias".
# The three differ in nothing else that this decoder computes.
HF_FAMILIES = {"llama": False, "mistral": False, "qwen2": True}

# Where config.json has the sizes of layers that differ, under the names of what they replace. Other
# libraries do not know it, and refuse such a model for the shapes of its tensors.
_LAYERS = "openwork_layers"
_LAYER_SIZES = ("num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretching of the low rotary frequencies (``rope_type: "llama3"``).

    With ``w = 2 pi / f`` the wavelength of frequency ``f`` and ``L = original_length``::

        f' = f                            if w < L / high
        f' = f / factor                   if w > L / low
        f' = f * (s + (1 - s) / factor)   between, with s = (L / w - low) / (high - low)
    """

    factor: float
    low: float
    high: float
    original_length: int


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer from which heads or channels were removed.

    Attributes:
        kv_heads: key/value heads; each keeps all its query heads.
        ffn_size: width of the feed-forward block.
    """

    kv_heads: int
    ffn_size: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of one decoder; validated on construction.

    Args:
        family: Hugging Face ``model_type``: ``"llama"``, ``"mistral"`` or ``"qwen2"``.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream, ``d``.
        ffn_size: width of the feed-forward block, ``f``.
        layers: number of decoder layers.
        heads: query heads; a multiple of ``kv_heads``.
        kv_heads: key/value heads.
        head_dim: width of one head, even.
        context_length: first position the model is not made for.
        rope_theta: base of the rotary frequencies.
        norm_eps: RMSNorm epsilon.
        tied_head: the output head is the embedding.
        qkv_bias: q, k and v have a bias (Qwen2).
        rope_scaling: None (the frequencies as they are), a :class:`Llama3Rope`, or
            ``head_dim / 2`` divisors of the frequencies (how GGUF stores the same thing).
        bos_id: first token of a text, or None where the model wants none.
        eos_ids: tokens that end a generation.
        layer_shapes: of each layer, where they are not all the same; at least 1 and at most what
            ``kv_heads`` and ``ffn_size`` say.
        output_bias: the last linears of both blocks have a bias.

    Raises:
        ValueError: a size below 1, ``heads`` not a multiple of ``kv_heads``, an odd ``head_dim``,
            a constant that is not a positive finite number, or shapes of layers that do not fit.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    rope_scaling: Llama3Rope | tuple[float, ...] | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    layer_shapes: tuple[LayerShape, ...] = ()
    output_bias: bool = False

    def shape_of(self, layer: int) -> LayerShape:
        """The sizes of one layer."""
        if self.layer_shapes:
            return self.layer_shapes[layer]
        return LayerShape(self.kv_heads, self.ffn_size)

    def heads_of(self, layer: int) -> int:
        """The query heads of one layer."""
        return self.shape_of(layer).kv_heads * (self.heads // self.kv_heads)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_dim",
            "context_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}"
            )
        if self.layer_shapes and len(self.layer_shapes) != self.layers:
            raise ValueError(
                f"layer_shapes must be none or {self.layers}, one a layer, "
                f"got {len(self.layer_shapes)}"
            )
        for i, shape in enumerate(self.layer_shapes):
            if not (1 <= shape.kv_heads <= self.kv_heads and 1 <= shape.ffn_size <= self.ffn_size):
                raise ValueError(
                    f"layer_shapes[{i}] must be of 1 .. {self.kv_heads} key heads and "
                    f"1 .. {self.ffn_size} channels, got {shape.kv_heads} and {shape.ffn_size}"
                )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        constants = {"rope_theta": self.rope_theta, "norm_eps": self.norm_eps}
        if isinstance(self.rope_scaling, Llama3Rope):
            scaling = self.rope_scaling
            constants |= {
                "rope_scaling.factor": scaling.factor,
                "rope_scaling.low_freq_factor": scaling.low,
                "rope_scaling.high_freq_factor - low_freq_factor": scaling.high - scaling.low,
                "rope_scaling.original_max_position_embeddings": scaling.original_length,
            }
        elif self.rope_scaling is not None:
            if len(self.rope_scaling) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling must have head_dim / 2 = {self.head_dim // 2} divisors, "
                    f"got {len(self.rope_scaling)}"
                )
            constants["smallest rope_scaling divisor"] = min(self.rope_scaling)
            constants["sum of the rope_scaling divisors"] = sum(self.rope_scaling)
        for name, value in constants.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")


class Fields:
    """Typed reading of an untrusted mapping; every complaint names the file and the key.

    Args:
        values: the mapping, for instance a parsed ``config.json``.
        where: the file's name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value under ``key`` as a ``kind``; ``default`` where it is absent or null.

        Raises:
            FormatError: absent without a default, or of another type.
        """
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise FormatError(f"{self.where}: {key} expected, got none")
            return default
        # JSON writes 10000 for 10000.0; bool is an int to isinstance but never meant as one here.
        allowed: tuple[type, ...] = (int, float) if kind is float else (kind,)
        disguised = isinstance(value, bool) and kind in (int, float)
        if not isinstance(value, allowed) or disguised:
            raise FormatError(
                f"{self.where}: {key} of type {kind.__name__} expected, got {value!r}"
            )
        if kind is float and isinstance(value, int):
            value = math.inf if abs(value) > 2**1023 else float(value)
        return cast(T, value)

    def section(self, key: str) -> Fields:
        """The mapping under ``key``; empty where it is absent or null."""
        return Fields(self.get(key, dict, {}), f"{self.where}: {key}")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None


def checked_config(where: str, **fields: Any) -> LlamaConfig:
    """A configuration from a file; what it refuses is a FormatError that names ``where``."""
    try:
        return LlamaConfig(**fields)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{where}: a usable configuration expected, got: {error}") from error


def token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    """A token id, a list of them, or none at all."""
    if key not in fields:
        return ()
    value = fields.get(key, object)
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise FormatError(f"{fields.where}: {key} as token ids expected, got {value!r}")
    return tuple(ids)


def config_from_hf(values: Mapping[str, Any], where: str) -> LlamaConfig:
    """Read a Hugging Face ``config.json``.

    Args:
        values: the parsed JSON object.
        where: the file's name, for messages.

    Returns:
        The configuration. ``context_length`` is ``max_position_embeddings``, or the sliding window
        where one is in force and shorter: up to there windowed attention is full attention.

    Raises:
        FormatError: an architecture, activation, bias or rope scaling this decoder does not
            compute, or a missing or senseless value.
    """
    fields = Fields(values, where)
    family = fields.get("model_type", str)
    if family not in HF_FAMILIES:
        known = ", ".join(HF_FAMILIES)
        raise FormatError(f"{where}: model_type of {known} expected, got {family!r}")
    fixed: dict[str, object] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, only in fixed.items():
        if fields.get(key, type(only), only) != only:
            raise FormatError(f"{where}: {key} = {only!r} expected, got {values[key]!r}")
    heads = fields.get("num_attention_heads", int)
    hidden_size = fields.get("hidden_size", int)
    context = fields.get("max_position_embeddings", int)
    if fields.get("use_sliding_window", bool, family != "qwen2") and "sliding_window" in fields:
        context = min(context, fields.get("sliding_window", int))
    # transformers 5 moved theta and the scaling into one section; before, they were apart.
    layers = fields.section(_LAYERS)
    rope = fields.section("rope_parameters" if "rope_parameters" in fields else "rope_scaling")
    theta = rope.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    bos = token_ids(fields, "bos_token_id")
    return checked_config(
        where,
        family=family,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden_size,
        ffn_size=fields.get("intermediate_size", int),
        layers=fields.get("num_hidden_layers", int),
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=fields.get("head_dim", int, hidden_size // max(heads, 1)),
        context_length=context,
        rope_theta=theta,
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        tied_head=fields.get("tie_word_embeddings", bool, False),
        qkv_bias=HF_FAMILIES[family],
        rope_scaling=_rope_scaling(rope),
        bos_id=bos[0] if bos else None,
        eos_ids=token_ids(fields, "eos_token_id"),
        layer_shapes=_layer_shapes(layers),
        output_bias=layers.get("output_bias", bool, False),
    )


def _layer_shapes(layers: Fields) -> tuple[LayerShape, ...]:
    heads, sizes = (layers.get(key, list, []) for key in _LAYER_SIZES)
    if len(heads) != len(sizes) or not all(type(size) is int for size in [*heads, *sizes]):
        raise FormatError(
            f"{layers.where}: {' and '.join(_LAYER_SIZES)} as equally many integers expected, "
            f"got {heads!r} and {sizes!r}"
        )
    return tuple(map(LayerShape, heads, sizes))


def _rope_scaling(rope: Fields) -> Llama3Rope | None:
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise FormatError(f"{rope.where}: rope_type 'default' or 'llama3' expected, got {kind!r}")
    return Llama3Rope(
        factor=rope.get("factor", float),
        low=rope.get("low_freq_factor", float),
        high=rope.get("high_freq_factor", float),
        original_length=rope.get("original_max_position_embeddings", int),
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The ``config.json`` of a configuration; :func:`config_from_hf` reads it back unchanged.

    Raises:
        ValueError: rotary divisors that came from a GGUF file: ``config.json`` has no field for
            them.
    """
    if isinstance(config.rope_scaling, tuple):
        raise ValueError(
            "config_to_hf: rope_scaling must be None or Llama3Rope, got divisors from a GGUF file, "
            "which config.json cannot express"
        )
    scaling = None
    if config.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low,
            "high_freq_factor": config.rope_scaling.high,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.family]
    values = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
    }
    layers: dict[str, Any] = {}
    if config.layer_shapes:
        heads = [shape.kv_heads for shape in config.layer_shapes]
        sizes = [shape.ffn_size for shape in config.layer_shapes]
        layers |= dict(zip(_LAYER_SIZES, (heads, sizes), strict=True))
    if config.output_bias:
        layers["output_bias"] = True
    return values | ({_LAYERS: layers} if layers else {})
