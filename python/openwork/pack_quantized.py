"""One quantized linear in the "pack-quantized" format of the compressed-tensors library.

A linear ``X`` with an ``[n, k]`` weight of ``b`` bits is stored as::

    X.weight_packed      int32 [n, ceil(k b / 32)]        codes, packed along k
    X.weight_scale       float [n, groups]
    X.weight_zero_point  int32 [ceil(n b / 32), groups]   zeros, packed along n; none if symmetric
    X.weight_shape       int64 [2]                        n, k

packed as :mod:`openwork.bitstream` draws it, and ``quantization_config`` in ``config.json`` lists
the schemes in use.

That library has no short last group. A group size that does not divide ``k`` is stored as smaller
groups with repeated scales (128 at k = 576 as 64), which is the same weight, and joined again when
read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from openwork.bitstream import pack_words, unpack_words, word_count
from openwork.errors import FormatError
from openwork.models.config import Fields
from openwork.models.hf import SafetensorsWeights
from openwork.models.weights import Part
from openwork.quant.grid import BITS, GROUP_SIZES, QuantizedTensor, group_count

_METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """How a linear is quantized. ``group_size`` is None for one group a row."""

    bits: int
    group_size: int | None
    symmetric: bool


def linear_to_tensors(name: str, q: QuantizedTensor) -> tuple[Scheme, dict[str, Tensor]]:
    """What to store for a linear whose dense weight would be called ``name``, and its scheme.

    Example:
        >>> from openwork.quant import rtn
        >>> q = rtn(torch.ones(8, 32), bits=4, group_size=16)
        >>> scheme, tensors = linear_to_tensors("X.weight", q)
        >>> scheme
        Scheme(bits=4, group_size=16, symmetric=False)
        >>> sorted(tensors)
        ['X.weight_packed', 'X.weight_scale', 'X.weight_shape', 'X.weight_zero_point']
    """
    q = _without_short_group(q)
    tensors = {
        f"{name}_packed": pack_words(q.codes, q.bits),
        f"{name}_scale": q.scales.contiguous(),
        f"{name}_shape": torch.tensor([q.n, q.k]),
    }
    if q.zeros is not None:
        tensors[f"{name}_zero_point"] = pack_words(q.zeros.t(), q.bits).t().contiguous()
    group_size = None if q.group_size == q.k else q.group_size
    return Scheme(q.bits, group_size, symmetric=q.zeros is None), tensors


def _without_short_group(q: QuantizedTensor) -> QuantizedTensor:
    """The same weight in the largest groups that divide both ``group_size`` and ``k``."""
    size = math.gcd(q.group_size, q.k)
    if size == q.group_size or size not in GROUP_SIZES:
        # In the second case the short group stays, and only this library reads the file.
        return q
    group = torch.arange(0, q.k, size) // q.group_size
    zeros = None if q.zeros is None else q.zeros[:, group]
    return replace(q, scales=q.scales[:, group], zeros=zeros, group_size=size)


def schemes_to_config(schemes: Mapping[Scheme, list[str]], layers: int) -> dict[str, Any]:
    """The ``quantization_config`` of a model of ``layers`` layers.

    Args:
        schemes: the linears of each scheme, such as ``"model.layers.0.self_attn.q_proj"``.
        layers: a linear that is there so many times is listed by one pattern.
    """
    groups = {}
    for index, (scheme, names) in enumerate(schemes.items()):
        groups[f"group_{index}"] = {
            "targets": _targets(names, layers),
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size is None else "group",
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
    quantized = {name for names in schemes.values() for name in names}
    return {
        "quant_method": _METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if "lm_head" in quantized else ["lm_head"],
        "kv_cache_scheme": None,
    }


def _targets(names: list[str], layers: int) -> list[str]:
    """``names``, with one pattern in place of a linear that is among them in every layer."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"^model\.layers\.\d+\.", "", name), []).append(name)
    targets = []
    for kind, members in kinds.items():
        everywhere = len(members) == layers and kind not in members
        targets += [f"re:.*{re.escape(kind)}$"] if everywhere else members
    return targets


def schemes_from_config(fields: Fields) -> list[Scheme]:
    """The schemes of a ``quantization_config``, without repetitions.

    Raises:
        FormatError: another method or format, or one that also changes activations or the cache.
    """
    for key, only in (("quant_method", _METHOD), ("format", _FORMAT)):
        if fields.get(key, str) != only:
            raise FormatError(
                f"{fields.where}: {key} {only!r} expected, got {fields.get(key, str)!r}"
            )
    _expect_absent(fields, "kv_cache_scheme", "transform_config")
    schemes = []
    groups = fields.section("config_groups")
    for name in fields.get("config_groups", dict):
        group = groups.section(str(name))
        _expect_absent(group, "input_activations", "output_activations")
        weights = group.section("weights")
        strategy, kind = weights.get("strategy", str), weights.get("type", str, "int")
        if strategy not in ("group", "channel") or kind != "int":
            raise FormatError(
                f"{weights.where}: type 'int' and strategy 'group' or 'channel' expected, "
                f"got {kind!r} and {strategy!r}"
            )
        bits = weights.get("num_bits", int)
        size = weights.get("group_size", int) if strategy == "group" else None
        if bits not in BITS or size not in (None, *GROUP_SIZES):
            raise FormatError(
                f"{weights.where}: num_bits in {BITS} and group_size in {GROUP_SIZES} expected, "
                f"got {bits} and {size}"
            )
        schemes.append(Scheme(bits, size, weights.get("symmetric", bool, True)))
    return list(dict.fromkeys(schemes))


def _expect_absent(fields: Fields, *keys: str) -> None:
    for key in keys:
        if key in fields and fields.get(key, object):
            raise FormatError(f"{fields.where}: no {key} expected, got one; it is not supported")


def find_scheme(
    weights: SafetensorsWeights, parts: tuple[Part, ...], schemes: list[Scheme]
) -> Scheme:
    """The one scheme whose tensors all of ``parts`` are made of. Reads no data.

    The shapes alone tell a scheme from the others, so the target patterns of the configuration,
    regular expressions from an untrusted file, are never run.

    Raises:
        FormatError: the tensors fit no scheme, or more than one.
    """
    fitting = [scheme for scheme in schemes if all(_fits(weights, p, scheme) for p in parts)]
    # A group as long as the row is the whole row, under either name.
    k = parts[0].shape[1]
    distinct = {(s.bits, min(s.group_size or k, k)): s for s in fitting}
    if len(distinct) != 1:
        got = {
            kind: list(weights.shape(f"{parts[0].name}_{kind}") or [])
            for kind in ("packed", "scale", "zero_point")
        }
        raise FormatError(
            f"{weights.where}: {parts[0].name} {list(parts[0].shape)} (and what is fused with it) "
            f"packed by one scheme of quantization_config expected, got {len(distinct)} that fit "
            f"tensors of shape {got}; 3-bit files of compressed-tensors before 0.17 cannot be read"
        )
    if any(weights.shape(f"{part.name}_g_idx") is not None for part in parts):
        raise FormatError(f"{weights.where}: no {parts[0].name}_g_idx expected, got one")
    return next(iter(distinct.values()))


def _fits(weights: SafetensorsWeights, part: Part, scheme: Scheme) -> bool:
    n, k = part.shape
    groups = group_count(k, min(scheme.group_size or k, k))
    zero_point = None if scheme.symmetric else (word_count(n, scheme.bits), groups)
    return (
        weights.shape(f"{part.name}_packed") == (n, word_count(k, scheme.bits))
        and weights.shape(f"{part.name}_scale") == (n, groups)
        and weights.shape(f"{part.name}_zero_point") == zero_point
    )


def read_linear(
    weights: SafetensorsWeights, parts: tuple[Part, ...], scheme: Scheme
) -> QuantizedTensor:
    """Read the parts of a fused linear and stack them.

    Raises:
        FormatError: a tensor of another dtype or shape, or values that make no weight.
    """
    k = parts[0].shape[1]
    codes, scales, zeros = [], [], []
    for part in parts:
        n = part.shape[0]
        name = f"{part.name}_shape"
        if weights.shape(name) != (2,) or weights.read_raw(name).tolist() != [n, k]:
            raise FormatError(f"{weights.where}: {name} = {[n, k]} expected, got another or none")
        codes.append(unpack_words(_read_words(weights, f"{part.name}_packed"), scheme.bits, k))
        scales.append(weights.read(f"{part.name}_scale"))
        if not scheme.symmetric:
            words = _read_words(weights, f"{part.name}_zero_point").t()
            zeros.append(unpack_words(words, scheme.bits, n).t())
    try:
        q = QuantizedTensor(
            codes=torch.cat(codes),
            scales=torch.cat(scales),
            zeros=None if scheme.symmetric else torch.cat(zeros),
            bits=scheme.bits,
            group_size=min(scheme.group_size or k, k),
        )
    except ValueError as error:
        raise FormatError(f"{weights.where}: {parts[0].name}: {error}") from error
    return _with_short_group(q)


def _read_words(weights: SafetensorsWeights, name: str) -> Tensor:
    words = weights.read_raw(name)
    if words.dtype != torch.int32:
        raise FormatError(f"{weights.where}: {name} of int32 expected, got {words.dtype}")
    return words


def _with_short_group(q: QuantizedTensor) -> QuantizedTensor:
    """Undo :func:`_without_short_group`, as far as the scales and zeros show that it was done."""
    for size in reversed(GROUP_SIZES):
        ratio = size // q.group_size
        if ratio < 2 or size >= q.k or q.k % size == 0:
            continue
        first = torch.arange(q.scales.shape[1]) // ratio * ratio
        pairs = [q.scales] if q.zeros is None else [q.scales, q.zeros]
        if all(torch.equal(values, values[:, first]) for values in pairs):
            zeros = None if q.zeros is None else q.zeros[:, ::ratio]
            return replace(q, scales=q.scales[:, ::ratio], zeros=zeros, group_size=size)
    return q
