"""Programs of the CUDA sources, compiled for the CPU by the compiler of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAVOURS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}


def compile_emulated(
    flavour: str, sources: list[Path], out: Path, *flags: str, include: Path = CSRC
) -> None:
    """One call of the compiler: an object, with ``-c``, or a program of objects.

    Headers below ``include`` come before those of the project.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    base = ["-std=c++20", f"-I{include}", f"-I{CSRC}", "-DOW_CUDA_EMULATED", "-w"]
    done = subprocess.run(
        [compiler, *base, *FLAVOURS[flavour], *flags, *map(str, sources), "-o", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def run_emulated(program: Path, seed: int) -> subprocess.CompletedProcess[str]:
    """Run with a seed of the order of threads; 0: in order."""
    return subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=100)
