"""Programs of the CUDA sources, compiled for the CPU by the compiler of the project.

A test names its program as the parameter ``program`` and asks the fixture ``workshop`` what became
of it. The programs of all tests that will run are built and run on all cores from the beginning.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATION = tuple(sorted((CSRC / "testing" / "cuda").glob("*.cpp")))
FLAVOURS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}
Outcome = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Change:
    """The text of a source or header of csrc, with a defect planted."""

    path: Path
    text: str


@dataclass(frozen=True)
class Program:
    """Sources, beside the emulation's, and how they are built and run.

    Attributes:
        flavour: of :data:`FLAVOURS`.
        sources: the first is compiled with ``defines``.
        defines: flags such as ``-DOW_DEFECT=1``.
        change: takes the place of a source, or of a header that the sources include.
        seeds: of the order of threads, a run each; 0: in order.
    """

    flavour: str
    sources: tuple[Path, ...]
    defines: tuple[str, ...] = ()
    change: Change | None = None
    seeds: tuple[int, ...] = (0,)


class Workshop:
    """Builds programs, what they share once, and runs them.

    Args:
        folder: for all that is made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._futures: dict[Program, Future[list[Outcome]]] = {}
        self._objects: dict[Hashable, Path] = {}
        self._locks: defaultdict[Hashable, Lock] = defaultdict(Lock)

    def begin(self, programs: Iterable[Program]) -> None:
        for program in programs:
            if program not in self._futures:
                folder = self._folder / str(len(self._futures))
                self._futures[program] = self._pool.submit(self._made, program, folder)

    def outcomes(self, program: Program) -> list[Outcome]:
        """Of the program's runs, by seed."""
        self.begin([program])
        return self._futures[program].result()

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _made(self, program: Program, folder: Path) -> list[Outcome]:
        include = folder / "include"
        include.mkdir(parents=True)
        if program.change is not None:
            changed = include / program.change.path.relative_to(CSRC)
            changed.parent.mkdir(parents=True)
            changed.write_text(program.change.text)
        sources = (*program.sources, *EMULATION)
        objects = [self._object(program, source, folder) for source in sources]
        _compile(program.flavour, [*map(str, objects), "-o", str(folder / "program")])
        return [_run(folder / "program", seed) for seed in program.seeds]

    def _object(self, program: Program, source: Path, folder: Path) -> Path:
        defines = program.defines if source == program.sources[0] else ()
        change = program.change
        # What a change does not reach is the object of all programs.
        if change is not None and source != change.path:
            header = change.path.suffix == ".h" and source not in EMULATION
            change = change if header else None
        key = (program.flavour, source, defines, change)
        with self._locks[key]:
            if key not in self._objects:
                out = folder / f"{source.stem}.o"
                include = folder / "include"
                moved = source
                if change is not None and source == change.path:
                    moved = include / source.relative_to(CSRC)
                flags = [f"-I{include}", f"-I{CSRC}", "-DOW_TARGET=scalar", *defines]
                _compile(program.flavour, [*flags, "-x", "c++", "-c", str(moved), "-o", str(out)])
                self._objects[key] = out
        return self._objects[key]


def _compile(flavour: str, arguments: list[str]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    base = [compiler, "-std=c++20", "-DOW_CUDA_EMULATED", "-w", *FLAVOURS[flavour]]
    done = subprocess.run([*base, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _run(program: Path, seed: int) -> Outcome:
    return subprocess.run([program, str(seed)], capture_output=True, text=True, timeout=200)
