"""The machine under test: what it is, whether it is quiet, and what it can do at most.

Peaks are measured, never read from a data sheet:

    read rate    sum over threads of bytes streamed from a 512 MiB buffer of 2 MiB pages, per second
    peak[unit]   sum over threads of multiply-adds per second, counted as two operations, of the
                 instruction the tier multiplies with: fp32 FMA, bf16 dot, int8 dot
"""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from threading import Barrier
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openwork.cli import llama_cpp
from openwork.timing import Contender

HUGE_PAGE = 2 << 20
STREAM_BYTES = 512 << 20
# Of the samples between those of a row's contenders: some milliseconds.
READ_BYTES = 128 << 20
UNITS = ("fp32", "bf16", "int8")
TRIES = 7
# A try must last long enough for the clock and the barrier not to matter.
PEAK_SECONDS = 0.05
# Two cores of one chip share power and memory; a second thread that adds less than this is not on
# a core of its own, because another process is.
MIN_SCALING = 0.9
# Share of the CPUs in use by others above which timings are not worth taking.
MAX_LOAD = 0.1
PACKAGES = ("torch", "numpy", "onnxruntime", "onnx", "llama-cpp-python", "xllamacpp")


@dataclass
class Peaks:
    """Rates of ``threads`` threads at once: every try, bytes/s and operations/s."""

    threads: int
    read: list[float] = field(default_factory=list)
    ops: dict[str, list[float]] = field(default_factory=lambda: {unit: [] for unit in UNITS})

    def read_rate(self) -> float:
        """Best streaming read rate in bytes/s. A roof is what the machine can do, so: the best."""
        return max(self.read)

    def ops_rate(self, unit: str) -> float:
        """Best rate of ``unit`` in operations/s; a tier without the unit computes in fp32."""
        return max(self.ops[unit] or self.ops["fp32"])

    def extend(self, later: Peaks) -> None:
        """Add the tries of another measurement with as many threads."""
        self.read += later.read
        for unit in UNITS:
            self.ops[unit] += later.ops[unit]

    def summary(self) -> dict[str, Any]:
        """Best and median of every peak, in GB/s and GFLOP/s."""
        rates = {"read_gb_s": self.read, **{f"{unit}_gop_s": self.ops[unit] for unit in UNITS}}
        return {
            "threads": self.threads,
            **{
                name: {"best": max(tries) / 1e9, "median": median(tries) / 1e9}
                for name, tries in rates.items()
                if tries
            },
        }


@dataclass
class Machine:
    """Everything a reader needs to judge a row. Serialized as ``machine`` in result files."""

    cpu: str
    cores: int
    last_level_cache: int
    memory_bytes: int
    system: str
    python: str
    versions: dict[str, str]
    ggml: str
    git: str
    tier: str
    gpu: str
    load_average: list[float]
    busy: float
    peaks: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _signature() -> str:
    """Vendor family/model/stepping, because virtual machines hide the CPU's name."""
    wanted = {"cpu family": "", "model": "", "stepping": ""}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in wanted and not wanted[key.strip()]:
            wanted[key.strip()] = value.strip()
    return "/".join(wanted.values())


def last_level_cache() -> int:
    """Bytes of the largest cache CPU 0 reads through; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in units
    ]
    return max(sizes, default=32 << 20)


def memory_bytes() -> int:
    """Bytes of memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> str:
    """Commit of the working tree, with ``+dirty`` for uncommitted changes; "" outside of git."""
    root = Path(__file__).parent
    command = ("git", "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _busy(seconds: float) -> float:
    """Share of all CPUs in use during the next ``seconds``, by other processes as we sleep."""

    def ticks() -> tuple[int, int]:
        # user nice system idle iowait irq softirq steal, in ticks since boot
        fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = ticks()
    time.sleep(seconds)
    later_total, later_idle = ticks()
    return 1 - (later_idle - idle) / max(later_total - total, 1)


def describe(tier: str, gpu: str = "") -> Machine:
    """Look at the machine; takes half a second to see how busy it is.

    Args:
        tier: of the kernels that are timed.
        gpu: that they run on, if they do not run on the CPU.
    """
    busy = _busy(0.5)
    machine = Machine(
        cpu=f"{_cpu_name()} ({_signature()})",
        cores=os.cpu_count() or 1,
        last_level_cache=last_level_cache(),
        memory_bytes=memory_bytes(),
        system=platform.platform(),
        python=sys.version.split()[0],
        versions={name: found for name in PACKAGES if (found := _version(name))},
        ggml=llama_cpp.describe(),
        git=_git(),
        tier=tier,
        gpu=gpu,
        load_average=[round(value, 2) for value in os.getloadavg()],
        busy=round(busy, 3),
    )
    if busy > MAX_LOAD:
        machine.warnings.append(
            f"other processes use {busy:.0%} of the CPUs; times and shares are not reliable"
        )
    return machine


def huge_buffer(size: int) -> NDArray[np.uint8]:
    """``[size]`` uint8 of touched memory, aligned to 2 MiB and advised to use such pages."""
    region = mmap.mmap(-1, size + HUGE_PAGE)
    region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    buffer = whole[start : start + size]
    # Written, not only read: untouched pages all map to one page of zeros, which stays in cache.
    buffer[:] = 1
    return buffer


def _together(threads: int, work: Callable[[int], float]) -> list[float]:
    """Run ``work(i)`` on ``threads`` threads that start at once; their results."""
    barrier = Barrier(threads)

    def start(index: int) -> float:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(start, range(threads)))


def _has_unit(unit: str, tier: str) -> bool:
    """Whether ``tier`` has an instruction for ``unit``."""
    from openwork import _kernels

    try:
        _kernels.peak_ops(unit, tier, 0.0)
    except ValueError:
        return False
    return True


def _peak(unit: str, tier: str, index: int) -> float:
    """Operations per second of one thread, whatever its ``index``."""
    from openwork import _kernels

    return float(_kernels.peak_ops(unit, tier, PEAK_SECONDS))


class ReadStream:
    """Streams from memory on all threads at once.

    Args:
        threads: that read.
        tier: whose loop of the test module ``openwork._kernels`` they run.
        buffer_bytes: walked through from one measurement to the next.
    """

    def __init__(self, threads: int, tier: str, buffer_bytes: int = STREAM_BYTES) -> None:
        self.threads, self.tier = threads, tier
        share = buffer_bytes // threads // HUGE_PAGE * HUGE_PAGE
        buffer = huge_buffer(share * threads)
        self._parts = [buffer[index * share : (index + 1) * share] for index in range(threads)]
        self._begin = 0

    def rate(self, count: int = READ_BYTES) -> float:
        """Bytes per second over the next ``count`` bytes, or to the end of the buffer."""
        from openwork import _kernels

        begin, size = self._begin, len(self._parts[0])
        end = min(begin + max(HUGE_PAGE, count // self.threads), size)
        parts = [part[begin:end] for part in self._parts]
        self._begin = 0 if end == size else end
        seconds = _together(
            self.threads, lambda i: float(_kernels.stream_read(parts[i], 1, self.tier))
        )
        return sum((end - begin) / s for s in seconds)

    def read_into(self, rates: list[float]) -> Contender:
        """Takes turns with other contenders and leaves its rates in ``rates``."""
        return Contender(lambda _: rates.append(self.rate()), groups=1, calls=1)


def measure_peaks(
    threads: int, tier: str, *, tries: int = TRIES, buffer_bytes: int = STREAM_BYTES
) -> Peaks:
    """Measure the read rate and the peaks of the tier's units on ``threads`` threads.

    The measured loops are those of the test module ``openwork._kernels``. The kinds of peak are
    interleaved, so that a slow moment of the machine does not hit all tries of one kind.
    """
    peaks = Peaks(threads)
    stream = ReadStream(threads, tier, buffer_bytes)
    units = [unit for unit in UNITS if _has_unit(unit, tier)]
    for _ in range(tries):
        for unit in units:
            rates = _together(threads, partial(_peak, unit, tier))
            peaks.ops[unit].append(sum(rates))
        peaks.read.append(stream.rate(buffer_bytes))
    return peaks


def scaling_warning(single: Peaks, many: Peaks) -> str | None:
    """Says so when the threads did not have a core each: their FMA peaks must add up."""
    scaling = many.ops_rate("fp32") / (single.ops_rate("fp32") * many.threads)
    if scaling >= MIN_SCALING:
        return None
    return (
        f"{many.threads} threads reach {scaling:.0%} of {many.threads} times one thread's fp32 "
        "peak; the cores are shared and rows of this run must not be used"
    )
