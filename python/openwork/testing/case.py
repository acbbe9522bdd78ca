"""One description of an operator, from which tests and benchmarks are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["fp32", "bf16", "int8"]

# Unit roundoffs: half the distance from 1 to the next number.
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Smallest normal numbers; below, the absolute rounding error stops shrinking.
TINY = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-14}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """Arguments that must be refused with a ``ValueError`` whose text contains ``message``.

    ``of_values``: for what the tensors hold, which a fake implementation does not see.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    message: str
    of_values: bool = False


@dataclass(frozen=True)
class Workload:
    """A call worth timing. ``make()`` gives a new sample, so that data can be kept out of cache."""

    params: Mapping[str, Any]
    make: Callable[[], Sample]


@dataclass(frozen=True)
class Cost:
    """Bytes a call must move and operations it must execute (multiply and add count as two).

    ``unit`` names the multiplier the kernel uses, whose measured peak is the roof.
    """

    bytes: int
    ops: int
    unit: Unit


@dataclass(frozen=True)
class OpCase:
    """One operator: how to call it, what it computes, where it breaks, what it costs.

    Attributes:
        name: of the operator in ``torch.ops.openwork``.
        op: the public wrapper.
        reference: same arguments as ``op``; readable plain torch, in float64.
        tolerance: ``(sample, expected) -> `` largest error allowed in each element of each
            result, derived from the arithmetic; an integer result gets 0.
        raw: ``sample -> `` positional arguments of the raw operator, for ``opcheck``.
        samples: small and nasty calls.
        rejects: calls that must fail.
        workloads: real layer shapes, for the benchmarks.
        gpu_workloads: those for GPUs; their params say ``device="cuda"``.
        cost: of a workload's params; None where there are no workloads.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    tolerance: Callable[[Sample, tuple[Tensor, ...]], tuple[Tensor | float, ...]]
    raw: Callable[[Sample], tuple[Any, ...]]
    samples: Callable[[], Sequence[Sample]]
    rejects: Callable[[], Sequence[Reject]]
    workloads: Sequence[Workload] = ()
    gpu_workloads: Sequence[Workload] = ()
    cost: Callable[[Mapping[str, Any]], Cost] | None = None

    def check(self, sample: Sample) -> None:
        """Run the operator on ``sample`` and compare with the reference.

        Raises:
            AssertionError: naming the sample, the result, the worst element and its bound.
        """
        results = as_tuple(self.op(*sample.args, **sample.kwargs))
        expected = as_tuple(self.reference(*sample.args, **sample.kwargs))
        bounds = self.tolerance(sample, expected)
        for i, (got, want, bound) in enumerate(zip(results, expected, bounds, strict=True)):
            where = f"{self.name}[{sample.name}], result {i}"
            assert got.shape == want.shape, f"{where}: shape {want.shape}, got {got.shape}"
            if got.numel() == 0:
                continue
            error = (got.double() - want.double()).abs()
            same = (got.double() == want.double()) | (got.isnan() & want.isnan())
            excess = torch.where(same, 0.0, error / torch.as_tensor(bound).clamp(min=1e-300))
            # A NaN on one side only leaves an error of NaN, which no bound admits.
            excess = excess.nan_to_num(nan=float("inf"))
            worst = int(excess.argmax())
            assert excess.max() <= 1, (
                f"{where}: element {worst} is {got.flatten()[worst]}, expected "
                f"{want.flatten()[worst]}: {excess.max():.3g} times the allowed error"
            )


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """Results of an operator that returns one tensor, several, or nothing."""
    if isinstance(result, Tensor):
        return (result,)
    if result is None:
        return ()
    return tuple(item for item in result if item is not None)
