"""Models on disk: a directory with ``config.json``, ``model.safetensors`` and tokenizer files.

Names and configuration are Hugging Face's; quantized linears are in the "pack-quantized" format of
the compressed-tensors library (:mod:`openwork.pack_quantized`), sparse ones in its "sparse-bitmask"
and "sparse-24-bitmask" (:mod:`openwork.sparse_bitmask`). Fused linears are stored as the parts
other libraries know (``q_proj``, ``k_proj``, ...). The packed layouts the kernels read never reach
a file.

That format has no place for both: beside quantized linears, sparse ones are stored with their
zeros, as codes or as floats. Nor has it one for an embedding that shares the quantized weight of
the head; both are stored, the embedding as its rows in the model's dtype. What a file cannot say in
terms of others it says in ours (:mod:`openwork.own_keys`).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openwork import sparse_bitmask
from openwork.errors import FormatError
from openwork.export import export
from openwork.models.config import Fields, LlamaConfig, config_from_hf, config_to_hf
from openwork.models.hf import SafetensorsWeights, read_json
from openwork.models.llama import Llama
from openwork.models.tokenizer import tokenizer_from_file
from openwork.models.weights import Part, check_part, is_linear, parameters, read_parts
from openwork.nn import LowbitEmbedding, LowbitLinear
from openwork.ops import pack_lowbit
from openwork.ops.compute import Compute
from openwork.own_keys import OwnKeys, own_keys
from openwork.pack_quantized import (
    Scheme,
    find_scheme,
    read_linear,
    schemes_from_config,
)
from openwork.prune.storage import sparse_module, without_zeros
from openwork.quant.grid import QuantizedTensor
from openwork.tensorfile import write_tensors

# What makes up a tokenizer and its chat format, for this and other libraries.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def save(
    model: Llama,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model so that :func:`openwork.models.load` and other libraries can read it.

    Quantized linears are written packed, sparse ones (:class:`~openwork.nn.NmLinear`,
    :class:`~openwork.nn.SparseLinear`) without their zeros, everything else in the dtype it has.
    The directory appears complete or not at all.

    Args:
        model: dense, quantized, sparse, or partly so.
        directory: to create; its parents too.
        source: the directory the model came from; its tokenizer files are copied. Without them,
            ``model.tokenizer`` is written, if there is one.
        overwrite: replace a directory that is there and not empty.

    Raises:
        FileExistsError: ``directory`` is not empty, or not a directory.
        OSError: it cannot be written; nothing has changed.
        ValueError: the configuration has no Hugging Face form, or a linear is of a kind that has
            no form in a file: with sparse blocks or scaled values, by columns, or with thresholds
            of activations.
    """
    config, tensors, said = export(model)
    values = config_to_hf(config) | {"dtype": str(model.dtype).removeprefix("torch.")} | said
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

    Also one with sparse weights. Those that :func:`save` wrote become again what they were, with
    values in the dtype of the file; those of other files become dense.

    Everything is checked before it is used: names and shapes before any tensor is read, scales,
    zeros and patterns before a weight is built.

    Args:
        directory: with ``config.json`` (and its ``quantization_config``) and ``model.safetensors``.
        dtype: of activations and of the weights that are not packed.
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
    sparse = sparse_bitmask.is_sparse(quantization)
    schemes = [] if sparse else schemes_from_config(quantization)
    own = own_keys(values, str(path))
    file = SafetensorsWeights(directory)
    weights = sparse_bitmask.BitmaskWeights(file)
    plan = _plan(config, file, weights, schemes, own)
    if own.shares_head and "head" not in plan.packed:
        raise FormatError(
            f"{path}: an untied head with lm_head.weight_packed expected, since the embedding is "
            "said to be lm_head; got none"
        )
    with torch.device("meta"):  # no time or memory for initial values
        model = Llama(config)
    state = {name: read_parts(weights, parts, dtype) for name, parts in plan.dense.items()}
    if config.tied_head:
        state["head.weight"] = state["embed.weight"]
    for name, (parts, scheme) in plan.packed.items():
        q, bias = read_linear(file, parts, scheme), state.get(f"{name}.bias")
        with _blaming(f"{file.where}: {name}"):
            linear = _packed_linear(q, bias, compute)
            if own.shares_head and name == "head":
                model.register_module("embed", LowbitEmbedding(linear.weight, dtype))
            sparser = without_zeros(linear, own.sparse[name]) if name in own.sparse else None
        _replace(model, name, sparser or linear)
    for name, parts in plan.sparse.items():
        weight = torch.cat([weights.read(part.name) for part in parts])
        if weight.dtype not in (torch.float32, torch.bfloat16):
            weight = weight.to(dtype)
        with _blaming(f"{file.where}: {name}"):
            _replace(
                model, name, sparse_module(weight, state.get(f"{name}.bias"), own.sparse[name])
            )
    model.load_state_dict(state, assign=True)
    model.tie_head()
    return _with_tokenizer(model.eval().requires_grad_(False), directory)


class _Plan(NamedTuple):
    """What to make of the tensors of a file."""

    dense: dict[str, tuple[Part, ...]]  # parameters
    packed: dict[str, tuple[tuple[Part, ...], Scheme]]  # quantized linears
    sparse: dict[str, tuple[Part, ...]]  # linears of float values


def _plan(
    config: LlamaConfig,
    file: SafetensorsWeights,
    weights: sparse_bitmask.BitmaskWeights,
    schemes: list[Scheme],
    own: OwnKeys,
) -> _Plan:
    """Look at every name and shape, and at no data.

    Raises:
        FormatError: a tensor is missing or of another shape, or our keys name what is no linear.
    """
    plan = _Plan({}, {}, {})
    for name, parts in parameters(config):
        if own.shares_head and name == "embed.weight":
            continue
        linear = name.removesuffix(".weight")
        weighs = is_linear(name, config)
        if weighs and file.shape(f"{parts[0].name}_packed") is not None:
            plan.packed[linear] = parts, find_scheme(file, parts, schemes)
            continue
        for part in parts:
            check_part(weights, part)
        if weighs and linear in own.sparse:
            plan.sparse[linear] = parts
        else:
            plan.dense[name] = parts
    unknown = own.sparse.keys() - plan.packed.keys() - plan.sparse.keys()
    if unknown:
        raise FormatError(
            f"{file.where}: openwork.sparse: names of linears expected, got {min(unknown)!r}"
        )
    return plan


def _packed_linear(q: QuantizedTensor, bias: Tensor | None, compute: Compute) -> LowbitLinear:
    weight = pack_lowbit(q.codes, q.scales, q.zeros, bits=q.bits, group_size=q.group_size)
    return LowbitLinear(weight, bias, compute)


def _replace(model: Llama, name: str, linear: torch.nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, linear)


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """What packing refuses (a row too long, a weight without its pattern) is the file's fault."""
    try:
        yield
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from error


def _quantization(fields: Fields) -> Fields:
    """What the file says about its weights, under the name that it has, or had in early files."""
    early = "compression_config" in fields and "quantization_config" not in fields
    return fields.section("compression_config" if early else "quantization_config")


def _with_tokenizer(model: Llama, directory: Path) -> Llama:
    if (directory / "tokenizer.json").exists():
        model.tokenizer = tokenizer_from_file(directory / "tokenizer.json")
    return model


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
