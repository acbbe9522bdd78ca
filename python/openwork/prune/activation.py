"""Activation sparsity: inputs that are nearly 0 are taken for 0, and their columns need no reading.

Two places for a threshold ``t``, found on sample text as the quantile of what is below it::

    TEAL   x <- 0 where |x| <= t               the input of every linear
    CATS   h <- 0 where |h| < t                h = silu(gate), before h * up

With ``t = 0`` nothing changes, and the model is the dense one, bit for bit. Otherwise a linear's
output is that of the dense linear on the zeroed input. :func:`skip_columns` makes time of it.

TEAL: Liu et al. 2024, arXiv 2408.14690, here with one share for all linears. CATS: Lee et al. 2024,
arXiv 2404.08763. The quantiles come from a histogram of the upper 16 bits of ``|x|`` as float32,
whose bins are 1/128 of a value wide: a threshold is the upper edge of the bin the quantile is in,
so the share that is zeroed is at least what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwork.nn import ActiveLinear, LowbitLinear
from openwork.ops import pack_columns, pack_lowbit_columns, unpack_lowbit
from openwork.quant.calibration import calibrate, check_dense

if TYPE_CHECKING:
    from openwork.models import Llama

_BINS = 1 << 15
Place: TypeAlias = Literal["teal", "cats"]


class MagnitudeHistogram:
    """Counts of ``|x|`` by the upper 16 bits of its float32, for quantiles.

    Example:
        >>> histogram = MagnitudeHistogram()
        >>> histogram.update(torch.tensor([0.0, 1.0, -2.0, 4.0]))
        >>> histogram.quantile(0.5)
        1.0078125
    """

    def __init__(self, place: Place = "teal") -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self._place = place

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes

    def attach(self, linear: nn.Linear) -> RemovableHandle:
        def observe(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.update(inputs[0] if self._place == "teal" else _gate(output))

        return linear.register_forward_hook(observe)

    def update(self, x: Tensor) -> None:
        """Account for every element of ``x``, finite."""
        bits = x.detach().float().abs().flatten().view(torch.int32) >> 16
        self.counts += torch.bincount(bits, minlength=_BINS)

    def quantile(self, share: float) -> float:
        """The least edge of a bin with at least ``share`` of the elements below it; 0 for 0."""
        wanted = math.ceil(share * int(self.counts.sum()))
        if wanted == 0:
            return 0.0
        bins = int((self.counts.cumsum(0) < wanted).sum()) + 1
        return float(torch.tensor([bins << 16], dtype=torch.int32).view(torch.float32))


class TealLinear(nn.Module):
    """A linear that takes inputs ``|x| <= threshold`` for 0.

    Args:
        linear: any linear of a :class:`~openwork.models.Llama`.
        threshold: 0 or more; 0 changes nothing.
    """

    def __init__(self, linear: nn.Module, threshold: float) -> None:
        super().__init__()
        self.linear, self.threshold = linear, threshold
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x [..., k] -> [..., n]``; ``add`` has the shape of the result."""
        y: Tensor = self.linear(x.masked_fill(x.abs() <= self.threshold, 0), add=add)
        return y


class CatsLinear(nn.Module):
    """The linear of gate and up, with gates of ``|silu(gate)| < threshold`` set to 0.

    ``silu(0) = 0``, so what ``silu(gate) * up`` gives there is 0.

    Args:
        linear: of ``[..., k] -> [..., 2 f]``, gate before up.
        threshold: 0 or more; 0 changes nothing.
    """

    def __init__(self, linear: nn.Module, threshold: float) -> None:
        super().__init__()
        self.linear, self.threshold = linear, threshold
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x [..., k] -> [..., 2 f]``; ``add`` has the shape of the result."""
        y: Tensor = self.linear(x, add=add)
        gate, up = y.chunk(2, dim=-1)
        zero = F.silu(gate.float()).abs() < self.threshold
        return torch.cat((gate.masked_fill(zero, 0), up), dim=-1)


@torch.no_grad()
def sparsify_activations(
    model: Llama, calibration: Tensor, share: float, *, method: Place, progress: bool = True
) -> dict[str, float]:
    """Find thresholds layer by layer and put them into ``model``.

    A layer's thresholds are found on what the layers before it give with theirs.

    Args:
        model: dense.
        calibration: ``[samples, length]`` int64 token ids.
        share: of the values to zero, 0 to 1, on the calibration text.
        method: ``"teal"``: inputs of all linears; ``"cats"``: the gates.
        progress: show a progress bar.

    Returns:
        The thresholds by the name of the linear, for :func:`set_thresholds`: they have no form in
        a file, and :func:`openwork.save` refuses a model with them.

    Raises:
        ValueError: an option out of its range, bad tokens, or a model that is not dense.
    """
    if method not in ("teal", "cats") or not 0 <= share <= 1:
        raise ValueError(
            "sparsify_activations: method 'teal' or 'cats' and share in 0 .. 1 expected, "
            f"got {method!r} and {share}"
        )
    check_dense("sparsify_activations", model)
    run = _Thresholds(method, share)
    calibrate(model, calibration, run, progress=progress)
    return run.found


def set_thresholds(model: Llama, thresholds: Mapping[str, float], *, method: Place) -> None:
    """Put thresholds into ``model`` in place.

    Args:
        model: the linears named get a threshold, whatever their storage.
        thresholds: from :func:`sparsify_activations`.
        method: the one they were found for.

    Raises:
        ValueError: a threshold below 0, or a name that is none of a linear.
    """
    places = {name: (parent, attribute) for name, parent, attribute in model.linears()}
    for name, threshold in thresholds.items():
        if name not in places or not threshold >= 0:
            raise ValueError(
                "set_thresholds: names of linears and thresholds of at least 0 expected, "
                f"got {name!r}: {threshold}"
            )
    for name, threshold in thresholds.items():
        parent, attribute = places[name]
        wrapper = TealLinear if method == "teal" else CatsLinear
        setattr(parent, attribute, wrapper(getattr(parent, attribute), threshold))


@torch.no_grad()
def skip_columns(model: Llama) -> None:
    """Let a token read only the columns of weights that thresholds leave, in place.

    Linears with a TEAL threshold, and those after gates with a CATS threshold (``mlp.down``),
    become :class:`~openwork.nn.ActiveLinear`: their weights lie column after column, in the dtype
    or the codes they have, and no longer in rows. Do it last, after quantizing and after
    ``model.to``. A model's results change by roundings, and where low-bit linears rounded their
    inputs to int8: column-skipping ones do not.

    Args:
        model: with thresholds, from :func:`sparsify_activations` or :func:`set_thresholds`.

    Raises:
        ValueError: a model without thresholds, or a linear after them that is neither dense, in
            float32 or bfloat16, nor low-bit; nothing has changed.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> set_thresholds(model, {"layers.1.mlp.down": 0.1}, method="teal")
        >>> skip_columns(model)
        >>> model.layers[1].mlp.down
        ActiveLinear(in_features=48, out_features=32, threshold=0.1, layout='columns_n16k1@1')
    """
    found = {name: getattr(parent, attribute) for name, parent, attribute in model.linears()}
    active: dict[str, ActiveLinear] = {}
    for name, linear in found.items():
        if isinstance(linear, TealLinear):
            active[name] = _by_columns(name, linear.linear, linear.threshold)
        elif isinstance(linear, CatsLinear):
            after = name.replace("gate_up", "down")
            if not isinstance(found[after], TealLinear):  # else with its own threshold
                active[after] = _by_columns(after, found[after], 0.0)
    if not active:
        raise ValueError("skip_columns: a model with thresholds expected, got one without")
    for name, linear in active.items():
        model.set_submodule(name, linear)


def _by_columns(name: str, linear: nn.Module, threshold: float) -> ActiveLinear:
    if isinstance(linear, LowbitLinear):
        w = linear.weight
        codes, scales, zeros = unpack_lowbit(w)
        columns = pack_lowbit_columns(codes, scales, zeros, bits=w.bits, group_size=w.group_size)
    elif isinstance(linear, nn.Linear) and linear.weight.dtype != torch.float16:
        columns = pack_columns(linear.weight.detach())
    else:
        raise ValueError(
            f"skip_columns: {name} must be dense, in float32 or bfloat16, or low-bit, got {linear}"
        )
    return ActiveLinear(columns, threshold, None if linear.bias is None else linear.bias.detach())


def _gate(gate_up: Tensor) -> Tensor:
    return F.silu(gate_up.chunk(2, dim=-1)[0].float())


class _Thresholds:
    """Thresholds as a calibration algorithm."""

    def __init__(self, method: Place, share: float) -> None:
        self.found: dict[str, float] = {}
        self._method, self._share = method, share

    def options(self) -> Mapping[str, Any]:
        return {"algorithm": self._method, "share": self._share}

    def statistic(self, linear: nn.Linear) -> MagnitudeHistogram:
        return MagnitudeHistogram(self._method)

    def compress(self, linear: nn.Linear, statistic: MagnitudeHistogram) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(statistic.quantile(self._share))}

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        threshold = float(tensors["threshold"])
        linear = getattr(parent, attribute)
        if self._method == "teal":
            setattr(parent, attribute, TealLinear(linear, threshold))
        elif attribute == "gate_up":
            setattr(parent, attribute, CatsLinear(linear, threshold))
        else:
            return
        self.found[name] = threshold
