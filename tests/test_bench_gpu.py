"""The benchmark on a GPU, which most of these tests do without: they run emulated operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import openwork
from bench import __main__ as cli
from bench import gpu, machine, report, suite
from bench.competitors import GPU_COMPETITORS
from bench.device import AnyContender
from bench.hadamard_problem import HadamardProblem
from bench.machine import Peaks
from bench.problem import Competitor, Problem, check, tolerance
from bench.sparse_problem import NmProblem
from openwork.timing import Contender, wall_seconds

EMULATED = Path(openwork.__file__).with_name("openwork_emulated.so")
PEAKS = Peaks(1, read=[3e12], ops={"fp32": [6e13], "bf16": [9e14], "int8": [2e15]})
DEVICE = "cpu" if gpu.missing() else "cuda"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason=str(gpu.missing()))


class EmulatedGpu(gpu.Gpu):
    """The operators' CUDA code on the CPU, without graphs and events."""

    def __init__(self) -> None:
        torch.ops.load_library(str(EMULATED))
        super().__init__("cpu", torch.ops.openwork_emulated)

    def ready(self, contender: AnyContender) -> AnyContender:
        return contender

    def seconds(self, call: Callable[[], object]) -> float:
        return wall_seconds(call)


@pytest.fixture
def emulated() -> EmulatedGpu:
    if not EMULATED.is_file():
        pytest.skip("built without OPENWORK_CUDA_EMULATION")
    return EmulatedGpu()


def test_workloads_say_that_they_are_for_gpus() -> None:
    items = list(suite.gpu_items(""))
    assert {item.case.name for item in items} == set(GPU_COMPETITORS)
    assert all(item.params["device"] == "cuda" for item in items)
    assert all(item.cost.bytes > 0 and item.cost.unit in ("bf16", "int8", "fp32") for item in items)
    assert [item.name for item in suite.gpu_items("hadamard m=64 block=128")] == [
        "hadamard m=64 d=4096 block=128 dtype=float16 device=cuda"
    ]
    assert not any("device=cuda" in item.name for item in suite.items("", 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_run_without_a_gpu_says_why() -> None:
    result = CliRunner().invoke(cli.app, ["run", "--device", "cuda"])
    assert result.exit_code == 2
    assert "bench: --device cuda needs a GPU and the CUDA operators: torch" in result.output
    listed = CliRunner().invoke(cli.app, ["run", "--device", "cuda", "--list"])
    assert listed.exit_code == 0
    assert "lowbit_linear m=1 n=4096" in listed.output


def test_operators_without_a_kernel_are_named() -> None:
    items = [item for item in suite.gpu_items("m=1") if not gpu.has_kernel(item.case.name)]
    with cli.console.capture() as captured:
        assert cli._with_kernels(items) == []
    for item in items:
        assert f"skipped {item.case.name}: it has no kernel for GPUs" in captured.get()


def test_run_writes_rows_of_emulated_operators(emulated: EmulatedGpu, tmp_path: Path) -> None:
    (item,) = suite.gpu_items("hadamard m=64 block=128")
    settings = suite.Settings(1, cold_bytes=1, rounds=2, seconds=0.0, device=emulated)
    stream = gpu.ReadStream(emulated, 1 << 20)
    rows: list[report.Row] = []
    before = torch.get_num_threads()
    try:
        assert suite.run([item], settings, PEAKS, stream, cli.console, rows.append) == []
    finally:
        torch.set_num_threads(before)
    path = tmp_path / "rows.json"
    report.write(path, {}, suite.add_rates(rows, "sm_80", PEAKS))
    (row,) = report.read(path)[1]
    assert row["tier"] == "sm_80"
    assert set(row["speedup"]) == {"torch_matmul", "torch_butterfly"}
    assert row["read_gb_s"] > 0


def test_wrong_results_are_not_timed(emulated: EmulatedGpu) -> None:
    (item,) = suite.gpu_items("hadamard m=64 block=128")
    sample = item.workload.make()
    emulated.check(item.case, sample)
    x, block = sample.args
    assert torch.equal(emulated.bound(item.case, sample)(), openwork.ops.hadamard(x, block))

    class Wrong:
        class hadamard:
            default = staticmethod(lambda x, block: x)

    with pytest.raises(AssertionError, match="times the allowed error"):
        gpu.Gpu("cpu", Wrong).check(item.case, sample)


def test_peaks_of_all_units(emulated: EmulatedGpu) -> None:
    stream = gpu.ReadStream(emulated, 1 << 20)
    peaks = gpu.measure_peaks(emulated, stream, size=64, tries=1)
    assert peaks.read_rate() > 0
    assert all(peaks.ops_rate(unit) > 0 for unit in machine.UNITS)


def test_machine_line_names_the_gpu() -> None:
    line = report.machine_line({"gpu": "some GPU", "cpu": "some CPU", "tier": "sm_90"})
    assert line.startswith("some GPU beside some CPU")


def test_weight_of_the_sparse_problem_keeps_two_of_four() -> None:
    problem = NmProblem(m=1, n=4, k=32, pattern="2:4", threads=1, cold_bytes=0)
    assert (np.count_nonzero(problem.weight.reshape(4, 8, 4), axis=2) == 2).all()


def _check_variants(competitor: Competitor, problem: Problem | NmProblem | HadamardProblem) -> None:
    variants = competitor.variants(problem)
    assert variants
    for variant in variants:
        prepared = variant.prepare()
        prepared.run(0)
        check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))
        if DEVICE == "cuda":
            prepared = gpu.Gpu().ready(prepared)
            # The result that is left is the one of the last graph.
            prepared.run(prepared.groups - 1)
            check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))


CONDITIONS = {"threads": 1, "cold_bytes": 20000, "batch": 3, "device": DEVICE}


@pytest.mark.parametrize("competitor", GPU_COMPETITORS["lowbit_linear"], ids=lambda c: c.name)
def test_competitors_multiply(competitor: Competitor) -> None:
    _check_variants(competitor, Problem(m=3, n=64, k=256, bits=4, group_size=64, **CONDITIONS))


@pytest.mark.parametrize("competitor", GPU_COMPETITORS["nm_linear"], ids=lambda c: c.name)
def test_competitors_multiply_sparse_weights(competitor: Competitor) -> None:
    if competitor.name == "torch_2to4" and DEVICE == "cpu":
        pytest.skip("torch has 2:4 products on GPUs only")
    _check_variants(competitor, NmProblem(m=16, n=128, k=256, pattern="2:4", **CONDITIONS))


@pytest.mark.parametrize("competitor", GPU_COMPETITORS["hadamard"], ids=lambda c: c.name)
def test_competitors_transform(competitor: Competitor) -> None:
    _check_variants(competitor, HadamardProblem(m=3, d=96, block=32, dtype="float16", **CONDITIONS))


@needs_gpu
def test_events_and_graphs() -> None:
    device = gpu.Gpu()
    x = torch.zeros(1 << 20, device="cuda")
    ready = device.ready(Contender(lambda _: x.add_(1), groups=1, calls=1))
    before = float(x[0])
    assert device.seconds(lambda: ready.run(0)) > 0
    assert float(x[0]) == before + 1
