"""Quantize every linear of a model in place, and report what it cost."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from openwork.nn import LowbitEmbedding, LowbitLinear
from openwork.nn.packed_linear import PackedLinear
from openwork.ops import pack_lowbit
from openwork.ops.compute import Compute
from openwork.quant.calibration import InputSecondMoment, calibrate
from openwork.quant.gptq import gptq
from openwork.quant.grid import Grid, QuantizedTensor, resolve_group_size
from openwork.quant.hessian import output_error
from openwork.quant.rtn import rtn

if TYPE_CHECKING:
    from openwork.models import Llama


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear.

    Attributes:
        name: such as ``"layers.3.attn.qkv"``, or ``"head"``.
        shape: ``(n, k)``.
        weight_error: ``|W - Q|^2 / |W|^2``, Frobenius.
        output_error: what :func:`gptq` makes small, as a share of the output's energy
            ``tr(W H W^T)``. None without calibration.
        bytes_before: of the dense weight.
        bytes_after: of the packed weight.
    """

    name: str
    shape: tuple[int, int]
    weight_error: float
    output_error: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_model` did and what it took.

    ``model_bytes_before + hidden_bytes + statistics_bytes`` is nearly all of ``peak_bytes`` that is
    not the Python process itself; the rest is the work space of one linear.

    Attributes:
        linears: one entry per quantized linear, in the order of the model.
        model_bytes_before: :func:`model_bytes` of the dense model.
        model_bytes_after: the same of the quantized one.
        hidden_bytes: see :class:`~openwork.quant.calibration.CalibrationReport`; 0 without
            calibration.
        statistics_bytes: alike.
        peak_bytes: highest resident memory of the whole process so far, as the system counts it.
    """

    linears: tuple[LinearReport, ...]
    model_bytes_before: int
    model_bytes_after: int
    hidden_bytes: int
    statistics_bytes: int
    peak_bytes: int


@torch.no_grad()
def quantize_model(
    model: Llama,
    method: Literal["rtn", "gptq"],
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool = False,
    search: bool = False,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
    calibration: Tensor | None = None,
    head_bits: int | None = None,
    compute: Compute = "int8",
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> QuantizationReport:
    """Replace the linears of ``model`` by :class:`~openwork.nn.LowbitLinear`, in place.

    Args:
        model: dense; its layers' linears are quantized, norms are not.
        method: ``"rtn"`` (:func:`rtn`, no data) or ``"gptq"`` (:func:`gptq`, on ``calibration``).
        bits, group_size, symmetric, search, scale_dtype: the grid, see :func:`rtn`.
        act_order, static_groups, damping: see :func:`gptq`; not used by ``"rtn"``.
        calibration: ``[samples, length]`` int64 token ids for ``"gptq"``; not used by ``"rtn"``.
        head_bits: quantize the output head too, by RTN with this width and the same grid otherwise.
            With 8, an embedding tied to the head stays tied, as a
            :class:`~openwork.nn.LowbitEmbedding`; with fewer, which are too coarse for what all
            layers start from, it keeps its dense weight. None: the head stays dense.
        compute: how the new linears multiply, also while calibrating; see
            :func:`openwork.lowbit_linear`.
        progress: show a progress bar.
        resume_dir: see :func:`~openwork.quant.calibration.calibrate`; ``"gptq"`` only.

    Returns:
        Errors, sizes and memory. If an error is raised, the layers done so far stay quantized.

    Raises:
        ValueError: an unknown method, format or calibration, or a model that is quantized already.
        FormatError, OSError: a ``resume_dir`` that is damaged or cannot be written.
    """
    if method not in ("rtn", "gptq"):
        raise ValueError(f"quantize_model: method must be 'rtn' or 'gptq', got {method!r}")
    if method == "gptq" and calibration is None:
        raise ValueError("quantize_model: calibration must be token ids for 'gptq', got None")
    widths = dict.fromkeys((name for name, _, _ in model.linears()), bits)
    if head_bits is not None:
        widths["head"] = head_bits
    # All before the first linear is replaced.
    for name, width in widths.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"quantize_model: {name} must be dense, got {type(linear).__name__}")
        resolve_group_size("quantize_model", width, group_size, linear.in_features)
    grid = Grid(bits, group_size, symmetric, search, scale_dtype)
    bytes_before = model_bytes(model)
    hidden_bytes = statistics_bytes = 0
    reports: list[LinearReport] = []
    if method == "gptq":
        assert calibration is not None
        algorithm = _Gptq(grid, act_order, static_groups, damping, compute)
        held = calibrate(model, calibration, algorithm, progress=progress, resume_dir=resume_dir)
        hidden_bytes, statistics_bytes = held.hidden_bytes, held.statistics_bytes
        reports += algorithm.reports
    else:
        linears = list(model.linears())
        for name, parent, attribute in track(linears, "rounding", disable=not progress):
            q = rtn(getattr(parent, attribute).weight, **grid.arguments())
            reports.append(_install(name, parent, attribute, q, compute))
    if head_bits is not None:
        q = rtn(model.head.weight, **grid.arguments() | {"bits": head_bits})
        reports.append(_install("head", model, "head", q, compute))
        if model.config.tied_head and head_bits == 8:
            head = model.get_submodule("head")
            assert isinstance(head, LowbitLinear)
            model.register_module("embed", LowbitEmbedding(head.weight, model.dtype))
    return QuantizationReport(
        linears=tuple(reports),
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        hidden_bytes=hidden_bytes,
        statistics_bytes=statistics_bytes,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and packed weights of a model; shared ones count once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    owners = (m for m in model.modules() if isinstance(m, (LowbitEmbedding, PackedLinear)))
    packed = {id(m.weight): m.weight.nbytes for m in owners}
    return sum(tensors.values()) + sum(packed.values())


@dataclass(frozen=True)
class _Gptq:
    """GPTQ as a calibration algorithm; collects a report per linear."""

    grid: Grid
    act_order: bool
    static_groups: bool
    damping: float
    compute: Compute
    reports: list[LinearReport] = field(default_factory=list)

    def options(self) -> Mapping[str, Any]:
        return {
            "algorithm": "gptq",
            "act_order": self.act_order,
            "static_groups": self.static_groups,
            "damping": self.damping,
            "compute": self.compute,
            **self.grid.options(),
        }

    def statistic(self, linear: nn.Linear) -> InputSecondMoment:
        return InputSecondMoment(linear.in_features)

    def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
        weight = linear.weight.float()
        hessian = statistic.mean()
        q = gptq(
            weight,
            hessian,
            act_order=self.act_order,
            static_groups=self.static_groups,
            damping=self.damping,
            **self.grid.arguments(),
        )
        share = output_error(weight, q.dequantize(), hessian)
        result = {
            "codes": q.codes,
            "scales": q.scales,
            "output_error": torch.tensor(share, dtype=torch.float64),
        }
        return result if q.zeros is None else result | {"zeros": q.zeros}

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        linear = getattr(parent, attribute)
        n, k = linear.weight.shape
        q = QuantizedTensor(
            codes=tensors["codes"],
            scales=tensors["scales"],
            zeros=None if self.grid.symmetric else tensors["zeros"],
            bits=self.grid.bits,
            group_size=resolve_group_size(
                "quantize_model", self.grid.bits, self.grid.group_size, k
            ),
        )
        if list(q.codes.shape) != [n, k]:
            raise ValueError(f"codes must have shape {[n, k]}, got {list(q.codes.shape)}")
        share = float(tensors["output_error"])
        self.reports.append(_install(name, parent, attribute, q, self.compute, share))


def _install(
    name: str,
    parent: nn.Module,
    attribute: str,
    q: QuantizedTensor,
    compute: Compute,
    output_error: float | None = None,
) -> LinearReport:
    """Replace a dense linear by its quantized form and describe the change."""
    linear = getattr(parent, attribute)
    weight = linear.weight.float()
    packed = pack_lowbit(q.codes, q.scales, q.zeros, bits=q.bits, group_size=q.group_size)
    bias = None if linear.bias is None else linear.bias.detach()
    setattr(parent, attribute, LowbitLinear(packed, bias, compute))
    error = q.dequantize().sub_(weight).norm() / weight.norm().clamp(min=1e-30)
    return LinearReport(
        name=name,
        shape=(q.n, q.k),
        weight_error=float(error) ** 2,
        output_error=output_error,
        bytes_before=linear.weight.nbytes,
        bytes_after=packed.nbytes,
    )
