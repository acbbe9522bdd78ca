"""Prune every linear of a model in place, and report what it cost."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from openwork.ops.compute import Compute
from openwork.prune.flap import flap
from openwork.prune.llm_pruner import llm_pruner
from openwork.prune.masks import NM, Pattern, Unstructured
from openwork.prune.methods import METHODS, Method
from openwork.prune.pruned import PrunedTensor
from openwork.prune.report import LinearReport, PruningReport, describe, describe_removed
from openwork.prune.sparsegpt import sparsegpt
from openwork.prune.storage import install
from openwork.quant.calibration import InputSecondMoment, calibrate, check_dense
from openwork.quant.grid import Grid, QuantizedTensor, resolve_group_size
from openwork.quant.hessian import output_error
from openwork.quant.model import model_bytes

if TYPE_CHECKING:
    from openwork.models import Llama

# These remove whole heads and channels, which no mask of one linear can say.
STRUCTURED = ("flap", "llm_pruner")


@torch.no_grad()
def prune_model(
    model: Llama,
    method: str | Method,
    *,
    pattern: str | NM | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    calibration: Tensor | None = None,
    grid: Grid | None = None,
    compute: Compute = "int8",
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> PruningReport:
    """Remove weights of the layers' linears, in place; embedding, norms and head stay.

    Args:
        model: dense.
        method: ``"magnitude"`` (no data needed), ``"wanda"``, ``"sparsegpt"``; ``"flap"`` or
            ``"llm_pruner"``, which make the model smaller; or a function of a weight ``[n, k]``,
            the second moment ``[k, k]`` of its inputs (``[0]`` without calibration) and a pattern,
            which returns a :class:`PrunedTensor`.
        pattern: ``"N:M"`` or ``"V:N:M"``; see :class:`NM`.
        sparsity: in place of a pattern, the share of weights to remove, the same for every linear
            or by name (:func:`global_magnitude` and :func:`evopress` give such shares). For
            ``"flap"`` and ``"llm_pruner"`` the share of the weights of all layers.
        calibration: ``[samples, length]`` int64 token ids. With them the report has output errors,
            also of ``"magnitude"``.
        grid: ``"sparsegpt"`` also rounds to this grid, and the linears become
            :class:`~openwork.nn.LowbitLinear`.
        compute: how those multiply, also while calibrating; see :func:`openwork.lowbit_linear`.
        progress: show a progress bar.
        resume_dir: see :func:`~openwork.quant.calibration.calibrate`; ``"llm_pruner"`` has nothing
            to resume.

    Returns:
        Errors, sizes and memory. If an error is raised, the layers done so far stay pruned.

    Raises:
        ValueError: an unknown method or pattern, a combination that is not computed, bad
            calibration tokens, or a model that is not dense.
        FormatError, OSError: a ``resume_dir`` that is damaged or cannot be written.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> prune_model(model, "magnitude", pattern="2:4", progress=False).sparsity
        0.5
    """
    bytes_before = model_bytes(model)
    _check(model, method, grid, calibration)
    if method in STRUCTURED:
        if pattern is not None or not isinstance(sparsity, (int, float)):
            raise ValueError(
                f"prune_model: sparsity must be one share and pattern None for {method!r}, "
                f"got {sparsity!r} and {pattern!r}"
            )
        assert isinstance(method, str)
        assert calibration is not None
        done = _remove_units(model, method, sparsity, calibration, progress, resume_dir)
    else:
        run = _Layerwise(method, _patterns(model, pattern, sparsity), grid, compute)
        done = _prune_linears(model, run, calibration, progress, resume_dir)
    return PruningReport(
        linears=tuple(done.linears),
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        hidden_bytes=done.hidden_bytes,
        statistics_bytes=done.statistics_bytes,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _Done(NamedTuple):
    linears: list[LinearReport]
    hidden_bytes: int = 0
    statistics_bytes: int = 0


def _prune_linears(
    model: Llama,
    run: _Layerwise,
    calibration: Tensor | None,
    progress: bool,
    resume_dir: str | Path | None,
) -> _Done:
    if calibration is not None:
        run.start(model)
        held = calibrate(model, calibration, run, progress=progress, resume_dir=resume_dir)
        return _Done(run.reports, held.hidden_bytes, held.statistics_bytes)
    for name, parent, attribute in track(list(model.linears()), "pruning", disable=not progress):
        pruned = run.prune(getattr(parent, attribute).weight, torch.empty(0), run.patterns[name])
        run.put(name, parent, attribute, pruned, None)
    return _Done(run.reports)


def _remove_units(
    model: Llama,
    method: str,
    sparsity: float,
    calibration: Tensor,
    progress: bool,
    resume_dir: str | Path | None,
) -> _Done:
    names = [name for name, _, _ in model.linears()]
    before = {name: _weight(model, name) for name in names}
    held = None
    if method == "flap":
        held = flap(model, calibration, sparsity, progress=progress, resume_dir=resume_dir)
    else:
        llm_pruner(model, calibration, sparsity, progress=progress)
    reports = [
        describe_removed(name, weight, _weight(model, name)) for name, weight in before.items()
    ]
    return (
        _Done(reports) if held is None else _Done(reports, held.hidden_bytes, held.statistics_bytes)
    )


def _weight(model: Llama, name: str) -> Tensor:
    return model.get_submodule(name).get_parameter("weight")


@dataclass
class _Layerwise:
    """A method as a calibration algorithm; collects a report per linear."""

    method: str | Method
    patterns: dict[str, Pattern]
    grid: Grid | None
    compute: Compute
    reports: list[LinearReport] = field(default_factory=list)
    # Of the linears still to be compressed. The engine names a linear only when it installs.
    _pattern_of: dict[nn.Module, Pattern] = field(default_factory=dict)

    def start(self, model: Llama) -> None:
        """Prepare for the engine to come along the linears of ``model``."""
        self._pattern_of = {
            getattr(parent, attribute): self.patterns[name]
            for name, parent, attribute in model.linears()
        }

    @property
    def prune(self) -> Method:
        if self.grid is not None:
            return partial(sparsegpt, grid=self.grid)
        return METHODS[self.method] if isinstance(self.method, str) else self.method

    def options(self) -> Mapping[str, Any]:
        method = self.method
        return {
            "algorithm": "prune",
            "method": method
            if isinstance(method, str)
            else f"{method.__module__}.{method.__qualname__}",
            "patterns": {name: repr(pattern) for name, pattern in self.patterns.items()},
            "grid": None if self.grid is None else self.grid.options(),
            "compute": self.compute,
        }

    def statistic(self, linear: nn.Linear) -> InputSecondMoment:
        return InputSecondMoment(linear.in_features)

    def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
        moment = statistic.mean()
        weight = linear.weight.float()
        pruned = self.prune(weight, moment, self._pattern_of.pop(linear))
        error = output_error(weight, pruned.weight, moment)
        result = {
            "keep": pruned.keep,
            "output_error": torch.tensor(error, dtype=torch.float64),
        }
        q = pruned.quantized
        if q is None:
            return result | {"weight": pruned.weight}
        result |= {"codes": q.codes, "scales": q.scales}
        return result if q.zeros is None else result | {"zeros": q.zeros}

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        quantized = None
        if self.grid is None:
            weight = tensors["weight"]
        else:
            bits, k = self.grid.bits, getattr(parent, attribute).in_features
            quantized = QuantizedTensor(
                codes=tensors["codes"],
                scales=tensors["scales"],
                zeros=None if self.grid.symmetric else tensors["zeros"],
                bits=bits,
                group_size=resolve_group_size("prune_model", bits, self.grid.group_size, k),
            )
            weight = quantized.dequantize()
        pruned = PrunedTensor(weight, tensors["keep"], quantized)
        self.put(name, parent, attribute, pruned, float(tensors["output_error"]))

    def put(
        self,
        name: str,
        parent: nn.Module,
        attribute: str,
        pruned: PrunedTensor,
        error: float | None,
    ) -> None:
        """Install the result and describe the change."""
        weight = getattr(parent, attribute).weight
        install(parent, attribute, pruned, self.compute)
        self.reports.append(describe(name, weight, pruned, self.patterns[name], error))


def _patterns(
    model: Llama, pattern: str | NM | None, sparsity: float | Mapping[str, float] | None
) -> dict[str, Pattern]:
    """The pattern of every linear."""
    names = [name for name, _, _ in model.linears()]
    if (pattern is None) == (sparsity is None):
        raise ValueError(
            f"prune_model: pattern or sparsity expected, got {pattern!r} and {sparsity!r}"
        )
    if pattern is not None:
        parsed = NM.parse(pattern) if isinstance(pattern, str) else pattern
        return dict.fromkeys(names, parsed)
    if isinstance(sparsity, Mapping):
        if set(sparsity) != set(names):
            raise ValueError(
                f"prune_model: sparsity must name the {len(names)} linears of the layers, "
                f"got {len(sparsity)} names"
            )
        return {name: Unstructured(sparsity[name]) for name in names}
    assert sparsity is not None
    return dict.fromkeys(names, Unstructured(sparsity))


def _check(
    model: Llama, method: str | Method, grid: Grid | None, calibration: Tensor | None
) -> None:
    known = (*METHODS, *STRUCTURED)
    if isinstance(method, str) and method not in known:
        raise ValueError(
            f"prune_model: method must be a function or one of {', '.join(known)}, got {method!r}"
        )
    if calibration is None and isinstance(method, str) and method != "magnitude":
        raise ValueError(f"prune_model: calibration must be token ids for {method!r}, got None")
    if grid is not None and method != "sparsegpt":
        raise ValueError(f"prune_model: grid must be None for {method!r}; 'sparsegpt' takes one")
    check_dense("prune_model", model)
    if grid is not None:
        for _, parent, attribute in model.linears():
            k = getattr(parent, attribute).in_features
            resolve_group_size("prune_model", grid.bits, grid.group_size, k)
