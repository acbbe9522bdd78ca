"""KVQuant: grids that are not uniform, fitted to keys and values where the loss feels them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from openwork.kv_format import KVFormat
from openwork.kvcache.formats import Format
from openwork.models import Llama
from openwork.models.llama import Layer

_ITERATIONS = 50


def kvquant(
    model: Llama,
    calibration: Tensor,
    *,
    bits: int = 3,
    group_size: int = 64,
    outliers: float = 0.01,
    exact_first: int = 1,
    progress: bool = True,
) -> list[Format]:
    """Fit the formats of a model's caches on sample text (KVQuant).

    Keys are stored before rotation, with a scale and a minimum for each channel of ``group_size``
    tokens; values with one for each token and ``group_size`` channels. Between minimum and maximum
    lie ``2 ** bits`` levels, the same in a whole layer, that minimize the squared error weighted by
    the Fisher information: the squared gradient of the loss. The largest deviations of each token
    are kept exactly and do not stretch the range, and so are the first tokens of the text.

    Args:
        model: dense; gradients pass through its linears.
        calibration: ``[samples, length]`` int64, at least ``group_size`` tokens each.
        bits: 2, 3 or 4.
        group_size: 32, 64 or 128.
        outliers: share of the channels of a token to keep, rounded up; 0 for none.
        exact_first: first tokens of a text to keep exactly.
        progress: show a progress bar.

    Returns:
        A format for each layer.

    Raises:
        ValueError: options out of range, or samples of fewer tokens than a group.

    Source: Hooper et al., "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache
    Quantization", 2024, where ranges of keys are fixed in calibration: here each group has its own.
    """
    options: dict[str, Any] = {
        "group_size": group_size,
        "outliers": outliers,
        "exact_first": exact_first,
    }
    return kvquant_each(model, calibration, (bits,), progress=progress, **options)[bits]


def kvquant_each(
    model: Llama,
    calibration: Tensor,
    bits: Sequence[int],
    *,
    group_size: int = 64,
    outliers: float = 0.01,
    exact_first: int = 1,
    progress: bool = True,
) -> dict[int, list[Format]]:
    """:func:`kvquant` for several numbers of bits, with one pass over the text.

    Args:
        model, calibration, group_size, outliers, exact_first, progress: see :func:`kvquant`.
        bits: each 2, 3 or 4.

    Returns:
        Formats of each layer by bits.
    """
    if calibration.dim() != 2 or calibration.shape[1] < group_size or not 0 <= outliers < 1:
        raise ValueError(
            f"kvquant: calibration [samples, length of {group_size} or more] and outliers in 0 .. "
            f"1 expected, got {list(calibration.shape)} and {outliers}"
        )
    count = -int(-outliers * model.config.head_dim // 1)
    fits = [(_Fit(), _Fit()) for _ in model.layers]
    for tokens in track(calibration, description="kvquant", disable=not progress):
        for (key_fit, value_fit), (keys, values) in zip(
            fits, _with_gradients(model, tokens[None]), strict=True
        ):
            key_fit.add(_in_groups(keys, 0, group_size), outliers=count, channels=-1)
            value_fit.add(_in_groups(values, -1, group_size), outliers=count, channels=-2)

    def formats(bits: int) -> list[Format]:
        options: dict[str, Any] = {"group_size": group_size, "outliers": count}
        return [
            Format(
                KVFormat(bits, "channel", codebook=keys.levels(bits), **options),
                KVFormat(bits, "token", codebook=values.levels(bits), **options),
                rotate="read",
                exact_first=exact_first,
            )
            for keys, values in fits
        ]

    return {each: formats(each) for each in bits}


def fit_levels(x: Tensor, weights: Tensor, bits: int) -> Tensor:
    """The ``2 ** bits`` levels of the least weighted squared error, by k-means on a line.

    Lloyd's iteration from levels at equal distances, and from ones that halve the weight again and
    again; the better result counts, so it is never worse than the uniform grid.

    Args:
        x: any shape, float32.
        weights: alike, not negative.
        bits: 1 to 8.

    Returns:
        ``[2 ** bits]`` float32, rising.

    Example:
        >>> fit_levels(torch.tensor([0.0, 0.1, 0.9, 1.0]), torch.ones(4), 1)
        tensor([0.0500, 0.9500])
    """
    x, order = x.flatten().double().sort()
    w = weights.flatten().double()[order]
    # The sum of any range of sorted values is a difference of two running sums.
    sums = torch.stack((w, w * x, w * x * x)).cumsum(-1)
    sums = F.pad(sums, (1, 0))
    places = torch.linspace(0, 1, 2**bits, dtype=torch.float64)
    uniform = x[0] + places * (x[-1] - x[0])
    quantiles = x[torch.searchsorted(sums[0], places * sums[0, -1]).clamp(1, len(x)) - 1]
    fitted = [_lloyd(x, sums, start) for start in (uniform, quantiles)]
    error, levels = min(fitted, key=lambda result: result[0])
    del error
    return levels.float()


def _lloyd(x: Tensor, sums: Tensor, levels: Tensor) -> tuple[float, Tensor]:
    """Error and levels after the iteration."""
    for _ in range(_ITERATIONS):
        count, total, _ = _cells(x, sums, levels)
        # A level that no value is nearest to stays where it is.
        levels = torch.where(count > 0, total / count.clamp(min=1e-300), levels).sort().values
    count, total, squares = _cells(x, sums, levels)
    return float((squares - 2 * levels * total + levels * levels * count).sum()), levels


def _cells(x: Tensor, sums: Tensor, levels: Tensor) -> Tensor:
    """Weight, weighted sum and sum of squares of the values nearest to each level: ``[3, k]``."""
    borders = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
    ends = F.pad(borders, (1, 0))
    ends = torch.cat((ends, ends.new_tensor([len(x)])))
    return sums[:, ends].diff(dim=-1)


class _Observed(NamedTuple):
    """Values of a layer and how much the loss feels them, ``[n, g, d]`` each, or in groups."""

    x: Tensor
    fisher: Tensor


def _in_groups(observed: _Observed, dim: int, size: int) -> _Observed:
    """Groups along ``dim``, which becomes two: ``[groups, size]``; what is left over is not."""
    dim %= observed.x.dim()
    size = min(size, observed.x.shape[dim])
    whole = observed.x.shape[dim] // size * size
    return _Observed(*(y.narrow(dim, 0, whole).unflatten(dim, (-1, size)) for y in observed))


class _Fit:
    """Collects normalized values with their weights."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, observed: _Observed, *, outliers: int, channels: int) -> None:
        """Account for groups without the outliers of each token, which are kept exactly.

        Args:
            observed: for keys ``[groups, size, g, d]``, a group being a channel of several tokens;
                for values ``[n, g, groups, size]``, several channels of a token.
            outliers: of a token.
            channels: -1 for keys, whose channels are the last dimension; -2 for values, where they
                are the last two.
        """
        x, fisher = observed
        group = 1 if channels == -1 else 3
        inside = torch.ones_like(x, dtype=torch.bool)
        if outliers:
            far = (x - x.mean(group, keepdim=True)).abs().flatten(channels)
            most = far.topk(outliers, dim=-1).indices
            inside = inside.flatten(channels).scatter_(-1, most, False).view_as(x)
        low = x.masked_fill(~inside, torch.inf).amin(group, keepdim=True)
        span = x.masked_fill(~inside, -torch.inf).amax(group, keepdim=True) - low
        usable = inside & (span > 0) & span.isfinite()
        self._values.append(((x - low) / span)[usable])
        # An error of the normalized value is `span` times as large in x.
        self._weights.append((fisher * span.square())[usable])

    def levels(self, bits: int) -> tuple[float, ...]:
        weights = torch.cat(self._weights)
        if not bool((weights > 0).any()):
            weights = torch.ones_like(weights)
        levels: list[float] = fit_levels(torch.cat(self._values), weights, bits).tolist()
        return tuple(levels)


def _with_gradients(model: Llama, tokens: Tensor) -> list[tuple[_Observed, _Observed]]:
    """Keys before rotation and values of each layer, for one sample."""
    outputs: list[Tensor] = []
    layers = [cast(Layer, layer) for layer in model.layers]

    def start(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.requires_grad_()

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    with torch.enable_grad():
        handles = [model.embed.register_forward_hook(start)]
        handles += [layer.attn.qkv.register_forward_hook(keep) for layer in layers]
        try:
            logits = model(tokens)[0, :-1]
        finally:
            for handle in handles:
                handle.remove()
        F.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum").backward()
    return [_observed(layer, output) for layer, output in zip(layers, outputs, strict=True)]


def _observed(layer: Layer, output: Tensor) -> tuple[_Observed, _Observed]:
    h, g, e = layer.heads, layer.kv_heads, layer.head_dim
    gradient = torch.zeros_like(output) if output.grad is None else output.grad
    x, slope = (y.detach()[0].float().view(-1, h + 2 * g, e) for y in (output, gradient))
    fisher = slope.square()
    return (
        _Observed(x[:, h : h + g], fisher[:, h : h + g]),
        _Observed(x[:, h + g :], fisher[:, h + g :]),
    )
