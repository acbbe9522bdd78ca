"""The suite: every workload of every operator, timed against its competitors.

For one workload: make the inputs, check our result against the reference, let every competitor
prepare its variants, check each of them, keep its fastest, and time all that remain in turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.console import Console

from bench import roofline
from bench.attention_problem import BlockAttentionProblem, BlockGradientsProblem
from bench.competitors import COMPETITORS, GPU_COMPETITORS
from bench.device import HOST, Device, Stream
from bench.hadamard_problem import HadamardProblem
from bench.index_cases import CASES as INDEX_CASES
from bench.index_cases import ESTIMATORS, IndexProblem
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
from bench.report import Row, matches, row_id
from bench.sparse_problem import ColumnProblem, NmProblem, ProductProblem, SparseProblem
from openwork.testing import CASES, Cost, OpCase, Workload
from openwork.timing import MIN_ROUNDS, MIN_SECONDS, Contender, Times, interleave

OURS, READ = "openwork", "read"
# Samples shorter than this are dominated by the clock and by the call; several calls make one.
MIN_SAMPLE_SECONDS = 2e-3
# Weights walked through are this many times the last-level cache: even a cache that keeps some of
# them by luck holds less than a quarter.
COLD_CACHES = 4
# Where that is more than this share of all memory (a virtual machine sees the whole cache of a
# large host), contenders, of which there are up to 16, get so much each.
MEMORY_SHARE = 1 / 32
# The read rate drifts by some 15 % during a run.
MAX_READ_EXCESS = 1.2
# A variant this many times slower than the best one in a single run will not win a race.
HOPELESS = 4


def cold_bytes(cache: int, memory: int) -> int:
    """Bytes a contender walks through, so that each call finds its operands in memory."""
    return int(min(COLD_CACHES * cache, max(cache, memory * MEMORY_SHARE)))


@dataclass(frozen=True)
class Settings:
    """How to run: see ``python -m bench run --help``."""

    threads: int
    cold_bytes: int
    rounds: int = MIN_ROUNDS
    seconds: float = MIN_SECONDS
    against: frozenset[str] | None = None
    device: Device = HOST


@dataclass(frozen=True)
class Item:
    """One workload of one operator, with the name patterns select it by."""

    case: OpCase
    workload: Workload
    params: Mapping[str, Any]
    cost: Cost

    @property
    def name(self) -> str:
        return row_id(self.case.name, self.params)


def items(pattern: str, threads: int) -> Iterator[Item]:
    """Workloads, of operators with a cost, that ``pattern`` selects.

    A pattern is one or more words; each must match the operator's name or a ``key=value`` of the
    workload, with shell wildcards: ``"lowbit_linear m=1 bits=[34]"``. An empty one selects all.
    """
    for case in (*CASES, *INDEX_CASES):
        if case.cost is None:
            continue
        for workload in case.workloads:
            params = {**workload.params, "threads": threads}
            item = Item(case, workload, params, case.cost(workload.params))
            if matches(pattern, item.name):
                yield item


def gpu_items(pattern: str) -> Iterator[Item]:
    """Workloads for GPUs, of operators that have some, that ``pattern`` selects."""
    for case in CASES:
        for workload in case.gpu_workloads:
            assert case.cost is not None
            item = Item(case, workload, workload.params, case.cost(workload.params))
            if matches(pattern, item.name):
                yield item


def _batch(seconds: float, copies: int) -> int:
    """Calls that make a sample long enough, when one takes at least ``seconds``."""
    return max(1, min(copies, math.ceil(MIN_SAMPLE_SECONDS / seconds)))


def ours(item: Item, settings: Settings, floor: float) -> Contender:
    """Check our result and make the data sets to walk through; ``floor`` is the roof's time."""
    case, workload = item.case, item.workload
    first = workload.make()
    settings.device.check(case, first)
    hot = workload.params.get("hot", False)
    copies = 1 if hot else max(1, math.ceil(settings.cold_bytes / item.cost.bytes))
    calls = _batch(floor, copies)
    groups = math.ceil(copies / calls)
    bound = [settings.device.bound(case, first)]
    bound += [settings.device.bound(case, workload.make()) for _ in range(groups * calls - 1)]

    def run(group: int) -> None:
        for call in bound[group * calls : (group + 1) * calls]:
            call()

    return settings.device.ready(Contender(run, groups, calls))


AnyProblem = (
    Problem
    | AttentionProblem
    | BlockAttentionProblem
    | ProductProblem
    | IndexProblem
    | HadamardProblem
)
PROBLEMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "lowbit_linear": (Problem, ("m", "n", "k", "bits", "group_size", "symmetric")),
    "nm_linear": (dense_problem, ("m", "n", "k", "dtype")),
    "sparse_linear": (SparseProblem, ("m", "n", "k", "density")),
    "block_sparse_linear": (SparseProblem, ("m", "n", "k", "density", "block")),
    "active_linear": (ColumnProblem, ("m", "n", "k", "format", "group_size")),
    "decode_attention": (AttentionProblem, ("b", "t", "h", "kv_heads", "d", "keys", "dtype")),
    **dict.fromkeys(
        ESTIMATORS, (IndexProblem, ("estimator", "h", "kv_heads", "d", "keys", "dtype"))
    ),
    "paged_attention": (AttentionProblem, ("b", "t", "h", "kv_heads", "d", "keys", "dtype")),
    "block_attention": (
        BlockAttentionProblem,
        ("keys", "h", "kv_heads", "d", "dtype", "density", "queries"),
    ),
    "hadamard": (HadamardProblem, ("m", "d", "block", "dtype")),
    "block_attention_backward": (
        BlockGradientsProblem,
        ("keys", "h", "kv_heads", "d", "dtype", "density"),
    ),
}
# On a GPU the dense competitor multiplies by the zeros of the sparse one's weight.
GPU_PROBLEMS = {**PROBLEMS, "nm_linear": (NmProblem, ("m", "n", "k", "pattern"))}


def _problem(item: Item, settings: Settings, floor: float) -> AnyProblem:
    kinds = PROBLEMS if settings.device is HOST else GPU_PROBLEMS
    kind, names = kinds[item.case.name]
    problem: AnyProblem = kind(
        **{name: item.params[name] for name in names if name in item.params},
        threads=settings.threads,
        cold_bytes=0 if item.params.get("hot", False) else settings.cold_bytes,
        batch=math.ceil(MIN_SAMPLE_SECONDS / floor),
        device=settings.device.name,
    )
    return problem


def _ready(
    competitor: Competitor,
    variant: Variant,
    problem: AnyProblem,
    settings: Settings,
    console: Console,
) -> Prepared | None:
    """The variant prepared and checked; None, with a message, when it cannot do it."""
    name = f"{competitor.name} ({variant.label})"
    prepared = None
    try:
        prepared = variant.prepare()
        prepared.run(0)
        check(name, prepared.output(), problem.reference, tolerance(variant.bits))
        prepared = settings.device.ready(prepared)
    except (CheckError, RuntimeError, ValueError, NotImplementedError) as error:
        console.print(f"[yellow]skipped {name}: {str(error).splitlines()[0]}")
        if prepared is not None:
            prepared.close()
        return None
    return prepared


def _best_variant(
    competitor: Competitor,
    problem: AnyProblem,
    settings: Settings,
    console: Console,
    stack: ExitStack,
) -> tuple[Variant, Prepared] | None:
    """The competitor's fastest variant that computes the product; None if there is none.

    One run decides first: some variants are a hundred times slower than others. The rest race.
    """
    timer = settings.device.seconds
    ready: dict[str, tuple[Variant, Prepared]] = {}
    once: dict[str, float] = {}
    for variant in competitor.variants(problem):
        prepared = _ready(competitor, variant, problem, settings, console)
        if prepared is None:
            continue
        once[variant.label] = timer(partial(prepared.run, 0)) / prepared.calls
        ready[variant.label] = (variant, prepared)
    if not ready:
        return None
    limit = HOPELESS * min(once.values())
    racing = {label: pair[1] for label, pair in ready.items() if once[label] <= limit}
    best = next(iter(racing))
    if len(racing) > 1:
        times = interleave(racing, rounds=3, seconds=0.03, timer=timer)
        best = min(times, key=lambda label: times[label].median)
    for label, (_, prepared) in ready.items():
        if label != best:
            prepared.close()
    stack.callback(ready[best][1].close)
    return ready[best]


def available(op: str, settings: Settings, console: Console) -> list[Competitor]:
    """Competitors of ``op`` that are wanted and installed; the missing ones are named."""
    against = settings.against
    registry = COMPETITORS if settings.device is HOST else GPU_COMPETITORS
    chosen = []
    for competitor in registry.get(op, ()):
        if against is not None and competitor.name not in against:
            continue
        reason = competitor.missing()
        if reason:
            console.print(f"[yellow]skipped {competitor.name}: {reason}")
        else:
            chosen.append(competitor)
    return chosen


def run_item(
    item: Item,
    settings: Settings,
    competitors: Sequence[Competitor],
    peaks: Peaks,
    stream: Stream,
    console: Console,
) -> Row:
    """Check and time one workload.

    Returns:
        A row without rates; :func:`add_rates` fills them in from the peaks of the whole run.

    Raises:
        CheckError: our own result is wrong.
    """
    torch.set_num_threads(settings.threads)
    cost = item.cost
    floor = roofline.roof_seconds(
        cost.bytes, cost.ops, peaks.read_rate(), peaks.ops_rate(cost.unit)
    )
    reads: list[float] = []
    with ExitStack() as stack, torch.inference_mode():
        contenders: dict[str, Contender] = {OURS: ours(item, settings, floor)}
        chosen: dict[str, tuple[Variant, Prepared]] = {}
        if competitors:
            problem = _problem(item, settings, floor)
            for competitor in competitors:
                found = _best_variant(competitor, problem, settings, console, stack)
                if found is not None:
                    chosen[competitor.name] = found
                    contenders[competitor.name] = found[1]
        contenders[READ] = stream.read_into(reads)
        times = interleave(
            contenders,
            rounds=settings.rounds,
            seconds=settings.seconds,
            timer=settings.device.seconds,
        )
        rivals = {
            name: {
                "variant": variant.label,
                "median_s": times[name].median,
                "iqr_s": times[name].iqr,
                "weight_gb_s": prepared.weight_bytes / times[name].median / 1e9,
            }
            for name, (variant, prepared) in chosen.items()
        }
    _warn_of_cached_weights(item, rivals, peaks, console)
    return {**_row(item, times[OURS], rivals), "read_gb_s": median(reads) / 1e9}


def _warn_of_cached_weights(
    item: Item, rivals: Mapping[str, Mapping[str, Any]], peaks: Peaks, console: Console
) -> None:
    """Says so when a competitor reads faster than memory: its weights are not cold, then."""
    limit = MAX_READ_EXCESS * peaks.read_rate() / 1e9
    for name, rival in rivals.items():
        if not item.params.get("hot", False) and rival["weight_gb_s"] > limit:
            console.print(
                f"[yellow]{name} reads weights at {rival['weight_gb_s']:.0f} GB/s, above the "
                f"machine's {peaks.read_rate() / 1e9:.0f}: they come from a cache"
            )


def _row(item: Item, own: Times, rivals: Mapping[str, Mapping[str, Any]]) -> Row:
    cost = item.cost
    return {
        "op": item.case.name,
        "params": dict(item.params),
        "median_s": own.median,
        "iqr_s": own.iqr,
        "samples": own.samples,
        "speedup": {name: rival["median_s"] / own.median for name, rival in rivals.items()},
        "competitors": dict(rivals),
        "checked": True,
        "bytes": cost.bytes,
        "ops": cost.ops,
        "unit": cost.unit,
    }


def add_rates(rows: Sequence[Row], tier: str, peaks: Peaks) -> list[Row]:
    """Rows with ``tier``, ``gb_s``, ``gflop_s``, ``roof_share`` and ``bound``."""
    finished = []
    for row in rows:
        rates = roofline.rates(
            row["bytes"], row["ops"], row["unit"], row["median_s"], row["read_gb_s"] * 1e9, peaks
        )
        finished.append(
            {
                **row,
                "tier": tier,
                "gb_s": rates.gb_s,
                "gflop_s": rates.gflop_s,
                "roof_share": rates.roof_share,
                "bound": rates.bound,
            }
        )
    return finished


def run(
    selected: Sequence[Item],
    settings: Settings,
    peaks: Peaks,
    stream: Stream,
    console: Console,
    done: Callable[[Row], None],
) -> list[str]:
    """Run ``selected``, handing each row to ``done``; names and errors of the ones that failed."""
    failures = []
    wanted = {
        op: available(op, settings, console)
        for op in dict.fromkeys(item.case.name for item in selected)
    }
    for index, item in enumerate(selected, 1):
        console.print(f"[dim]{index}/{len(selected)}[/] {item.name}")
        try:
            done(run_item(item, settings, wanted[item.case.name], peaks, stream, console))
        except (CheckError, AssertionError) as error:
            failures.append(f"{item.name}: {error}")
            console.print(f"[red]wrong result, not timed: {error}")
    return failures
