"""Interleaved timing: every contender takes a turn in every round, in one process.

A machine that is shared drifts by more than the differences of interest, so contenders are never
timed one after the other. A turn is one untimed call, which wakes the threads and fills the branch
predictors, and then timed samples until the turn's share of time is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

from rich.progress import Progress

# OpenMP and onnxruntime workers spin for some milliseconds after a call; on few cores they would
# run on a core of whoever comes next.
SETTLE_SECONDS = 0.01
MIN_ROUNDS = 15
MIN_SECONDS = 0.3


@dataclass(frozen=True)
class Contender:
    """Something to time: ``run(i)`` makes ``calls`` calls on data set ``i < groups``."""

    run: Callable[[int], object]
    groups: int
    calls: int


def wall_seconds(call: Callable[[], object]) -> float:
    """What ``call()`` takes by the clock of the host."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Times:
    """Seconds per call: median, interquartile range, fastest, and the number of samples."""

    median: float
    iqr: float
    best: float
    samples: int


def summarize(samples: list[float]) -> Times:
    """Median and interquartile range of ``samples`` (at least two)."""
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Times(median(samples), high - low, min(samples), len(samples))


def interleave(
    contenders: Mapping[str, Contender],
    *,
    rounds: int = MIN_ROUNDS,
    seconds: float = MIN_SECONDS,
    settle: float = SETTLE_SECONDS,
    progress: str | None = None,
    timer: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, Times]:
    """Time all contenders round-robin.

    Args:
        contenders: name to contender; each walks through its data sets from turn to turn.
        rounds: turns of each contender, at least 2.
        seconds: least time measured of each contender over all rounds; a turn holds as many
            samples as that needs.
        settle: pause before each turn.
        progress: name of a progress bar to show, or None.
        timer: what gives the seconds of a call: by the host's clock, or by a GPU's events.

    Returns:
        Name to seconds per call.
    """
    if rounds < 2:
        raise ValueError(f"interleave: rounds must be at least 2, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    position = dict.fromkeys(contenders, 0)
    turn_seconds = seconds / rounds

    # Drawn between turns only: a thread that redraws the bar would take time from the contenders.
    with Progress(auto_refresh=False, disable=progress is None) as bar:
        task = bar.add_task(progress or "", total=rounds * len(contenders))
        for name, contender in [*contenders.items()] * rounds:
            time.sleep(settle)
            contender.run(position[name] % contender.groups)
            position[name] += 1
            spent = 0.0
            while True:
                group = position[name] % contender.groups
                position[name] += 1
                elapsed = timer(partial(contender.run, group))
                spent += elapsed
                samples[name].append(elapsed / contender.calls)
                if spent >= turn_seconds or elapsed <= 0:
                    break
            bar.update(task, advance=1, refresh=True)
    return {name: summarize(values) for name, values in samples.items()}
