"""Models on disk: a directory with ``config.json``, ``model.safetensors`` and tokenizer files.

Names and configuration are Hugging Face's; quantized linears are in the "pack-quantized" format of
the compressed-tensors library (:mod:`openwork.pack_quantized`). Fused linears are stored as the
parts other libraries know (``q_proj``, ``k_proj``, ...). The packed layout the kernels read never
reaches a file.

Other libraries have no form for an embedding that shares the quantized weight of the head. Both are
stored, the embedding as its rows in the model's dtype, and ``config.json`` says to those who know::

    "openwork": {"embedding": "lm_head"}    the embedding equals the head: no need to read its rows
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openwork.errors import FormatError
from openwork.models.config import Fields, LlamaConfig, config_from_hf, config_to_hf
from openwork.models.hf import SafetensorsWeights, read_json
from openwork.models.llama import Llama
from openwork.models.tokenizer import tokenizer_from_file
from openwork.models.weights import Part, check_part, linear_parts, parameters, read_parts
from openwork.nn import LowbitEmbedding, LowbitLinear
from openwork.ops import pack_lowbit, unpack_lowbit
from openwork.ops.lowbit import Compute
from openwork.pack_quantized import (
    Scheme,
    find_scheme,
    linear_to_tensors,
    read_linear,
    schemes_from_config,
    schemes_to_config,
)
from openwork.quant.grid import QuantizedTensor
from openwork.sparse_bitmask import is_sparse, load_sparse
from openwork.tensorfile import write_tensors

# What makes up a tokenizer and its chat format, for this and other libraries.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# In config.json, under "openwork": the embedding is the quantized weight of the head.
_SHARED = {"embedding": "lm_head"}


def save(
    model: Llama,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model so that :func:`openwork.models.load` and other libraries can read it.

    Quantized linears are written packed, everything else in the dtype it has. The directory appears
    complete or not at all.

    Args:
        model: dense, quantized, or partly so.
        directory: to create; its parents too.
        source: the directory the model came from; its tokenizer files are copied. Without them,
            ``model.tokenizer`` is written, if there is one.
        overwrite: replace a directory that is there and not empty.

    Raises:
        FileExistsError: ``directory`` is not empty, or not a directory.
        OSError: it cannot be written; nothing has changed.
        ValueError: the configuration has no Hugging Face form.
    """
    # A head that was quantized is its own tensor now, whatever the configuration said.
    tied = model.config.tied_head and not isinstance(model.head, LowbitLinear)
    config = replace(model.config, tied_head=tied)
    tensors, schemes = _export(model, config)
    values = config_to_hf(config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    if schemes:
        values["quantization_config"] = schemes_to_config(schemes, config.layers)
    if _shares_head(model):
        values["openwork"] = _SHARED
    with _replacing(Path(directory), overwrite) as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        write_tensors(partial / "model.safetensors", tensors, {"format": "pt"})
        for name in _TOKENIZER_FILES:
            if source is not None and (Path(source) / name).exists():
                shutil.copyfile(Path(source) / name, partial / name)
        tokenizer = partial / "tokenizer.json"
        if model.tokenizer is not None and not tokenizer.exists():
            tokenizer.write_text(model.tokenizer.inner.to_str(), encoding="utf-8")


def load(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, compute: Compute = "int8"
) -> Llama:
    """Load a model with "pack-quantized" linears; they become :class:`~openwork.nn.LowbitLinear`.

    Also one with sparse weights (:mod:`openwork.sparse_bitmask`), which become dense.

    Everything is checked before it is used: names and shapes before any tensor is read, scales and
    zeros before a weight is built.

    Args:
        directory: with ``config.json`` (and its ``quantization_config``) and ``model.safetensors``.
        dtype: of activations and of the weights that are not quantized.
        compute: how the quantized linears multiply; see :func:`openwork.lowbit_linear`.

    Raises:
        OSError: a file is missing or unreadable.
        FormatError: one is damaged, or uses what this library does not compute.
    """
    directory = Path(directory)
    path = directory / "config.json"
    values = read_json(path)
    config = config_from_hf(values, str(path))
    quantization = _quantization(Fields(values, str(path)))
    if is_sparse(quantization):
        return _with_tokenizer(load_sparse(directory, config, dtype), directory)
    schemes = schemes_from_config(quantization)
    weights = SafetensorsWeights(directory)
    shared = _shared_in_file(values, str(path))
    dense: dict[str, tuple[Part, ...]] = {}
    packed: dict[str, tuple[tuple[Part, ...], Scheme]] = {}
    for name, parts in parameters(config):
        if shared and name == "embed.weight":
            continue
        if _is_linear(name, config) and weights.shape(f"{parts[0].name}_packed") is not None:
            packed[name.removesuffix(".weight")] = parts, find_scheme(weights, parts, schemes)
        else:
            for part in parts:
                check_part(weights, part)
            dense[name] = parts
    if shared and "head" not in packed:
        raise FormatError(
            f"{path}: an untied head with lm_head.weight_packed expected, since the embedding is "
            "said to be lm_head; got none"
        )
    with torch.device("meta"):  # no time or memory for initial values
        model = Llama(config)
    state = {name: read_parts(weights, parts, dtype) for name, parts in dense.items()}
    if config.tied_head:
        state["head.weight"] = state["embed.weight"]
    for name, (parts, scheme) in packed.items():
        parent, _, attribute = name.rpartition(".")
        q = read_linear(weights, parts, scheme)
        try:
            weight = pack_lowbit(q.codes, q.scales, q.zeros, bits=q.bits, group_size=q.group_size)
        except ValueError as error:  # rows longer than the kernels take
            raise FormatError(f"{weights.where}: {name}: {error}") from error
        linear = LowbitLinear(weight, state.get(f"{name}.bias"), compute)
        setattr(model.get_submodule(parent), attribute, linear)
        if shared and name == "head":
            model.register_module("embed", LowbitEmbedding(weight, dtype))
    model.load_state_dict(state, assign=True)
    model.tie_head()
    return _with_tokenizer(model.eval().requires_grad_(False), directory)


def _quantization(fields: Fields) -> Fields:
    """What the file says about its weights, under the name that it has, or had in early files."""
    early = "compression_config" in fields and "quantization_config" not in fields
    return fields.section("compression_config" if early else "quantization_config")


def _with_tokenizer(model: Llama, directory: Path) -> Llama:
    if (directory / "tokenizer.json").exists():
        model.tokenizer = tokenizer_from_file(directory / "tokenizer.json")
    return model


def _shares_head(model: Llama) -> bool:
    """Whether the embedding is the quantized weight of the head."""
    embed, head = model.get_submodule("embed"), model.get_submodule("head")
    both = isinstance(embed, LowbitEmbedding) and isinstance(head, LowbitLinear)
    return both and embed.weight is head.weight


def _shared_in_file(values: Mapping[str, Any], where: str) -> bool:
    """The same of a file, by its ``config.json``.

    Raises:
        FormatError: it says what this version does not know.
    """
    found = values.get("openwork")
    if found not in (None, _SHARED):
        raise FormatError(f"{where}: openwork = {_SHARED} or none expected, got {found!r}")
    return found is not None


def _is_linear(name: str, config: LlamaConfig) -> bool:
    """Whether a parameter is the weight of a linear (and not the embedding, a norm or a bias)."""
    linears = ("head", *linear_parts(config, 0))
    return any(name.endswith(f"{linear}.weight") for linear in linears)


def _export(model: Llama, config: LlamaConfig) -> tuple[dict[str, Tensor], dict[Scheme, list[str]]]:
    """All tensors of the file, and the names of the linears of each scheme."""
    tensors: dict[str, Tensor] = {}
    schemes: dict[Scheme, list[str]] = {}
    for name, parts in parameters(config):
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        rows = [part.shape[0] for part in parts]
        if kind == "weight" and isinstance(module, LowbitLinear):
            for part, q in zip(parts, _split_rows(module, rows), strict=True):
                scheme, stored = linear_to_tensors(part.name, q)
                tensors |= stored
                schemes.setdefault(scheme, []).append(part.name.removesuffix(".weight"))
        else:
            if isinstance(module, LowbitEmbedding):
                whole = module(torch.arange(module.num_embeddings))
            else:
                whole = getattr(module, kind).detach()
            for part, tensor in zip(parts, torch.split(whole, rows), strict=True):
                # The file format wants tensors that share no memory.
                tensors[part.name] = tensor.contiguous() if len(parts) == 1 else tensor.clone()
    return tensors, schemes


def _split_rows(linear: LowbitLinear, rows: list[int]) -> list[QuantizedTensor]:
    """The weight of a linear, cut into pieces of so many rows."""
    weight = linear.weight
    codes, scales, zeros = unpack_lowbit(weight)
    ends = torch.tensor(rows).cumsum(0).tolist()
    return [
        QuantizedTensor(
            codes=codes[end - count : end],
            scales=scales[end - count : end],
            zeros=None if zeros is None else zeros[end - count : end],
            bits=weight.bits,
            group_size=weight.group_size,
        )
        for count, end in zip(rows, ends, strict=True)
    ]


@contextmanager
def _replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new directory beside ``target`` that takes its place if the body succeeds."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"save: directory must be a directory, got a file: {target}")
    occupied = target.exists() and any(target.iterdir())
    if occupied and not overwrite:
        raise FileExistsError(f"save: directory must be new or empty, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, and so in the same file system, where a rename is one step.
    unique = uuid.uuid4().hex[:8]
    partial = target.with_name(f".{target.name}.{unique}.partial")
    previous = target.with_name(f".{target.name}.{unique}.previous")
    try:
        partial.mkdir()
        yield partial
        if occupied:
            os.rename(target, previous)
        try:
            os.rename(partial, target)
        except OSError:
            if occupied:
                os.rename(previous, target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
