"""The kernels of each family, emulated: equal to the scalar ones, without races, within bounds.

``check_<family>.cpp`` holds a family's launch function against its scalar kernel on small operands.
To know that it would notice, the family is also built with defects: a piece of its source replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from .emulated_programs import CSRC, ROOT, compile_emulated, run_emulated

# Families with CUDA kernels, and the sources beside theirs that their checks are made of.
FAMILIES = {
    "quantize": ("kernels/quantize/quantize_scalar.cpp",),
    "hadamard": ("kernels/hadamard/hadamard_scalar.cpp",),
}


@dataclass(frozen=True)
class Defect:
    """``old`` becomes ``new`` in a source, once; ``race``: ThreadSanitizer must say so."""

    family: str
    name: str
    source: str
    old: str
    new: str
    race: bool = False


DEFECTS = (
    Defect("quantize", "no barrier", "quantize.cu", "  __syncthreads();\n", "", race=True),
    Defect("quantize", "half the lanes", "quantize.cu", "lanes = kWarp / 2;", "lanes = kWarp / 4;"),
    Defect(
        "hadamard", "no barrier before the turn is read", "hadamard.cu",
        "    __syncthreads();\n    OW_UNROLL", "    OW_UNROLL", race=True,
    ),
    Defect(
        "hadamard", "the second turn overtakes the first", "hadamard.cu",
        "    if (j0 != 0) __syncthreads();\n", "", race=True,
    ),
    Defect("hadamard", "no last stage of lanes", "hadamard.cu", "lanes < kWarp;", "lanes < 16;"),
    Defect("hadamard", "a wrong half", "hadamard.cu", "late ? 4 : 0", "late ? 0 : 4"),
    Defect("hadamard", "shared memory too small", "hadamard.cu", "kWarps * kTurn", "kTurn"),
)  # fmt: skip


def _program(
    flavour: str, family: str, emulation: list[Path], out: Path, defect: Defect | None = None
) -> Path:
    objects = []
    check = ROOT / "tests" / "cuda" / f"check_{family}.cpp"
    kernels = sorted((CSRC / "kernels" / family).glob("*.cu"))
    for source in [check, *(CSRC / name for name in FAMILIES[family]), *kernels]:
        built = source
        if defect is not None and source.name == defect.source:
            text = source.read_text()
            assert text.count(defect.old) >= 1, f"{defect.source} has no {defect.old!r}"
            built = out / source.name
            built.write_text(text.replace(defect.old, defect.new, 1))
        objects.append(out / f"{source.stem}.o")
        flags = ["-DOW_TARGET=scalar", "-x", "c++", "-c"]
        compile_emulated(flavour, [built], objects[-1], *flags)
    program = out / family
    compile_emulated(flavour, [*objects, *emulation], program)
    return program


@pytest.mark.parametrize("flavour", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_scalar_kernels(
    family: str, flavour: str, emulation: list[Path], tmp_path: Path
) -> None:
    program = _program(flavour, family, emulation, tmp_path)
    for seed in (0, 1, 2) if flavour == "plain" else (0,):
        done = run_emulated(program, seed)
        assert done.returncode == 0, done.stdout + done.stderr[:4000]
        assert not done.stderr


@pytest.mark.parametrize(
    ("flavour", "defect"),
    [("tsan" if d.race else "plain", d) for d in DEFECTS],
    ids=lambda value: f"{value.family}: {value.name}" if isinstance(value, Defect) else value,
)
def test_planted_defect_is_found(
    defect: Defect, flavour: str, emulation: list[Path], tmp_path: Path
) -> None:
    done = run_emulated(_program(flavour, defect.family, emulation, tmp_path, defect), 0)
    assert done.returncode != 0, done.stdout
    assert not defect.race or "data race" in done.stderr


def test_every_family_is_checked() -> None:
    assert {path.parent.name for path in CSRC.glob("kernels/*/*.cu")} == FAMILIES.keys()
