"""A model as what its files hold: named tensors, and what ``config.json`` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from openwork import sparse_bitmask
from openwork.models.config import LlamaConfig
from openwork.models.llama import Llama
from openwork.models.weights import is_linear, parameters
from openwork.nn import LowbitEmbedding, LowbitLinear, NmLinear, SparseLinear
from openwork.ops import expand_nm, expand_sparse, unpack_lowbit
from openwork.own_keys import OwnKeys, structure
from openwork.pack_quantized import Scheme, linear_to_tensors, schemes_to_config
from openwork.packing import NmWeight, SparseWeight
from openwork.prune.masks import NM
from openwork.quant.grid import QuantizedTensor


def export(model: Llama) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, Any]]:
    """What :func:`openwork.save` writes.

    Returns:
        The configuration, with a head that is its own tensor if it was packed; the tensors by the
        names of Hugging Face, none sharing memory with another; and entries of ``config.json``
        about packed linears.

    Raises:
        ValueError: a linear of a kind that has no form in a file: with sparse blocks or scaled
            values, by columns, or with thresholds of activations.
    """
    packed = isinstance(model.head, (LowbitLinear, NmLinear, SparseLinear))
    config = replace(model.config, tied_head=model.config.tied_head and not packed)
    collected = _collect(model, config)
    said = OwnKeys(_shares_head(model), collected.sparse).to_config()
    if collected.schemes:
        said["quantization_config"] = schemes_to_config(collected.schemes, config.layers)
    elif collected.sparse:
        said["quantization_config"] = collected.sparse_config()
    return config, collected.tensors, said


def _shares_head(model: Llama) -> bool:
    """Whether the embedding is the quantized weight of the head."""
    embed, head = model.get_submodule("embed"), model.get_submodule("head")
    both = isinstance(embed, LowbitEmbedding) and isinstance(head, LowbitLinear)
    return both and embed.weight is head.weight


@dataclass
class _Export:
    """All tensors of a file, and what its ``config.json`` says of them.

    Attributes:
        tensors: by name.
        schemes: names of the linears of each.
        sparse: our names of the linears that are held without their zeros.
        kept, places: of those, weights that are not zero, and all.
        two_of_four: whether sparse-24-bitmask takes them all.
        others: the file's names of linears that are stored dense.
    """

    two_of_four: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    schemes: dict[Scheme, list[str]] = field(default_factory=dict)
    sparse: dict[str, NM | None] = field(default_factory=dict)
    kept: int = 0
    places: int = 0
    others: list[str] = field(default_factory=list)

    def sparse_config(self) -> dict[str, Any]:
        patterns = {p and NM(p.n, p.m) for p in self.sparse.values()}
        return sparse_bitmask.to_config(
            two_of_four=self.two_of_four,
            structure=structure(patterns.pop() if len(patterns) == 1 else None),
            sparsity=1 - self.kept / max(1, self.places),
            dense=self.others,
        )


def _collect(model: Llama, config: LlamaConfig) -> _Export:
    modules = list(model.modules())
    sparse = [m for m in modules if isinstance(m, (NmLinear, SparseLinear))]
    bitmasks = not any(map(_is_quantized, modules))
    found = _Export(all(_is_two_of_four(m) for m in sparse))
    if config.tied_head:
        found.others.append("lm_head")
    for name, parts in parameters(config):
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        rows = [part.shape[0] for part in parts]
        if kind == "weight" and isinstance(module, (NmLinear, SparseLinear)):
            found.sparse[owner] = _pattern(module)
        if kind == "weight" and _is_quantized(module):
            for part, q in zip(parts, _split_rows(module, rows), strict=True):
                scheme, stored = linear_to_tensors(part.name, q)
                found.tensors |= stored
                found.schemes.setdefault(scheme, []).append(part.name.removesuffix(".weight"))
            continue
        whole = _dense(module, owner, kind)
        pieces = zip(parts, torch.split(whole, rows), strict=True)
        if bitmasks and owner in found.sparse and kind == "weight":
            found.kept += int(whole.count_nonzero())
            found.places += whole.numel()
            for part, tensor in pieces:
                found.tensors |= sparse_bitmask.linear_to_tensors(
                    part.name, tensor, two_of_four=found.two_of_four
                )
            continue
        if is_linear(name, config):
            found.others += [part.name.removesuffix(".weight") for part in parts]
        for part, tensor in pieces:
            # The file format wants tensors that share no memory.
            found.tensors[part.name] = tensor.contiguous() if len(parts) == 1 else tensor.clone()
    return found


def _is_quantized(module: nn.Module) -> TypeGuard[LowbitLinear | NmLinear]:
    return isinstance(module, LowbitLinear) or (
        isinstance(module, NmLinear) and module.weight.scales is not None
    )


def _is_two_of_four(linear: NmLinear | SparseLinear) -> bool:
    weight = linear.weight
    return isinstance(weight, NmWeight) and weight.pattern == (2, 4) and weight.k % 4 == 0


def _pattern(linear: NmLinear | SparseLinear) -> NM | None:
    weight = linear.weight
    return NM(*weight.pattern, weight.vector) if isinstance(weight, NmWeight) else None


def _dense(module: nn.Module, owner: str, kind: str) -> Tensor:
    """A parameter, or the dense form of what stands in for it.

    Raises:
        ValueError: a weight without one.
    """
    if isinstance(module, LowbitEmbedding):
        rows: Tensor = module(torch.arange(module.num_embeddings))
        return rows
    found = getattr(module, kind, None)
    if isinstance(found, Tensor):
        return found.detach()
    if isinstance(found, NmWeight):
        return expand_nm(found)[0]
    if not isinstance(found, SparseWeight):
        raise ValueError(
            f"save: {owner} must be a linear with a form in a file, dense, low-bit, N:M or with "
            f"single elements stored, got {module}"
        )
    if not found.values.is_floating_point() or found.scales is not None:
        raise ValueError(f"save: {owner} must hold float values without scales, got {module}")
    return expand_sparse(found)


def _split_rows(linear: LowbitLinear | NmLinear, rows: Sequence[int]) -> list[QuantizedTensor]:
    """The codes of a linear, cut into pieces of so many rows."""
    weight = linear.weight
    zeros: Tensor | None = None
    if isinstance(weight, NmWeight):
        codes, scales = expand_nm(weight)
        assert scales is not None
    else:
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
