"""With zeros or without: which form of a pruned linear is faster here, by measuring both.

The linears are the model's own. Those of one shape run one after the other, as they would for a
token, so that a weight comes from as far away as it does in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from rich.progress import track
from torch import nn

from openwork.nn import LowbitLinear, NmLinear, SparseLinear
from openwork.prune.masks import NM
from openwork.prune.storage import without_zeros
from openwork.timing import Contender, interleave

if TYPE_CHECKING:
    from openwork.models import Llama

# Rows of x: a token of an answer, and a prompt.
TOKENS = (1, 128)
# Times closer than this count as equal.
_NOISE = 0.05
_ROUNDS, _SECONDS = 7, 0.05


@dataclass(frozen=True)
class ShapeReport:
    """The linears of one shape.

    Attributes:
        shape: ``(n, k)``.
        names: of the linears, such as ``"layers.3.attn.qkv"``.
        bytes_dense: of all their weights with zeros, on a grid or not.
        bytes_sparse: of the same without zeros, as the kernels read them.
        seconds_dense: of one linear, with 1 token and with 128.
        seconds_sparse: alike.
        stored_sparse: whether they hold no zeros now.
    """

    shape: tuple[int, int]
    names: tuple[str, ...]
    bytes_dense: int
    bytes_sparse: int
    seconds_dense: tuple[float, float]
    seconds_sparse: tuple[float, float]
    stored_sparse: bool

    @property
    def recommendation(self) -> str:
        """What to store, and what it costs.

        Example:
            >>> ShapeReport((8, 8), ("a",), 2, 1, (2e-6, 4e-6), (1e-6, 5e-6), True).recommendation
            'sparse; slower at 128 tokens'
        """
        if pays(self.seconds_dense, self.seconds_sparse):
            slower = self.seconds_sparse[1] > self.seconds_dense[1]
            return "sparse; slower at 128 tokens" if slower else "sparse"
        if self.seconds_sparse[1] > self.seconds_dense[1]:
            return "dense; sparse is slower at both"
        return "dense; sparse is slower at 1 token"


def pays(dense: tuple[float, float], sparse: tuple[float, float]) -> bool:
    """Whether to leave the zeros out: the time of one token decides, and of equals the prompt's.

    Example:
        >>> pays((1.0, 9.0), (0.8, 10.0)), pays((1.0, 9.0), (1.2, 8.0))
        (True, False)
    """
    if abs(sparse[0] - dense[0]) > _NOISE * dense[0]:
        return sparse[0] < dense[0]
    return sparse[1] < dense[1]


@torch.inference_mode()
def leave_out_zeros(
    model: Llama,
    pattern: str | NM | None,
    *,
    when: Literal["faster", "always"] = "faster",
    progress: bool = True,
) -> tuple[ShapeReport, ...]:
    """Replace pruned linears of the layers, in place, by ones that do not store zeros.

    They become :class:`~openwork.nn.NmLinear` or :class:`~openwork.nn.SparseLinear`; see
    :func:`~openwork.prune.storage.without_zeros`. Each shape is measured in the model's dtype.
    :func:`openwork.save` writes the result smaller.

    Args:
        model: pruned, in the dtype in which it is going to run.
        pattern: ``"N:M"``, ``"V:N:M"``, or None for zeros anywhere, as it was pruned with.
        when: ``"faster"`` leaves linears of shapes that would be slower as they are.
        progress: show a progress bar.

    Returns:
        A report for each shape that has a form without zeros.

    Raises:
        ValueError: a weight that does not have the pattern, or is of another dtype than float32 and
            bfloat16.

    Example:
        >>> from openwork.models import Llama, LlamaConfig
        >>> from openwork.prune import prune_model
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> _ = prune_model(model, "magnitude", pattern="2:4", progress=False)
        >>> reports = leave_out_zeros(model, "2:4", when="always", progress=False)
        >>> type(model.layers[0].mlp.down).__name__
        'NmLinear'
    """
    parsed = NM.parse(pattern) if isinstance(pattern, str) else pattern
    shapes: dict[tuple[int, int], list[_Place]] = {}
    for name, parent, attribute in model.linears():
        linear = getattr(parent, attribute)
        if isinstance(linear, (nn.Linear, LowbitLinear)):
            shape = (linear.out_features, linear.in_features)
            shapes.setdefault(shape, []).append(_Place(name, parent, attribute))
    reports = []
    for shape, places in track(shapes.items(), "measuring", disable=not progress):
        dense = [getattr(place.parent, place.attribute) for place in places]
        sparse = [form for linear in dense if (form := without_zeros(linear, parsed)) is not None]
        if len(sparse) < len(dense):
            continue
        report = _measure(shape, places, dense, sparse, model.dtype, when)
        if report.stored_sparse:
            for place, form in zip(places, sparse, strict=True):
                setattr(place.parent, place.attribute, form)
        reports.append(report)
    return tuple(reports)


class _Place(NamedTuple):
    name: str
    parent: nn.Module
    attribute: str


def _measure(
    shape: tuple[int, int],
    places: list[_Place],
    dense: list[nn.Linear | LowbitLinear],
    sparse: list[NmLinear | SparseLinear],
    dtype: torch.dtype,
    when: Literal["faster", "always"],
) -> ShapeReport:
    seconds = [_seconds(dense, sparse, tokens, dtype) for tokens in TOKENS]
    (dense_one, sparse_one), (dense_many, sparse_many) = seconds
    times_dense, times_sparse = (dense_one, dense_many), (sparse_one, sparse_many)
    return ShapeReport(
        shape=shape,
        names=tuple(place.name for place in places),
        bytes_dense=sum(linear.weight.nbytes for linear in dense),
        bytes_sparse=sum(linear.weight.nbytes for linear in sparse),
        seconds_dense=times_dense,
        seconds_sparse=times_sparse,
        stored_sparse=when == "always" or pays(times_dense, times_sparse),
    )


def _seconds(
    dense: list[nn.Linear | LowbitLinear],
    sparse: list[NmLinear | SparseLinear],
    tokens: int,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Of one linear of either kind."""
    x = torch.randn(tokens, dense[0].in_features, dtype=dtype)

    def contender(linears: Sequence[nn.Module]) -> Contender:
        def run(_: int) -> None:
            for linear in linears:
                linear(x)

        return Contender(run, groups=1, calls=len(linears))

    times = interleave(
        {"dense": contender(dense), "sparse": contender(sparse)}, rounds=_ROUNDS, seconds=_SECONDS
    )
    return times["dense"].median, times["sparse"].median
