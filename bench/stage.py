"""All that a run needs of the machine: what it is, what it can do at most, how it keeps time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import openwork
from bench import gpu, machine, suite
from bench.device import HOST, Device, Stream
from bench.machine import Machine, Peaks


@dataclass(frozen=True)
class Stage:
    """Where the contenders of a run appear.

    Attributes:
        about: the machine.
        tier: of our kernels.
        device: that they run on.
        stream: reads from its memory.
        peaks: measured before the rows; ``measure()`` measures them again.
        cold_bytes: see :func:`bench.suite.cold_bytes`.
    """

    about: Machine
    tier: str
    device: Device
    stream: Stream
    peaks: Peaks
    measure: Callable[[], Peaks]
    cold_bytes: int


def measure_host(threads: int, tier: str) -> tuple[Peaks, str | None]:
    """Peaks of ``threads`` threads, and a warning if they did not have a core each."""
    single = machine.measure_peaks(1, tier)
    if threads == 1:
        return single, None
    peaks = machine.measure_peaks(threads, tier)
    return peaks, machine.scaling_warning(single, peaks)


def on_host(threads: int) -> Stage:
    """The CPU."""
    tier = openwork.isa()
    about = machine.describe(tier)
    peaks, warning = measure_host(threads, tier)
    about.warnings += [warning] if warning else []
    return Stage(
        about=about,
        tier=tier,
        device=HOST,
        stream=machine.ReadStream(threads, tier),
        peaks=peaks,
        measure=lambda: machine.measure_peaks(threads, tier),
        cold_bytes=suite.cold_bytes(about.last_level_cache, about.memory_bytes),
    )


def on_gpu() -> Stage:
    """torch's current GPU; :func:`bench.gpu.missing` says whether there is one."""
    device = gpu.Gpu()
    stream = gpu.ReadStream(device)

    def measure() -> Peaks:
        return gpu.measure_peaks(device, stream)

    return Stage(
        about=machine.describe(gpu.tier(), gpu.describe()),
        tier=gpu.tier(),
        device=device,
        stream=stream,
        peaks=measure(),
        measure=measure,
        cold_bytes=suite.COLD_CACHES * gpu.cache_bytes(),
    )
