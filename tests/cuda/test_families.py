"""The kernels of each family, emulated: equal to the scalar ones, without races, within bounds.

``check_<family>.cpp`` holds a family's launch function against its scalar kernel on small operands;
that of ``nm_gemm``, where the scalar one rounds otherwise, against exact sums.
To know that it would notice, the family is also built with defects: a piece of its source replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from .emulated_programs import CSRC, FLAVOURS, Change, Program, Workshop

# Families with CUDA kernels, and the sources that their checks are made of. That of nm_gemm
# includes the kernels and makes some of those that nm_gemm_few.cu and nm_gemm_many.cu have.
FAMILIES = {
    "quantize": ("quantize_scalar.cpp", "quantize.cu"),
    "hadamard": ("hadamard_scalar.cpp", "hadamard.cu"),
    "nm_gemm": ("nm_gemm.cu", "nm_gemm_pack.cu"),
    "lowbit_gemm": (
        "lowbit_gemm.cu",
        "lowbit_gemm_pack.cu",
        "lowbit_gemm_rows.cu",
        "lowbit_gemm_tile.cu",
    ),
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
        "quantize", "one pass of a row", "quantize.cu",
        "k += threads * kEight", "k += count",
    ),
    Defect("quantize", "a wrong byte", "quantize.cu", "codes[1] & 255", "codes[2] & 255"),
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
        "lowbit_gemm", "no zeros for lanes of the other group", "lowbit_gemm_rows.cu",
        "keep ? words[i] : 0", "words[i]",
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
    Defect(
        "nm_gemm", "no barrier in the pipeline", "nm_gemm_many_cuda.h",
        "__syncthreads();  // the tile is there, and the one before is read", "", race=True,
    ),
    Defect(
        "nm_gemm", "a wait too short by one group", "nm_gemm_many_cuda.h",
        "wait_group<Shape::kStages - 2>", "wait_group<Shape::kStages - 1>", race=True,
    ),
    Defect(
        "nm_gemm", "a stage overwritten while it is read", "nm_gemm_many_cuda.h",
        "uint8_t* to = shared + tile %", "uint8_t* to = shared + (tile + 1) %", race=True,
    ),
    Defect(
        "nm_gemm", "a wrong fragment of x", "nm_gemm_many_cuda.h",
        "lane / 8 * 8", "(lane / 8 ^ 1) * 8",
    ),
    Defect(
        "nm_gemm", "halves swapped on one side only", "nm_gemm_many_cuda.h",
        "nm_swizzled(at)", "at",
    ),
    Defect(
        "nm_gemm", "metadata for the other columns", "nm_gemm_weights_cuda.h",
        "(column / 4 + 2 * pair)", "(2 * pair)",
    ),
    Defect(
        "nm_gemm", "padding of the index not in order", "nm_gemm_weights_cuda.h",
        "(any ^ 0x11111111) << 2", "0",
    ),
    Defect(
        "nm_gemm", "scales of the wrong outputs", "nm_gemm_weights_cuda.h",
        "scales[i / 2]", "scales[i % 2]",
    ),
    Defect(
        "nm_gemm", "scales of the wrong half of a tile", "nm_gemm_weights_cuda.h",
        "step * int(kNmPanel) : 0", "0 : 0",
    ),
    Defect(
        "nm_gemm", "tokens of the last tiles of outputs left out", "nm_gemm_many_cuda.h",
        "within / width, first + within % width", "within / kWidth, first + within % width",
    ),
    Defect(
        "nm_gemm", "a warp's wait too short by one group", "nm_gemm_few_cuda.h",
        "wait_group<kStages - 2>", "wait_group<kStages - 1>", race=True,
    ),
    Defect(
        "nm_gemm", "a warp's stage overwritten while it is read", "nm_gemm_few_cuda.h",
        "request(a, stage_ == 0 ? kStages - 1 : stage_ - 1,", "request(a, stage_,", race=True,
    ),
    Defect(
        "nm_gemm", "a lane overtakes the others", "nm_gemm_few_cuda.h",
        "__syncwarp();  // the tile is there, and the one before is read", "", race=True,
    ),
    Defect(
        "nm_gemm", "no barrier before the sum", "nm_gemm_few_cuda.h",
        "__syncthreads();  // of_warps is written", "", race=True,
    ),
    Defect(
        "nm_gemm", "no barrier in a warp", "nm_gemm_few_cuda.h",
        "[] { __syncwarp(); }", "[] {}", race=True,
    ),
    Defect(
        "nm_gemm", "a tile overwritten while it is read", "nm_gemm_few_cuda.h",
        "__syncwarp();  // the tile before is read", "", race=True,
    ),
)  # fmt: skip


def _program(family: str, flavour: str, defect: Defect | None = None) -> Program:
    folder = CSRC / "kernels" / family
    check = Path(__file__).with_name(f"check_{family}.cpp")
    change = None
    if defect is not None:
        text = (folder / defect.source).read_text()
        assert defect.old in text, f"{defect.source} has no {defect.old!r}"
        change = Change(folder / defect.source, text.replace(defect.old, defect.new, 1))
    seeds = (0, 1, 2) if flavour == "plain" and defect is None else (0,)
    sources = (check, *(folder / name for name in FAMILIES[family]))
    return Program(flavour, sources, change=change, seeds=seeds)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(_program(family, flavour), id=f"{family}-{flavour}")
        for family in FAMILIES
        for flavour in FLAVOURS
    ],
)
def test_equal_to_the_scalar_kernels(program: Program, workshop: Workshop) -> None:
    for done in workshop.outcomes(program):
        assert done.returncode == 0, done.stdout + done.stderr[:4000]
        assert not done.stderr


@pytest.mark.parametrize(
    ("program", "race"),
    [
        pytest.param(
            _program(d.family, "tsan" if d.race else "plain", d),
            d.race,
            id=f"{d.family}: {d.name}",
        )
        for d in DEFECTS
    ],
)
def test_planted_defect_is_found(program: Program, race: bool, workshop: Workshop) -> None:
    (done,) = workshop.outcomes(program)
    assert done.returncode != 0, done.stdout
    assert not race or "data race" in done.stderr


def test_every_family_is_checked() -> None:
    assert {path.parent.name for path in CSRC.glob("kernels/*/*.cu")} == FAMILIES.keys()
