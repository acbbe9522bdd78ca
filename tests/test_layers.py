"""Who may include or import whom, and what the compiled objects may contain.

The rules are those of csrc/README.md, read from ``#include`` and ``import`` lines. Tests of objects
need the folder the library was built in: set OPENWORK_BUILD_DIR.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openwork

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "openwork"

STD = r"[a-z_]+|std(int|io|lib|def)\.h|string\.h|math\.h"
C_TYPES = r"stdint\.h|string\.h"

# (files, what they may include): the first rule whose pattern matches the whole path decides, and
# every file must have one. Groups of the first pattern may be used in the second.
INCLUDE_RULES = (
    # Asks Linux for the tile registers.
    (r"core/isa\.cpp", rf"core/.*|sys/syscall\.h|unistd\.h|{STD}"),
    (r"core/.*", rf"core/.*|{STD}"),
    # For GPUs. All PTX is in cuda/ptx.h; what is not compiled by nvcc is emulated.
    (r"cuda/.*", rf"core/types\.h|cuda/.*|testing/cuda/.*|cuda_runtime\.h|{C_TYPES}"),
    (r"kernels/(\w+)/\1_cuda\.h", rf"kernels/\1/\1\.h|cuda/status\.h|{C_TYPES}"),
    (r"kernels/(\w+)/\1\w*(?:\.cu|_cuda\.h)", r"kernels/\1/\1\w*\.h|core/.*|cuda/.*"),
    (
        r"ops/cuda/.*",
        r"torch/csrc/stable/.*|torch/headeronly/.*|cuda/status\.h|kernels/\w+/\w+_cuda\.h|"
        rf"core/.*|ops/.*|{STD}",
    ),
    (
        r"testing/cuda/.*",
        rf"testing/cuda/.*|cuda/(fragments|ptx|status)\.h|core/types\.h|sanitizer/.*|sys/mman\.h|{STD}",
    ),
    (r"simd/.*", r"core/types\.h|simd/\w+\.h|immintrin\.h"),
    # Files compiled once for each tier, and the headers they share: no C++ library.
    (
        r"kernels/(\w+)/\1_(?:\w*avx\w+|\w*scalar|\w*body)\.(?:cpp|h)",
        rf"kernels/\1/\1\w*\.h|simd/\w+\.h|core/types\.h|immintrin\.h|{C_TYPES}",
    ),
    (r"kernels/(\w+)/\1\.h", rf"core/.*|{C_TYPES}"),
    (r"kernels/(\w+)/\1\w*\.cpp", rf"kernels/\1/\1(?:_pack_body)?\.h|core/.*|{STD}"),
    # fast_empty (ops/glue.h) allocates through the C shim itself.
    (
        r"ops/.*",
        r"torch/csrc/stable/.*|torch/headeronly/.*|torch/csrc/inductor/aoti_torch/c/shim\.h|"
        rf"kernels/(\w+)/\1\.h|core/.*|ops/.*|{STD}",
    ),
    (r"host/\w+_module\.cpp", rf"pybind11/.*|host/.*|core/.*|{STD}"),
    (r"host/.*", rf"host/.*|sys/mman\.h|{STD}"),
    (
        r"testing/(?:\w+_module\.(?:cpp|h)|\w+_kernels\.(?:cpp|h))",
        rf"pybind11/.*|testing/.*|kernels/(\w+)/\1\.h|core/.*|{STD}",
    ),
    (r"testing/.*", rf"testing/.*|immintrin\.h|{C_TYPES}"),
)

# What each part of the package may import of the others; parts that are not listed may import
# anything but the ones in CLOSED.
IMPORT_RULES = {
    "_native": set(),
    "packing": {"_host", "_native"},
    "block_index": set(),
    "kv_format": {"_host"},
    "kv_pages": {"_host", "kv_format"},
    "ops": {"_native", "block_index", "kv_format", "kv_pages", "packing"},
    "nn": {"ops", "packing"},
    "errors": set(),
    "testing": {"_native", "block_index", "kv_format", "kv_pages", "ops", "packing"},
}
# Only the part itself (and tests and bench) may import these.
CLOSED = {"testing", "integrations", "cli", "_kernels"}
# The command line sits on top, behind its own entry point.
MAY_IMPORT_CLOSED = {"__main__": {"cli"}}

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 400


def _sources(*suffixes: str) -> Iterator[Path]:
    for folder in ("csrc", "python", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def _rule_for(path: str) -> str | None:
    for files, allowed in INCLUDE_RULES:
        match = re.fullmatch(files, path)
        if match:
            family = match.group(1) if match.re.groups else None
            return allowed if family is None else allowed.replace(r"\1", family)
    return None


@pytest.mark.parametrize(
    "path",
    [p.relative_to(CSRC).as_posix() for p in _sources(".cpp", ".h", ".cu") if CSRC in p.parents],
)
def test_includes(path: str) -> None:
    allowed = _rule_for(path)
    assert allowed is not None, f"csrc/{path} belongs to no layer; add it to INCLUDE_RULES"
    text = (CSRC / path).read_text()
    for included in re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', text, re.MULTILINE):
        assert re.fullmatch(allowed, included), f"csrc/{path} may not include {included}"


def test_include_rules_refuse_what_they_should() -> None:
    """The rules themselves: a pattern that matches everything would pass every file."""
    for path, included in (
        ("core/isa.cpp", "immintrin.h"),
        ("core/isa.cpp", "torch/csrc/stable/tensor.h"),
        ("simd/vec_avx2.h", "vector"),
        ("kernels/quantize/quantize.h", "immintrin.h"),
        ("kernels/quantize/quantize_avx2.cpp", "algorithm"),
        ("kernels/quantize/quantize.cpp", "kernels/lowbit_gemm/lowbit_gemm.h"),
        ("ops/library.cpp", "ATen/ATen.h"),
        ("ops/library.cpp", "cuda/status.h"),
        ("kernels/quantize/quantize.cu", "torch/csrc/stable/tensor.h"),
        ("kernels/quantize/quantize.cu", "kernels/lowbit_gemm/lowbit_gemm.h"),
        ("ops/library.cpp", "torch/all.h"),
        ("ops/library.cpp", "kernels/lowbit_gemm/lowbit_gemm_avx512.h"),
        ("host/page_pool.cpp", "pybind11/pybind11.h"),
        ("testing/kernels_module.cpp", "torch/csrc/stable/tensor.h"),
    ):
        allowed = _rule_for(path)
        assert allowed is not None
        assert not re.fullmatch(allowed, included), f"{path} would be let include {included}"


def test_intrinsics_stay_in_tier_files() -> None:
    intrinsic = re.compile(r"\b_mm(?:256|512)?_\w+|\b__m(?:128|256|512)\w*|__builtin_ia32|\basm\b")
    for path in _sources(".cpp", ".h", ".cu"):
        # PTX, and the switch of stacks.
        if path.relative_to(ROOT).as_posix() in ("csrc/cuda/ptx.h", "csrc/testing/cuda/fiber.cpp"):
            continue
        if path.parent.name == "simd" or re.search(r"_avx\w+$", path.stem):
            continue
        # The hint of a loop that waits; processors that do not know it do nothing.
        found = intrinsic.search(path.read_text().replace('asm volatile("pause")', ""))
        assert found is None, f"{path.relative_to(ROOT)} uses {found and found.group()}"


def _imports(path: Path) -> Iterator[str]:
    """Parts of the package that a file imports, at any depth of its code: "ops", "_native", ..."""
    package = ("openwork", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "openwork":
                yield parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize(
    "path", [p.relative_to(PACKAGE).as_posix() for p in sorted(PACKAGE.rglob("*.py"))]
)
def test_imports(path: str) -> None:
    part = path.split("/")[0].removesuffix(".py")
    for imported in _imports(PACKAGE / path):
        if imported == part:
            continue
        assert imported not in CLOSED - MAY_IMPORT_CLOSED.get(part, set()), (
            f"{path} may not import openwork.{imported}"
        )
        allowed = IMPORT_RULES.get(part)
        assert allowed is None or imported in allowed, (
            f"{path} may import {sorted(allowed or ())} of openwork, not '{imported}'"
        )


def test_file_names_say_what_is_inside() -> None:
    for path in _sources(".py", ".cpp", ".h", ".cu"):
        assert path.stem not in FORBIDDEN_NAMES, f"{path.relative_to(ROOT)} says nothing"


def test_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in _sources(".py", ".cpp", ".h", ".cu")
    }
    # Tests repeat their shape more than code does.
    long = {
        str(path): lines
        for path, lines in lengths.items()
        if lines > MAX_LINES + (100 if path.parts[0] == "tests" else 0)
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def _build_dir() -> Path:
    folder = os.environ.get("OPENWORK_BUILD_DIR")
    if not folder:
        pytest.skip("set OPENWORK_BUILD_DIR to the folder the library was built in")
    return Path(folder)


def _tier_of(stem: str) -> str | None:
    match = re.search(r"_(scalar|avx2|avx512|avx512bf16|avx512amx)$", stem)
    return match and match.group(1)


def test_tier_objects_share_no_code() -> None:
    """No weak symbol, which the linker might merge with another tier's; exports name the tier."""
    nm = _tool("nm")
    objects = [p for p in _build_dir().rglob("*.cpp.o") if _tier_of(p.name.removesuffix(".cpp.o"))]
    assert objects, f"no objects in {_build_dir()}"
    for path in objects:
        tier = _tier_of(path.name.removesuffix(".cpp.o"))
        lines = subprocess.run([nm, "-P", path], check=True, capture_output=True, text=True).stdout
        for line in lines.splitlines():
            name, kind = line.split()[:2]
            assert kind not in "WVu", f"{path.name} defines the weak symbol {name}"
            if kind in "TDRBC":
                exported = re.match(r"_ZN2ow\d+\w+?_" + f"{tier}E", name)
                assert exported, f"{path.name} exports {name}, which does not end in _{tier}"


def test_compiler_flags_belong_to_the_tier() -> None:
    commands = json.loads((_build_dir() / "compile_commands.json").read_text())
    assert commands
    for command in commands:
        stem = Path(command["file"]).stem
        flags = shlex.split(command["command"])
        for never in ("-march=native", "-ffast-math", "-Ofast", "-funsafe-math-optimizations"):
            assert never not in flags, f"{stem} is compiled with {never}"
        tier = _tier_of(stem) or "scalar"
        if tier != "scalar":
            assert not any(f.startswith("-flto") for f in flags), f"{stem} is compiled with LTO"
        has = {f for f in flags if re.match(r"-m(avx|fma|f16c|bmi|amx)", f)}
        assert ("-mavx2" in has) == (tier != "scalar"), f"{stem}: {sorted(has)}"
        assert ("-mavx512f" in has) == tier.startswith("avx512"), f"{stem}: {sorted(has)}"
        bf16 = tier in ("avx512bf16", "avx512amx")
        assert ("-mavx512bf16" in has) == bf16, f"{stem}: {sorted(has)}"
        assert ("-mamx-int8" in has) == (tier == "avx512amx"), f"{stem}: {sorted(has)}"


def test_library_needs_only_the_stable_abi() -> None:
    library = Path(openwork.__file__).with_name("openwork_cpu.so")
    command = [_tool("nm"), "-D", "-C", "--undefined-only", library]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = [line.split(maxsplit=1)[1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in needed)
    for name in needed:
        assert not re.search(r"\b(at|c10|caffe2|torch)::", name), f"needs {name}"
        assert "torch" not in name or re.match(r"(aoti_)?torch_", name), f"needs {name}"
        assert not re.match(r"_?Py[A-Z_]", name), f"needs {name} of Python"
        assert not re.match(r"(GOMP|omp|__kmpc)_", name), f"needs {name} of an OpenMP runtime"


def test_library_passes_torch_abi_audit() -> None:
    if importlib.util.find_spec("torch_abi_audit") is None:
        pytest.skip("torch-abi-audit is not installed")
    library = Path(openwork.__file__).with_name("openwork_cpu.so").resolve()
    script = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "--check", "torch", "--json", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.10" in done.stdout, done.stdout
