"""Where contenders run and how they are timed: on the host by its clock (a GPU: bench/gpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from openwork.testing import OpCase, Sample
from openwork.timing import Contender, wall_seconds

AnyContender = TypeVar("AnyContender", bound=Contender)


class Device(Protocol):
    """What the suite asks of the place it runs on. ``name`` is torch's."""

    name: str

    def check(self, case: OpCase, sample: Sample) -> None:
        """Compare our result with the reference, as :meth:`OpCase.check`."""

    def bound(self, case: OpCase, sample: Sample) -> Callable[[], object]:
        """The call of our operator, operands in place."""

    def ready(self, contender: AnyContender) -> AnyContender:
        """The contender as it is timed, once its result has been checked."""

    def seconds(self, call: Callable[[], object]) -> float:
        """What ``call()`` takes."""


class Stream(Protocol):
    """Reads from memory in turns with other contenders."""

    def read_into(self, rates: list[float]) -> Contender:
        """Leaves its rates, bytes per second, in ``rates``."""


class Host:
    """The CPU."""

    name = "cpu"

    def check(self, case: OpCase, sample: Sample) -> None:
        case.check(sample)

    def bound(self, case: OpCase, sample: Sample) -> Callable[[], object]:
        return lambda: case.op(*sample.args, **sample.kwargs)

    def ready(self, contender: AnyContender) -> AnyContender:
        return contender

    def seconds(self, call: Callable[[], object]) -> float:
        return wall_seconds(call)


HOST = Host()
