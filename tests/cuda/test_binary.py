"""The compiled CUDA code: registers, spills and instructions of every kernel, without a GPU.

Reads ``openwork_cuda.so`` and the check program with cuobjdump, from beside nvcc or from the wheels
``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm`` or ``triton``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from .device_kernels import (
    KERNELS,
    PACKING_KERNELS,
    REGISTER_UNIT,
    RESERVED_SHARED,
    DeviceKernel,
    row_of,
    tables,
)
from .devices import built

ROOT = Path(__file__).resolve().parents[2]
# Two will do: the text of each has 30 MB. Stack and local memory are those of all.
DISASSEMBLED = ("sm_80", "sm_90a")
TENSOR = re.compile(r"\b([HIQ]G?MMA(?:\.SP)?)\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int
    local: int

    def __str__(self) -> str:
        return f"{self.kernel} for {self.architecture}"


def _cuobjdump() -> list[Path]:
    """cuobjdump, and the folder of the nvdisasm that it runs."""
    site = Path(sysconfig.get_path("purelib"))
    folders = [Path(p) for p in os.environ["PATH"].split(os.pathsep)]
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    folders += [Path(nvcc).resolve().parent] if nvcc else []
    folders += [site / "nvidia" / "cu13" / "bin", site / "triton" / "backends" / "nvidia" / "bin"]
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return [folder / "cuobjdump", folder]
    pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


@cache
def _dump(binary: Path, *options: str) -> str:
    tool, folder = _cuobjdump()
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [tool, *options, binary], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _plain_name(symbol: str) -> str:
    """``gemm<f16>`` of ``_ZN2ow5check4gemmINS_3f16EEEvPKT_...``."""
    tool = shutil.which("c++filt")
    if tool is None:
        pytest.skip("c++filt is not installed")
    done = subprocess.run([tool, symbol], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|\bow::|\bcheck::", "", done.stdout.strip())
    name = name.removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def _codes(binary: Path) -> Iterator[Code]:
    architecture = kernel = ""
    for line in _dump(binary, "-res-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            kernel = _plain_name(found[1])
        elif "REG:" in line and kernel:
            used = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
            yield Code(
                kernel, architecture, used["REG"], used["STACK"], used["SHARED"], used["LOCAL"]
            )
            kernel = ""


def _instructions(binary: Path) -> dict[tuple[str, str], str]:
    """Disassembled code by kernel and architecture."""
    found: dict[tuple[str, str], str] = {}
    for architecture in DISASSEMBLED:
        dump = _dump(binary, "-sass", "-arch", architecture)
        for function in re.split(r"^\s*Function : ", dump, flags=re.MULTILINE)[1:]:
            symbol, code = function.split("\n", 1)
            found[_plain_name(symbol.strip()), architecture] = code
    return found


def _row(kernel: str) -> DeviceKernel:
    row = row_of(kernel)
    assert row is not None, f"{kernel} has no row in tests/cuda/device_kernels.py"
    return row


@pytest.fixture(params=("openwork_cuda.so", "cuda_check_gpu"))
def binary(request: pytest.FixtureRequest) -> Path:
    return built(request.param)


def test_kernels_keep_to_their_limits(binary: Path) -> None:
    codes = list(_codes(binary))
    for code in codes:
        print(f"{code!s:60} {code.registers:3} registers, {code.shared:6} bytes shared")
    assert {code.architecture for code in codes} >= {"sm_80"}
    for code in codes:
        row = _row(code.kernel)
        assert code.registers <= row.registers, f"{code}: {code.registers} registers"
        assert code.stack == code.local == 0, f"{code} spills: {code}"
        static = row.shared - row.dynamic
        # Since sm_90 a kilobyte that the system reserves is counted too.
        assert code.shared in (static, static + RESERVED_SHARED), (
            f"{code}: {code.shared} bytes shared"
        )
    if {code.architecture for code in codes} < {"sm_80", "sm_90a", "sm_100", "sm_120"}:
        return  # limits are those of the architecture that needs the most
    used = {row: max(c.registers for c in codes if _row(c.kernel) is row) for row in
            {_row(c.kernel) for c in codes}}  # fmt: skip
    for row, registers in used.items():
        assert row.registers - registers < 2 * REGISTER_UNIT, f"{row.name}: {registers} will do"


def test_tensor_cores_are_used_where_they_should_be(binary: Path) -> None:
    instructions = _instructions(binary)
    assert instructions
    for (kernel, architecture), code in instructions.items():
        where = f"{kernel} for {architecture}"
        assert not LOCAL.search(code), f"{where} accesses local memory"
        assert set(TENSOR.findall(code)) == _row(kernel).tensor, where


def test_every_row_has_a_kernel() -> None:
    names = {code.kernel for code in _codes(built("openwork_cuda.so"))}
    assert {row_of(name) for name in names} == {*KERNELS, *PACKING_KERNELS}


def test_blocks_have_the_threads_that_kernels_are_compiled_for() -> None:
    ptx = _dump(built("openwork_cuda.so"), "-ptx")
    bounds = re.findall(r"\.entry (\w+)\(.*?\)\s*\.maxntid (\d+)", ptx, re.DOTALL)
    assert len(bounds) == ptx.count(".entry "), "a kernel has no __launch_bounds__"
    for symbol, threads in bounds:
        kernel = _plain_name(symbol)
        assert _row(kernel).threads == int(threads), kernel


def test_readme_has_the_tables() -> None:
    text = (ROOT / "csrc" / "README.md").read_text()
    begin, end = "<!-- cuda:begin -->\n", "\n<!-- cuda:end -->"
    assert text.split(begin)[1].split(end)[0] == tables(), (
        "csrc/README.md must have what python -m tests.cuda.device_kernels prints"
    )
