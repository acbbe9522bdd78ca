"""The kernels of each family, emulated: equal to the scalar ones, without races, within bounds.

``check_<family>.cpp`` holds a family's launch function against its scalar kernel on small operands;
that of ``nm_gemm``, where the scalar one rounds otherwise, some of its kernels against exact sums.
To know that it would notice, the family is also built with defects: a piece of its source replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from .emulated_programs import CSRC, compile_emulated, run_emulated

# Families with CUDA kernels, and the sources that their checks are made of. That of nm_gemm
# includes the kernels: all that nm_gemm.cu makes of them take too long to compile.
FAMILIES = {
    "quantize": ("quantize_scalar.cpp", "quantize.cu"),
    "hadamard": ("hadamard_scalar.cpp", "hadamard.cu"),
    "nm_gemm": (),
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
        "at ^ at / 128 % 2 * 32;", "at;",
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


def _program(
    flavour: str, family: str, emulation: list[Path], out: Path, defect: Defect | None = None
) -> Path:
    include = out / "include"
    folder = include / "kernels" / family
    if defect is not None:
        text = (CSRC / "kernels" / family / defect.source).read_text()
        assert text.count(defect.old) >= 1, f"{defect.source} has no {defect.old!r}"
        folder.mkdir(parents=True)
        (folder / defect.source).write_text(text.replace(defect.old, defect.new, 1))
    objects = []
    for name in (f"check_{family}.cpp", *FAMILIES[family]):
        # Checks are here; of the family's sources, one may have a defect.
        folders = (Path(__file__).parent, folder, CSRC / "kernels" / family)
        source = next(f / name for f in folders if (f / name).is_file())
        # What a defect does not reach is compiled once.
        reached = defect is not None and (defect.source.endswith(".h") or defect.source == name)
        objects.append((out if reached else emulation[0].parent) / f"{source.stem}.o")
        if objects[-1].is_file():
            continue
        flags = ["-DOW_TARGET=scalar", "-x", "c++", "-c"]
        compile_emulated(flavour, [source], objects[-1], *flags, include=include)
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
