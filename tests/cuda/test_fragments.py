"""The fragment tables against a second source: the headers in the wheel ``nvidia-cutlass``.

Its dependencies are not needed: ``pip install --no-deps nvidia-cutlass==4.2.0.0``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_those_of_cute(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        pytest.skip("nvidia-cutlass is not installed")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if compiler is None or nvcc is None:
        pytest.skip("no C++ compiler, or no nvcc, whose headers CuTe includes")
    include = Path(found.origin).parent / "source" / "include"
    program = tmp_path / "cute_fragments"
    source = Path(__file__).with_name("cute_fragments.cpp")
    # nvcc as a front end of the C++ compiler, which is all it is for a .cpp file.
    command = [nvcc, "-ccbin", compiler, "-std=c++20", "-w", "-I", str(ROOT / "csrc")]
    built = subprocess.run(
        [*command, "-I", str(include), source, "-o", program], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
