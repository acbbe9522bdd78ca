"""The suite on a GPU: operands there, calls in CUDA graphs, times by events, roofs measured.

The operators are experimental there. Nothing here imports or needs CUDA before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

import openwork
from bench.device import AnyContender
from bench.machine import Peaks
from openwork.testing import OpCase, Sample
from openwork.timing import Contender

# A product of matrices of this size takes all multiprocessors many times over.
PEAK_SIZE = 8192
TRIES = 7
STREAM_BYTES = 1 << 30


def missing() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if openwork.info().cuda != "loaded":
        return f"the CUDA operators are {openwork.info().cuda}"
    return None


def has_kernel(op: str) -> bool:
    """Whether the operator is implemented for GPUs."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"openwork::{op}", "CUDA"))


def _moved(values: Any, device: str) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


class Gpu:
    """torch's current GPU.

    Args:
        name: of torch's device.
        operators: the namespace whose operators run there.
    """

    def __init__(self, name: str = "cuda", operators: Any = torch.ops.openwork) -> None:
        self.name, self._operators = name, operators

    def check(self, case: OpCase, sample: Sample) -> None:
        def op(*args: Any, **kwargs: Any) -> Any:
            return _moved(self.bound(case, Sample(sample.name, args, kwargs))(), "cpu")

        replace(case, op=op).check(sample)

    def bound(self, case: OpCase, sample: Sample) -> Callable[[], object]:
        overload = getattr(self._operators, case.name).default
        raw = _moved(case.raw(sample), self.name)
        return lambda: overload(*raw)

    def ready(self, contender: AnyContender) -> AnyContender:
        """Each group of calls as a CUDA graph: a kernel may be done before Python calls the next.

        Memory that the calls allocate is the graph's, so that results stay where they are.
        """
        replays = [self.captured(partial(contender.run, i)) for i in range(contender.groups)]
        return replace(contender, run=lambda group: replays[group]())

    def captured(self, calls: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Libraries choose kernels and allocate workspaces in the first call.
            calls()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return graph.replay

    def seconds(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def describe() -> str:
    """Name and size of the GPU, and the versions beside it."""
    of = torch.cuda.get_device_properties(0)
    return (
        f"{of.name}, {of.multi_processor_count} multiprocessors, {of.total_memory >> 30} GiB, "
        f"CUDA {torch.version.cuda}"
    )


def tier() -> str:
    """Compute capability, as in ``sm_90``."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def cache_bytes() -> int:
    """Bytes of the cache that all multiprocessors share."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


class ReadStream:
    """Reads from the GPU's memory, as torch's sum does."""

    def __init__(self, gpu: Gpu, count: int = STREAM_BYTES) -> None:
        self._gpu, self._buffer = gpu, torch.ones(count // 4, device=gpu.name)

    def rate(self) -> float:
        """Bytes per second."""
        return self._buffer.nbytes / self._gpu.seconds(lambda: self._buffer.sum())

    def read_into(self, rates: list[float]) -> Contender:
        """Takes turns with other contenders and leaves its rates in ``rates``."""
        return Contender(lambda _: rates.append(self.rate()), groups=1, calls=1)


def measure_peaks(
    gpu: Gpu, stream: ReadStream, *, size: int = PEAK_SIZE, tries: int = TRIES
) -> Peaks:
    """The read rate, and operations per second of torch's products of square matrices."""
    peaks = Peaks(threads=1)
    floats = torch.ones(size, size, device=gpu.name)
    halves, codes = floats.half(), floats.to(torch.int8)
    products = {
        "fp32": lambda: floats @ floats,
        "bf16": lambda: halves @ halves,
        "int8": lambda: torch._int_mm(codes, codes),
    }
    for product in products.values():
        product()
    for _ in range(tries):
        for unit, product in products.items():
            peaks.ops[unit].append(2 * size**3 / gpu.seconds(product))
        peaks.read.append(stream.rate())
    return peaks
