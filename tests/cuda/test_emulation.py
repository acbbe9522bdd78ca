"""The emulation itself: right where kernels are right, and loud where they are not.

Builds ``check.cu`` with the compiler of the project: plain, and under ThreadSanitizer, which
finds a race in whatever order the threads run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .emulated_programs import ROOT, compile_emulated, run_emulated

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


def _check(flavour: str, emulation: list[Path], out: Path, defect: int) -> Path:
    check = ROOT / "tests" / "cuda" / "check.cu"
    kernel = out / "check.o"
    compile_emulated(flavour, [check], kernel, f"-DOW_DEFECT={defect}", "-x", "c++", "-c")
    compile_emulated(flavour, [kernel, *emulation], out / "check")
    return out / "check"


def test_right_kernels_pass(flavour: str, emulation: list[Path], tmp_path: Path) -> None:
    check = _check(flavour, emulation, tmp_path, 0)
    for seed in (0, 1, 2, 3):
        done = run_emulated(check, seed)
        assert done.returncode == 0, done.stdout + done.stderr[:4000]
        assert "FAIL" not in done.stdout
        assert "WARNING" not in done.stderr


@pytest.mark.parametrize("defect", range(1, len(DEFECTS) + 1), ids=lambda d: DEFECTS[d - 1])
def test_planted_defect_is_found(
    flavour: str, emulation: list[Path], tmp_path: Path, defect: int
) -> None:
    if flavour == "tsan" and defect not in RACES:
        pytest.skip("no race")
    done = run_emulated(_check(flavour, emulation, tmp_path, defect), 0)
    assert done.returncode != 0, done.stdout
    if flavour == "tsan":
        assert "data race" in done.stderr
