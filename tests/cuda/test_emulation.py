"""The emulation itself: right where kernels are right, and loud where they are not.

Builds ``check.cu`` with the compiler of the project: plain, and under ThreadSanitizer, which
finds a race in whatever order the threads run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAVOURS = {"plain": ["-O1"], "tsan": ["-O1", "-g", "-fsanitize=thread"]}
# The enumeration in check_kernels.h.
DEFECTS = (
    "no barrier in the pipeline",
    "a row outside shared memory",
    "a wait too short by one group",
    "a wrong register of a fragment",
    "a barrier half the threads reach",
    "a stage overwritten while it is read",
    "an index outside a static array",
    "no barrier in a warp",
    "no barrier before the sum",
    "a misaligned copy",
)
# Of them: those that ThreadSanitizer sees, whatever came out.
RACES = (1, 3, 6, 8, 9)


def _compile(flavour: str, sources: list[Path], out: Path, *flags: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    base = ["-std=c++20", "-I", str(CSRC), "-DOW_CUDA_EMULATED", "-w", *FLAVOURS[flavour], *flags]
    done = subprocess.run(
        [compiler, *base, *map(str, sources), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session", params=FLAVOURS)
def emulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the emulation's objects; its name is the flavour."""
    folder = tmp_path_factory.mktemp("emulation") / request.param
    folder.mkdir()
    for source in sorted((CSRC / "testing" / "cuda").glob("*.cpp")):
        _compile(request.param, [source], folder / f"{source.stem}.o", "-c")
    return folder


def _check(emulation: Path, out: Path, defect: int) -> Path:
    check = ROOT / "tests" / "cuda" / "check.cu"
    kernel = out / "check.o"
    _compile(emulation.name, [check], kernel, f"-DOW_DEFECT={defect}", "-x", "c++", "-c")
    _compile(emulation.name, [kernel, *sorted(emulation.glob("*.o"))], out / "check")
    return out / "check"


def _run(check: Path, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([check, str(seed)], capture_output=True, text=True, timeout=60)


def test_right_kernels_pass(emulation: Path, tmp_path: Path) -> None:
    check = _check(emulation, tmp_path, 0)
    for seed in (0, 1, 2, 3):
        done = _run(check, seed)
        assert done.returncode == 0, done.stdout + done.stderr[:4000]
        assert "FAIL" not in done.stdout
        assert "WARNING" not in done.stderr


@pytest.mark.parametrize("defect", range(1, len(DEFECTS) + 1), ids=lambda d: DEFECTS[d - 1])
def test_planted_defect_is_found(emulation: Path, tmp_path: Path, defect: int) -> None:
    if emulation.name == "tsan" and defect not in RACES:
        pytest.skip("no race")
    done = _run(_check(emulation, tmp_path, defect), 0)
    assert done.returncode != 0, done.stdout
    if emulation.name == "tsan":
        assert "data race" in done.stderr
