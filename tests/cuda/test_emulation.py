"""The emulation itself: right where kernels are right, and loud where they are not.

Builds ``check.cu`` with the compiler of the project: plain, and under ThreadSanitizer, which
finds a race in whatever order the threads run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .emulated_programs import Program, Workshop

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


def _program(flavour: str, defect: int = 0, seeds: tuple[int, ...] = (0,)) -> Program:
    check = Path(__file__).with_name("check.cu")
    return Program(flavour, (check,), (f"-DOW_DEFECT={defect}",), seeds=seeds)


@pytest.mark.parametrize(
    "program",
    [pytest.param(_program(f, seeds=(0, 1, 2, 3)), id=f) for f in ("plain", "tsan")],
)
def test_right_kernels_pass(program: Program, workshop: Workshop) -> None:
    for done in workshop.outcomes(program):
        assert done.returncode == 0, done.stdout + done.stderr[:4000]
        assert "FAIL" not in done.stdout
        assert "WARNING" not in done.stderr


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(_program(flavour, defect), id=f"{flavour}: {name}")
        for defect, name in enumerate(DEFECTS, 1)
        for flavour in ("plain", "tsan")
        if flavour == "plain" or defect in RACES
    ],
)
def test_planted_defect_is_found(program: Program, workshop: Workshop) -> None:
    (done,) = workshop.outcomes(program)
    assert done.returncode != 0, done.stdout
    if program.flavour == "tsan":
        assert "data race" in done.stderr
