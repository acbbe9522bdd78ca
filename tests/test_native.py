"""The loaded library: what it reports, the tier override, threads, and layout tags."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import openwork
from openwork.packing import LOWBIT_LAYOUTS, PackedWeight

TIERS = ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx")
CPU = openwork.info().cpu_isa
SUPPORTED = TIERS[: TIERS.index(CPU) + 1]
REPORT = "import openwork, json; print(json.dumps(openwork.info().as_dict()))"


def _python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, where OPENWORK_ISA is read."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENWORK_ISA"}
    if isa is not None:
        environment["OPENWORK_ISA"] = isa
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _tier_of(kernel: str) -> str:
    return kernel.rsplit("_", 1)[1]


def _weight() -> PackedWeight:
    codes = torch.randint(16, (40, 64), dtype=torch.uint8)
    return openwork.pack_lowbit(codes, torch.rand(40, 2), bits=4, group_size=32)


def test_info_describes_this_process() -> None:
    info = openwork.info()
    assert info.isa == openwork.isa()
    assert info.isa in SUPPORTED
    assert info.kernels == openwork.kernels()
    assert info.layouts == openwork.layouts()
    assert info.torch_version == torch.__version__
    assert info.threads == torch.get_num_threads()
    assert info.as_dict()["cpu_isa"] == CPU


def test_info_says_whether_cuda_is_loaded() -> None:
    cuda = openwork.info().cuda
    assert re.match(r"loaded$|not (built|loaded): .", cuda)
    library = Path(openwork.__file__).with_name("openwork_cuda.so")
    assert cuda.startswith("not built") == (not library.is_file())


def test_cuda_library_loads_beside_a_cpu_torch() -> None:
    """Its weak stream symbol may stay undefined, and its runtime needs no driver."""
    if openwork.info().cuda.startswith("not built"):
        pytest.skip("the CUDA library is not built")
    code = """
import torch, openwork
assert openwork.info().cuda == "loaded", openwork.info().cuda
assert torch._C._dispatch_has_kernel_for_dispatch_key("openwork::quantize_rows", "CUDA")
print(openwork.quantize_rows(torch.tensor([[1.0, -2.0]]))[0].tolist())
"""
    environment = {**os.environ, "OPENWORK_LOAD_CUDA": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[64, -127]]"


def test_layout_tags_are_named_and_versioned() -> None:
    tags = openwork.layouts()
    assert len(set(tags)) == len(tags)
    for tag in tags:
        assert re.fullmatch(r"(w\d|nm\d+|bitmask|bytes|blocks|columns\d?)_n\d+k\d+@\d+", tag)


def test_kernels_stay_under_the_tier(isa: str) -> None:
    assert openwork.isa() == isa
    names = openwork.kernels()
    assert len(set(names)) == len(names)
    assert {_tier_of(name) for name in names} == set(TIERS[: TIERS.index(isa) + 1])


def test_kernels_are_best_first(isa: str) -> None:
    for family in ("lowbit_gemm", "encode_rows", "activations", "nm_gemm"):
        ranks = [TIERS.index(_tier_of(n)) for n in openwork.kernels() if n.startswith(family)]
        assert ranks
        assert ranks == sorted(ranks, reverse=True)
        assert ranks[-1] == 0, f"{family} has no scalar kernel"


@pytest.mark.parametrize("name", ["", "avx", "AVX2", "avx2 ", "neon"])
def test_set_isa_refuses_unknown_names(name: str) -> None:
    before = openwork.isa()
    expected = f"set_isa: isa must be scalar, avx2, avx512, avx512bf16 or avx512amx, got {name}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        openwork.set_isa(name)
    assert openwork.isa() == before


@pytest.mark.skipif(SUPPORTED == TIERS, reason="this CPU has every tier")
def test_set_isa_refuses_more_than_the_cpu_has() -> None:
    before = openwork.isa()
    best = TIERS[-1]
    with pytest.raises(ValueError, match=rf"^set_isa: isa must be at most {CPU} .*, got {best}"):
        openwork.set_isa(best)
    assert openwork.isa() == before


@pytest.mark.parametrize("isa", SUPPORTED)
def test_environment_lowers_the_tier(isa: str) -> None:
    """The override is known to work, so that tests under it are known to test that tier."""
    done = _python(REPORT, isa)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["isa"] == isa
    assert info["cpu_isa"] == CPU
    # Every tier has kernels of its own, and none of a higher one shows.
    assert {_tier_of(name) for name in info["kernels"]} == set(TIERS[: TIERS.index(isa) + 1])


def test_environment_may_be_empty() -> None:
    assert json.loads(_python(REPORT, "").stdout)["isa"] == CPU


@pytest.mark.parametrize("isa", ["avx", "AVX512"])
def test_environment_refuses_unknown_names(isa: str) -> None:
    done = _python("import openwork", isa)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: openwork: OPENWORK_ISA is not one of "
        "scalar, avx2, avx512, avx512bf16, avx512amx; "
        f"this CPU has {CPU}"
    )


@pytest.mark.skipif(SUPPORTED == TIERS, reason="this CPU has every tier")
def test_environment_refuses_more_than_the_cpu_has() -> None:
    done = _python("import openwork", TIERS[-1])
    assert done.returncode != 0
    assert f"OPENWORK_ISA is not supported by this CPU; this CPU has {CPU}" in done.stderr


def test_null_op_takes_any_tensor() -> None:
    for x in (torch.zeros(0), torch.arange(6).view(2, 3).t(), torch.tensor(True)):
        assert torch.ops.openwork.null_op(x) is None


def test_threads_follow_torch(threads: int) -> None:
    assert openwork.info().threads == threads
    weight, x = _weight(), torch.randn(64, 64)
    y = openwork.lowbit_linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    again = openwork.lowbit_linear(x, weight)
    torch.set_num_threads(before)
    assert torch.equal(again, y)


# Counts the threads that a product large enough for several starts.
COUNT_THREADS = """
import os, torch, openwork
codes = torch.zeros(2048, 1024, dtype=torch.uint8)
weight = openwork.pack_lowbit(codes, torch.ones(2048, 8), bits=4, group_size=128)
for threads in (1, 2):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    openwork.lowbit_linear(torch.ones(8, 1024), weight)
    print(threads - 1, len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_no_more_threads_than_asked_for() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # none before the first call
    command = [sys.executable, "-c", COUNT_THREADS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "0 0\n1 1\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "layout", ["w4_n32k8@2", "w4_n16k4@1", "w4_n32k8", "", "w5_n32k8@1", "nm8_n16k4@1"]
)
def test_packed_weight_refuses_layouts_this_build_does_not_read(layout: str) -> None:
    w = _weight()
    expected = (
        f"PackedWeight: layout must be one of {', '.join(LOWBIT_LAYOUTS)}, got {layout}; "
        "re-pack with openwork.pack_lowbit"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        PackedWeight(w.packed, w.scales, w.zeros, layout, w.n, w.k, w.group_size)


def test_weight_under_the_tag_of_another_layout_is_refused() -> None:
    w = _weight()
    wrong = PackedWeight(w.packed, w.scales, w.zeros, "w8_n32k4@1", w.n, w.k, w.group_size)
    with pytest.raises(
        ValueError,
        match=r"^lowbit_linear: packed must have shape \[2, 4, 2, 4, 16, 4\], "
        r"got \[2, 4, 2, 2, 16, 4\]$",
    ):
        openwork.lowbit_linear(torch.ones(1, 64), wrong)


@pytest.mark.parametrize("layout", [-1, len(openwork.layouts()), 1 << 40])
def test_ops_refuse_layout_ids_they_do_not_know(layout: int) -> None:
    w = _weight()
    with pytest.raises(
        ValueError,
        match=rf"^unpack_lowbit: layout must be one this build reads, got id {layout}; "
        r"re-pack with openwork\.pack_lowbit$",
    ):
        torch.ops.openwork.unpack_lowbit(w.packed, w.scales, None, layout, w.n, w.k, w.group_size)
