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
    # Its check has exact data and the formula.
    "lowbit_gemm": (),
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
    Defect(
        "lowbit_gemm", "no barrier in the pipeline", "lowbit_gemm_tile.cu",
        "is read by none.\n    __syncthreads();\n", "is read by none.\n", race=True,
    ),
    Defect(
        "lowbit_gemm", "a wait too short by one group", "lowbit_gemm_tile.cu",
        "kStages - 2>();", "kStages - 1>();", race=True,
    ),
    Defect(
        "lowbit_gemm", "a stage overwritten while it is read", "lowbit_gemm_tile.cu",
        "copy<kDigits>((stage + kStages - 1) % kStages,", "copy<kDigits>(stage,", race=True,
    ),
    Defect(
        "lowbit_gemm", "sums overwrite the last stage", "lowbit_gemm_tile.cu",
        "  __syncthreads();\n  sum.template", "  sum.template", race=True,
    ),
    Defect(
        "lowbit_gemm", "a wrong register of x", "lowbit_gemm_tile.cu",
        "words[0] = eight.x;", "words[0] = eight.y;",
    ),
    Defect(
        "lowbit_gemm", "no zeros for lanes of the other group", "lowbit_gemm_tile.cu",
        "if (threadIdx.x == 0)", "if (false)",
    ),
    Defect(
        "lowbit_gemm", "a thread's wait too short by one group", "lowbit_gemm_rows.cu",
        "kCount - 2>();", "kCount - 1>();",
    ),
    Defect(
        "lowbit_gemm", "no barrier before warps are summed", "lowbit_gemm_rows.cu",
        "    __syncthreads();\n    write_tile", "    write_tile", race=True,
    ),
    Defect(
        "lowbit_gemm", "the next segment overtakes the sum", "lowbit_gemm_rows.cu",
        "    __syncthreads();\n    unit += count;", "    unit += count;", race=True,
    ),
    Defect(
        "lowbit_gemm", "shared memory too small", "lowbit_gemm_rows.cu",
        "+ kWarps * kShareSize", "+ kShareSize",
    ),
    Defect("lowbit_gemm", "a part left out", "lowbit_gemm.cu", "block <= last;", "block < last;"),
)  # fmt: skip


def _object(flavour: str, source: Path, out: Path) -> Path:
    """Of a source; made once in a folder."""
    built = out / f"{source.stem}.o"
    if not built.is_file():
        compile_emulated(flavour, [source], built, "-DOW_TARGET=scalar", "-x", "c++", "-c")
    return built


def _program(
    flavour: str, family: str, emulation: list[Path], out: Path, defect: Defect | None = None
) -> Path:
    check = ROOT / "tests" / "cuda" / f"check_{family}.cpp"
    kernels = sorted((CSRC / "kernels" / family).glob("*.cu"))
    objects = []
    for source in [check, *(CSRC / name for name in FAMILIES[family]), *kernels]:
        if defect is None or source.name != defect.source:
            objects.append(_object(flavour, source, emulation[0].parent))
            continue
        text = source.read_text()
        assert text.count(defect.old) >= 1, f"{defect.source} has no {defect.old!r}"
        planted = out / source.name
        planted.write_text(text.replace(defect.old, defect.new, 1))
        objects.append(_object(flavour, planted, out))
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
