"""Loads the native library and reports what it runs on."""

from __future__ import annotations

import os
import pathlib
from dataclasses import asdict, dataclass

import torch

_LIBRARY = pathlib.Path(__file__).with_name("openwork_cpu.so")

if not _LIBRARY.is_file():
    raise ImportError(
        f"openwork: native library {_LIBRARY.name} expected beside the package, got none; "
        "install openwork with pip from a checkout or a wheel"
    )
torch.ops.load_library(str(_LIBRARY))


def _load_cuda() -> str:
    """Load the CUDA operators beside a torch that has CUDA, driver or not.

    Returns:
        ``loaded``, or why they are not.
    """
    library = _LIBRARY.with_name("openwork_cuda.so")
    if not library.is_file():
        return "not built: no nvcc when the package was, or OPENWORK_CUDA=OFF"
    if torch.version.cuda is None and os.environ.get("OPENWORK_LOAD_CUDA") != "1":
        return "not loaded: torch is a CPU build; OPENWORK_LOAD_CUDA=1 loads them for export"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"not loaded: {error}"
    return "loaded"


_CUDA = _load_cuda()


@dataclass(frozen=True)
class Info:
    """What this process runs on; the return value of :func:`info`.

    Attributes:
        isa: instruction-set tier kernels are chosen for (``scalar``, ``avx2``, ``avx512``,
            ``avx512bf16`` < ``avx512amx``).
        cpu_isa: the best tier this CPU has.
        kernels: names of the kernels in use, best first within a family.
        layouts: packed layouts this build reads.
        cuda: ``loaded`` if the CUDA operators are (experimental), or else why they are not.
        torch_version: the torch the library was loaded into.
        threads: ``torch.get_num_threads()``.
    """

    isa: str
    cpu_isa: str
    kernels: tuple[str, ...]
    layouts: tuple[str, ...]
    cuda: str
    torch_version: str
    threads: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def isa() -> str:
    """The instruction-set tier kernels are chosen for: the CPU's best one, unless
    the environment variable ``OPENWORK_ISA`` or :func:`set_isa` lowered it."""
    return str(torch.ops.openwork.isa())


def set_isa(name: str) -> None:
    """Lower the tier kernels are chosen for (or raise it back) for the whole process.

    Args:
        name: ``scalar``, ``avx2``, ``avx512``, ``avx512bf16`` or ``avx512amx``.

    Raises:
        ValueError: unknown name, or a tier this CPU does not have.
    """
    torch.ops.openwork.set_isa(name)


def kernels() -> tuple[str, ...]:
    """Names of every kernel the current tier may choose from, best first within a family."""
    return tuple(torch.ops.openwork.kernels())


def layouts() -> tuple[str, ...]:
    """Packed-weight layouts this build reads, as ``name@version``; the position is the id."""
    return tuple(torch.ops.openwork.layouts())


def info() -> Info:
    """Describe the loaded library, the CPU and the threads it will use.

    Example:
        >>> import openwork
        >>> openwork.info().isa in ("scalar", "avx2", "avx512", "avx512bf16", "avx512amx")
        True
    """
    return Info(
        isa=isa(),
        cpu_isa=torch.ops.openwork.cpu_isa(),
        kernels=kernels(),
        layouts=layouts(),
        cuda=_CUDA,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
    )


# An OPENWORK_ISA the CPU cannot honour must not pass for one it did.
isa()
