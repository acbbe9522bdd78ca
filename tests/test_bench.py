"""The benchmark's own arithmetic: what it selects, checks, times, computes and prints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bench import __main__ as cli
from bench import end_to_end, index_cases, machine, plot, report, roofline, suite
from bench.attention_problem import BlockAttentionProblem, BlockGradientsProblem
from bench.competitors import COMPETITORS, ggml, onnxruntime
from bench.grid import quantize
from bench.hadamard_problem import HadamardProblem
from bench.machine import Peaks
from bench.problem import (
    AttentionProblem,
    CheckError,
    Competitor,
    Prepared,
    Problem,
    Variant,
    check,
    dense_problem,
    tolerance,
)
from bench.sparse_problem import ColumnProblem, SparseProblem
from openwork.cli import llama_cpp
from openwork.testing import CASES
from openwork.timing import Contender, interleave, summarize

PEAKS = Peaks(2, read=[40e9, 50e9], ops={"fp32": [100e9], "bf16": [200e9], "int8": [400e9]})
STREAM = machine.ReadStream(1, "scalar", 8 << 20)
MACHINE = {"cpu": "some", "cores": 2, "tier": "avx2", "peaks": PEAKS.summary()}


def make_row(m: int, median: float, bits: int = 4) -> report.Row:
    return {
        "op": "lowbit_linear", "params": {"m": m, "n": 64, "k": 64, "bits": bits}, "tier": "avx2",
        "median_s": median, "iqr_s": median / 10, "gb_s": 10.0, "gflop_s": 20.0,
        "roof_share": 0.5, "bound": "memory", "speedup": {"torch_fp32": 2.0}, "checked": True,
    }  # fmt: skip


def make_problem(bits: int = 4, k: int = 128, **changes: int) -> Problem:
    sizes = {"m": 3, "n": 32, "k": k, "group_size": 64, "threads": 1, "cold_bytes": 20000}
    return Problem(bits=bits, batch=3, **{**sizes, **changes})


class Clock:
    """Advances only when something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self, call: Callable[[], object]) -> float:
        begin = self.now
        call()
        return self.now - begin

    def runs(self, name: str, seconds: float, log: list[str]) -> Contender:
        def run(group: int) -> None:
            log.append(f"{name}{group}")
            self.now += seconds

        return Contender(run, groups=3, calls=2)


def test_interleave_takes_turns_and_walks_the_data() -> None:
    clock, log = Clock(), []
    contenders = {"a": clock.runs("a", 1.0, log), "b": clock.runs("b", 4.0, log)}
    times = interleave(contenders, rounds=2, seconds=4.0, settle=0.0, timer=clock.seconds)
    # A turn: one untimed run, then samples until seconds / rounds = 2 are spent.
    assert log == ["a0", "a1", "a2", "b0", "b1", "a0", "a1", "a2", "b2", "b0"]
    assert times["a"].median == 0.5
    assert times["b"].median == 2.0
    assert (times["a"].samples, times["b"].samples) == (4, 2)


def test_interleave_ends_with_a_clock_that_stands_still() -> None:
    times = interleave({"a": Contender(lambda _: None, 1, 1)}, settle=0.0, timer=lambda _: 0.0)
    assert times["a"].samples == 15


def test_interleave_needs_two_rounds() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        interleave({}, rounds=1)


def test_summary_is_median_and_interquartile_range() -> None:
    times = summarize([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (times.median, times.iqr, times.best) == (3.0, 2.0, 1.0)


def test_roof_is_the_higher_of_two_times() -> None:
    # 50 GB/s is the best of the tries; 400 G int8 operations a second.
    assert roofline.roof_seconds(5e9, 1.0, 50e9, 400e9) == pytest.approx(0.1)
    assert roofline.roof_seconds(1.0, 4e10, 50e9, 400e9) == pytest.approx(0.1)
    found = roofline.rates(5e9, 1e9, "int8", 0.2, 50e9, PEAKS)
    assert (found.gb_s, found.gflop_s) == pytest.approx((25.0, 5.0))
    assert (found.roof_share, found.bound) == (pytest.approx(0.5), "memory")
    assert roofline.rates(1.0, 4e10, "int8", 0.2, 50e9, PEAKS).bound == "int8"


def test_unit_without_an_instruction_runs_at_the_fp32_peak() -> None:
    assert Peaks(1, read=[1.0], ops={"fp32": [3.0], "bf16": []}).ops_rate("bf16") == 3.0


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("", True), ("m=1", True), ("m=[12] op", True), ("m=", False), ("m=1 n=2", False)],
)
def test_patterns_match_words(pattern: str, found: bool) -> None:
    assert report.matches(pattern, "op m=1 n=16") is found


@pytest.mark.parametrize(("many", "warned"), [(199.0, False), (110.0, True)])
def test_threads_that_share_a_core_are_noticed(many: float, warned: bool) -> None:
    single = Peaks(1, ops={"fp32": [100.0]})
    assert bool(machine.scaling_warning(single, Peaks(2, ops={"fp32": [many]}))) is warned


def test_huge_buffer_is_aligned_and_written() -> None:
    buffer = machine.huge_buffer(machine.HUGE_PAGE)
    assert buffer.ctypes.data % machine.HUGE_PAGE == 0
    assert buffer.shape == (machine.HUGE_PAGE,)
    assert buffer.min() == 1


def test_peaks_are_positive_and_threads_add_up() -> None:
    found = machine.Peaks(1)
    found.extend(machine.measure_peaks(2, "scalar", tries=1, buffer_bytes=8 << 20))
    assert found.read_rate() > 0
    assert found.ops_rate("fp32") > 0


def test_stream_goes_round() -> None:
    rates: list[float] = []
    contender = machine.ReadStream(2, "scalar", 12 << 20).read_into(rates)
    for _ in range(3):
        contender.run(0)
    assert len(rates) == 3
    assert min(rates) > 0


def test_plan_exceeds_the_cache_in_whole_samples() -> None:
    problem = make_problem()
    assert problem.plan(1000) == (7, 3)
    assert problem.plan(15000) == (1, 2)
    assert problem.plan(10**9) == (1, 1)
    assert make_problem(cold_bytes=0).plan(1000) == (1, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_error_is_what_the_tolerance_is_derived_from(bits: int, symmetric: bool) -> None:
    problem = make_problem(bits)
    grid = quantize(problem.weight, bits=bits, group_size=64, symmetric=symmetric)
    group = np.arange(problem.k) // 64
    weight = grid.scales[:, group] * (grid.codes - grid.zeros[:, group].astype(np.float32))
    error = np.linalg.norm(weight - problem.weight) / np.linalg.norm(problem.weight)
    assert error == pytest.approx(1 / (2**bits - 1), rel=0.2)


def test_check_names_the_result_and_its_error() -> None:
    reference = np.ones((2, 2))
    assert check("x", reference, reference, 0.0) == 0
    with pytest.raises(CheckError, match=r"x: relative error must be at most 0.1, got 1"):
        check("x", 0 * reference, reference, 0.1)
    with pytest.raises(CheckError, match=r"at most 0.1, got nan"):
        check("x", np.nan * reference, reference, 0.1)
    with pytest.raises(CheckError, match="shape"):
        check("x", reference[:1], reference, 0.1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", [c.name for c in COMPETITORS["lowbit_linear"]])
def test_every_installed_competitor_computes_the_product(name: str, bits: int) -> None:
    competitor = next(c for c in COMPETITORS["lowbit_linear"] if c.name == name)
    if competitor.missing():
        pytest.skip(str(competitor.missing()))
    # k of the K formats: a multiple of 256. n: ggml interleaves 8 rows, torch 16.
    problem = make_problem(bits, k=256)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for variant in competitor.variants(problem):
            prepared = variant.prepare()
            for group in range(prepared.groups):
                prepared.run(group)
                check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))
            prepared.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("competitor", COMPETITORS["nm_linear"], ids=lambda c: c.name)
def test_every_competitor_multiplies_by_the_dense_weight(
    competitor: Competitor, dtype: str
) -> None:
    problem = dense_problem(dtype, m=3, n=32, k=256, threads=1, cold_bytes=20000, batch=3)
    for variant in competitor.variants(problem):
        prepared = variant.prepare()
        for group in range(prepared.groups):
            prepared.run(group)
            check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("competitor", COMPETITORS["decode_attention"], ids=lambda c: c.name)
def test_every_competitor_attends(competitor: Competitor, t: int, dtype: str) -> None:
    problem = AttentionProblem(
        b=2, t=t, h=6, kv_heads=2, d=8, keys=20, dtype=dtype, threads=1, cold_bytes=20000, batch=2
    )
    for variant in competitor.variants(problem):
        prepared = variant.prepare()
        for group in range(prepared.groups):
            prepared.run(group)
            check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))


@pytest.mark.slow  # FlexAttention compiles
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("competitor", COMPETITORS["block_attention"], ids=lambda c: c.name)
def test_every_competitor_attends_to_blocks(competitor: Competitor, density: float) -> None:
    problem = BlockAttentionProblem(
        keys=200, h=4, kv_heads=2, d=16, dtype="float32", density=density, threads=1, cold_bytes=0
    )
    check_variants(competitor, problem)
    chunk = replace(problem, density=1.0, queries=7, cold_bytes=100_000)
    check_variants(competitor, chunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize(
    "competitor", COMPETITORS["block_attention_backward"], ids=lambda c: c.name
)
def test_every_competitor_has_gradients(competitor: Competitor, density: float, dtype: str) -> None:
    problem = BlockGradientsProblem(
        keys=200, h=4, kv_heads=2, d=16, dtype=dtype, density=density, threads=1, cold_bytes=0
    )
    with torch.inference_mode():
        check_variants(competitor, problem)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("competitor", COMPETITORS["sparse_linear"], ids=lambda c: c.name)
def test_every_competitor_multiplies_sparse_weights(competitor: Competitor, block: int) -> None:
    for m in (1, 5):
        problem = SparseProblem(
            m=m, n=40, k=100, density=0.3, block=block, threads=1, cold_bytes=20000, batch=2
        )
        assert 0 < np.count_nonzero(problem.weight) < problem.weight.size
        check_variants(competitor, problem)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "w4"])
@pytest.mark.parametrize("competitor", COMPETITORS["active_linear"], ids=lambda c: c.name)
def test_every_competitor_multiplies_all_columns(competitor: Competitor, kind: str) -> None:
    problem = ColumnProblem(
        m=1, n=40, k=128, format=kind, group_size=64, threads=1, cold_bytes=20000, batch=2
    )
    check_variants(competitor, problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("competitor", COMPETITORS["hadamard"], ids=lambda c: c.name)
def test_every_competitor_transforms(competitor: Competitor, dtype: str) -> None:
    problem = HadamardProblem(m=3, d=96, block=32, dtype=dtype, threads=1, cold_bytes=2000, batch=2)
    check_variants(competitor, problem)


AnyProblem = SparseProblem | ColumnProblem | BlockAttentionProblem | HadamardProblem


def check_variants(competitor: Competitor, problem: AnyProblem) -> None:
    for variant in competitor.variants(problem):
        prepared = variant.prepare()
        for group in range(prepared.groups):
            prepared.run(group)
            check(variant.label, prepared.output(), problem.reference, tolerance(variant.bits))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (onnxruntime, llama_cpp):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert onnxruntime.ONNXRUNTIME.missing() == (
        "package onnxruntime and onnx is not installed"
    )  # fmt: skip
    assert ggml.GGML.missing() == "package llama-cpp-python or xllamacpp is not installed"
    settings = suite.Settings(1, 1, against=frozenset({"ggml", "torch_fp32"}))
    with cli.console.capture() as captured:
        left = suite.available("lowbit_linear", settings, cli.console)
    assert [c.name for c in left] == ["torch_fp32"]
    assert "skipped ggml: package llama-cpp-python or xllamacpp" in captured.get()


def test_best_variant_drops_wrong_and_slow_ones() -> None:
    problem = make_problem()
    closed = []

    def variant(label: str, seconds: float, factor: float) -> Variant:
        def prepare() -> Prepared:
            return Prepared(
                run=lambda _: time.sleep(seconds), groups=1, calls=1, weight_bytes=1,
                output=lambda: factor * problem.reference, close=lambda: closed.append(label),
            )  # fmt: skip

        return Variant(label, 4, prepare)

    variants = [variant("slow", 0.05, 1), variant("wrong", 0, 0), variant("fast", 0.001, 1)]
    competitor = Competitor("x", lambda: None, lambda _: variants)
    with cli.console.capture() as captured, ExitStack() as stack:
        best = suite._best_variant(competitor, problem, suite.Settings(1, 1), cli.console, stack)
    assert best is not None
    assert best[0].label == "fast"
    assert closed == ["wrong", "slow", "fast"]
    assert "skipped x (wrong): x (wrong): relative error" in captured.get()


def test_selection_matches_words_exactly() -> None:
    names = [item.name for item in suite.items("lowbit_linear m=1 bits=[34] k=4096", 2)]
    assert names
    assert all(" m=1 " in name and (" bits=3 " in name or " bits=4 " in name) for name in names)
    assert all(name.endswith("threads=2") for name in names)
    assert not list(suite.items("m=1 no_such=*", 2))
    every = (*CASES, *index_cases.CASES)
    assert len(list(suite.items("", 1))) == sum(len(case.workloads) for case in every)


def test_run_writes_checked_rows_of_the_agreed_form(tmp_path: Path) -> None:
    item = min(suite.items("lowbit_linear", 1), key=lambda item: item.cost.ops)
    against = frozenset({"torch_fp32"})
    settings = suite.Settings(threads=1, cold_bytes=1, rounds=2, seconds=0.0, against=against)
    before = torch.get_num_threads()
    rows: list[report.Row] = []
    try:
        assert suite.run([item], settings, PEAKS, STREAM, cli.console, rows.append) == []
    finally:
        torch.set_num_threads(before)
    path = tmp_path / "new" / "rows.json"
    report.write(path, MACHINE, suite.add_rates(rows, "avx2", PEAKS))
    (row,) = report.read(path)[1]
    assert set(report.ROW_KEYS) <= row.keys()
    assert row["params"]["threads"] == 1
    assert list(row["speedup"]) == ["torch_fp32"]
    assert row["competitors"]["torch_fp32"]["variant"] == "float32"
    assert row["gb_s"] * 1e9 * row["median_s"] == pytest.approx(item.cost.bytes)


def test_wrong_result_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    item = next(suite.items("", 1))

    def wrong(*_: object) -> None:
        raise AssertionError("element 3 is 1, expected 2")

    monkeypatch.setattr(suite, "run_item", wrong)
    rows: list[report.Row] = []
    settings = suite.Settings(threads=1, cold_bytes=1, against=frozenset())
    failures = suite.run([item], settings, PEAKS, STREAM, cli.console, rows.append)
    assert rows == []
    assert failures == [f"{item.name}: element 3 is 1, expected 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a result file"),
        ("[]", "expected the keys machine and rows"),
        ('{"machine": {}, "rows": [{"op": "x"}]}', "row 0 lacks params"),
        (
            json.dumps({"machine": {}, "rows": [{**make_row(1, 1.0), "checked": False}]}),
            "row 0 was not checked",
        ),
    ],
)
def test_bad_result_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(report.ResultError, match=message):
        report.read(path)
    result = CliRunner().invoke(cli.app, ["table", str(path)])
    assert result.exit_code == 2


def test_table_hoists_what_never_changes(tmp_path: Path) -> None:
    text = report.markdown([make_row(1, 1e-4), make_row(4, 2e-3)])
    assert text.splitlines()[0] == "**lowbit_linear n=64 k=64 bits=4**"
    assert "| 1 | 100 us | 10.0 | 20.0 | 50% | 2.00x |" in text
    assert "| 4 | 2 ms |" in text
    path = tmp_path / "x.json"
    report.write(path, MACHINE, [make_row(1, 1e-4)])
    result = CliRunner().invoke(cli.app, ["table", str(path)])
    assert result.exit_code == 0
    assert "measured roofs: read 50 GB/s, fp32 100 GFLOP/s" in result.output


def test_compare_tells_noise_from_change() -> None:
    before, after = [make_row(1, 1.0), make_row(4, 1.0)], [make_row(1, 1.05), make_row(4, 0.5)]
    (same, faster) = report.compare(before, after)
    assert same[3:] == (pytest.approx(1 / 1.05), False)
    assert faster[3:] == (2.0, True)
    assert report.compare(before, [make_row(9, 1.0)]) == []


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    rows = [make_row(1, 1e-4), make_row(4, 2e-4), make_row(1, 1e-4, bits=2)]
    plot.draw(MACHINE, rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_crossover_needs_a_density(tmp_path: Path) -> None:
    rows = [make_row(1, 1e-4), make_row(1, 2e-4)]
    with pytest.raises(ValueError, match="no row has a density"):
        plot.draw_crossover(rows, "torch_fp32", tmp_path / "x.png")
    for row, density in zip(rows, (0.5, 0.25), strict=True):
        row["params"] = {**row["params"], "density": density}
    plot.draw_crossover(rows, "torch_fp32", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_selection_fails() -> None:
    result = CliRunner().invoke(cli.app, ["run", "--select", "nothing"])
    assert result.exit_code == 2


def test_divergence_is_zero_for_equal_and_large_for_unrelated() -> None:
    logits = np.random.default_rng(0).normal(size=100) * 5
    assert end_to_end.divergence(logits + 3, logits) == pytest.approx(0, abs=1e-9)
    assert end_to_end.divergence(0 * logits, logits) > 1
    assert math.isnan(end_to_end.divergence(np.nan * logits, logits))
