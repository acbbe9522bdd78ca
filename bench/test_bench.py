"""The suite under pytest-benchmark: ``pytest bench/ --benchmark-compare``.

Our operators only, for tracking one machine over time; competitors and roofs are the business of
``python -m bench run``. Each result is checked before it is timed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import machine, suite

THREADS = torch.get_num_threads()
ITEMS = list(suite.items("", THREADS))


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_workload(benchmark: BenchmarkFixture, item: suite.Item) -> None:
    """One call per round, on the next of enough data sets to come from memory."""
    settings = suite.Settings(
        threads=THREADS,
        cold_bytes=suite.cold_bytes(machine.last_level_cache(), machine.memory_bytes()),
    )
    contender = suite.ours(item, settings, suite.MIN_SAMPLE_SECONDS)
    groups = itertools.cycle(range(contender.groups))
    benchmark.extra_info.update(item.params)
    with torch.inference_mode():
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            lambda: contender.run(next(groups)), rounds=20, warmup_rounds=2
        )
