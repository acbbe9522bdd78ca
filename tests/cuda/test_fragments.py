"""The fragment tables against a second source.

That is the headers in the wheel ``nvidia-cutlass``, whose dependencies are not needed:
``pip install --no-deps nvidia-cutlass==4.2.0.0``; and for metadata, which they have no table of,
the order in which torch gives it to CUTLASS.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

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


def test_metadata_is_that_of_torch_for_cutlass(tmp_path: Path) -> None:
    """Where torch puts the metadata of 32 x 32 weights: a word of 32 bits for each lane.

    Two products of 16 rows share the words: the first has selector 0, the second 1.
    """
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sparse_fragments"
    source = Path(__file__).with_name("sparse_fragments.cpp")
    subprocess.run(
        [compiler, "-std=c++20", "-I", str(ROOT / "csrc"), source, "-o", program], check=True
    )
    table = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    # Half by half of the lanes' words, which row and which 16 columns.
    places = conversions._calculate_meta_reordering_scatter_offsets(32, 2, torch.int16, "cpu")
    holds = {int(place): divmod(i, 2) for i, place in enumerate(places)}
    for half, line in enumerate(table.splitlines()):
        row, column, selector = map(int, line.split())
        assert holds[half] == (row + 16 * selector, column // 16), f"lane {half // 2}"
    assert len(holds) == len(table.splitlines()) == 64
