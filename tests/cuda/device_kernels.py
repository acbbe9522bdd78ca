"""What every device kernel may use, and what that leaves of a multiprocessor.

The tables below are the limits that test_binary.py holds the compiled code to. ``python -m
tests.cuda.device_kernels`` prints them as the tables of csrc/README.md: figures of the design, by
data sheet and by the limits, not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

WARP = 32
# Registers go to threads by eights, shared memory to blocks by 128 bytes.
REGISTER_UNIT = 8
SHARED_UNIT = 128
# Shared memory that the system takes of each block.
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class DeviceKernel:
    """A kernel, and the most it may use.

    Attributes:
        name: as the compiler prints it without namespaces and parameters, with wildcards for
            template arguments: ``gemm<*>``.
        threads: of a block.
        registers: of a thread, a multiple of 8.
        shared: bytes of a block, static and dynamic.
        dynamic: of these, those that the launch asks for.
        tensor: the kinds of tensor core instruction its code has: "HMMA" (16-bit), "IMMA" (8-bit),
            and ".SP" for the sparse ones.
    """

    name: str
    threads: int
    registers: int
    shared: int = 0
    dynamic: int = 0
    tensor: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.registers % REGISTER_UNIT or self.dynamic > self.shared:
            raise ValueError(f"{self.name}: registers must be a multiple of 8, dynamic <= shared")


DENSE = frozenset({"HMMA"})
SPARSE = frozenset({"HMMA.SP"})
BYTES = frozenset({"IMMA"})

# Kernels of openwork_cuda.so, of all that its products and transforms run. The first row whose name
# matches decides.
KERNELS = (
    DeviceKernel("encode_rows_int8<*>", 256, 40, shared=32),
    DeviceKernel("encode_rows_fixed<*>", 256, 64),
    DeviceKernel("hadamard_in_warps<*>", 256, 40),
    # Blocks of 512, 1024, ..., 32768 elements.
    DeviceKernel("hadamard_in_blocks<*, 1, 2>", 64, 32, shared=2 << 10, dynamic=2 << 10),
    DeviceKernel("hadamard_in_blocks<*, 1, 4>", 128, 32, shared=4 << 10, dynamic=4 << 10),
    DeviceKernel("hadamard_in_blocks<*, 2, 4>", 128, 40, shared=8 << 10, dynamic=8 << 10),
    DeviceKernel("hadamard_in_blocks<*, 2, 8>", 256, 40, shared=16 << 10, dynamic=16 << 10),
    DeviceKernel("hadamard_in_blocks<*, 4, 8>", 256, 48, shared=32 << 10, dynamic=32 << 10),
    DeviceKernel("hadamard_in_blocks<*, 4, 16>", 512, 64, shared=64 << 10, dynamic=64 << 10),
    DeviceKernel("hadamard_in_blocks<*, 8, 16>", 512, 128, shared=64 << 10, dynamic=64 << 10),
    # N:M weights: 2:4, by bits of a value; any pattern, by pieces of w and of x.
    DeviceKernel("nm_few<NmSparseStream<*, 16>, 1>", 256, 80, 37888, 27648, tensor=SPARSE),
    DeviceKernel("nm_few<NmSparseStream<*>, 1>", 256, 80, 34816, 24576, tensor=SPARSE),
    DeviceKernel("nm_few<NmDenseStream<*, 1>, *>", 256, 96, 28672, 18432, tensor=DENSE),
    DeviceKernel("nm_few<NmDenseStream<*, 3>, *>", 256, 104, 65536, 55296, tensor=DENSE),
    DeviceKernel("nm_many<NmSparseTiles<*, 16>, 1>", 256, 128, 82944, 82944, tensor=SPARSE),
    DeviceKernel("nm_many<NmSparseTiles<*, 8>, 1>", 256, 128, 46080, 46080, tensor=SPARSE),
    DeviceKernel("nm_many<NmSparseTiles<*, 4>, 1>", 256, 128, 39936, 39936, tensor=SPARSE),
    DeviceKernel("nm_many<NmDenseTiles<*, 1>, 1>", 256, 128, 46080, 46080, tensor=DENSE),
    DeviceKernel("nm_many<NmDenseTiles<*, 1>, 3>", 256, 128, 73728, 73728, tensor=DENSE),
    DeviceKernel("nm_many<NmDenseTiles<*, 3>, 1>", 256, 168, 73728, 73728, tensor=DENSE),
    DeviceKernel("nm_many<NmDenseTiles<*, 3>, 3>", 256, 144, 82944, 82944, tensor=DENSE),
    DeviceKernel("lay_out_rows<*>", 256, 16),
    # Low-bit weights: type of x, its digits, bits of a weight; of tiles, eights of rows.
    DeviceKernel("lowbit_gemm_rows<signed char, 3, *>", 256, 128, 82944, 82944, tensor=BYTES),
    DeviceKernel("lowbit_gemm_rows<signed char, *>", 256, 112, 82944, 82944, tensor=BYTES),
    DeviceKernel("lowbit_gemm_rows<*>", 256, 112, 82944, 82944, tensor=DENSE),
    DeviceKernel("lowbit_gemm_tile<signed char, 3, *>", 128, 168, 61440, 61440, tensor=BYTES),
    DeviceKernel("lowbit_gemm_tile<signed char, 1, *, 2>", 128, 128, 53248, 53248, tensor=BYTES),
    DeviceKernel("lowbit_gemm_tile<signed char, 1, *, 8>", 128, 256, 65536, 65536, tensor=BYTES),
    DeviceKernel("lowbit_gemm_tile<*, 1, *, 2>", 128, 128, 57344, 57344, tensor=DENSE),
    DeviceKernel("lowbit_gemm_tile<*, 1, *, 8>", 128, 256, 81920, 81920, tensor=DENSE),
    DeviceKernel("lowbit_gemm_parts", 128, 64),
    DeviceKernel("pad_rows", 128, 24),
    DeviceKernel("lowbit_rows<*>", 128, 40),
)

# Those that pack, unpack and check weights, which is done once.
PACKING_KERNELS = (
    DeviceKernel("find_wide_codes", 128, 16),
    DeviceKernel("find_infinite_scales", 128, 16),
    DeviceKernel("pack_codes", 128, 48),
    DeviceKernel("unpack_codes", 128, 32),
    DeviceKernel("pack_groups<*>", 128, 24),
    DeviceKernel("unpack_groups<*>", 128, 24),
    DeviceKernel("find_excess", 128, 40),
    DeviceKernel("pack_units", 128, 64),
    DeviceKernel("expand_blocks", 128, 48),
    DeviceKernel("copy_scales<*>", 128, 24),
)

# Those of tests/cuda/check_kernels.h.
CHECK_KERNELS = (
    DeviceKernel("gemm<*>", 128, 72, shared=30720, dynamic=30720, tensor=frozenset({"HMMA"})),
    DeviceKernel("gemm_s8", 32, 40, tensor=frozenset({"IMMA"})),
    DeviceKernel("gemm_sparse<*>", 32, 48, tensor=frozenset({"HMMA.SP"})),
    DeviceKernel("sum_rows", 128, 40, shared=128),
    DeviceKernel("count_odd", 128, 16, shared=512),
    DeviceKernel("copy_words", 128, 16, shared=512),
    DeviceKernel("registers", 32, 32),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet and by the CUDA programming guide's table of technical limits.

    ``rates`` are bytes/s of memory and dense operations/s of a unit; sparse ones are twice these.
    """

    name: str
    warps: int
    blocks: int
    registers: int
    shared: int
    rates: dict[str, float]

    def blocks_of(self, kernel: DeviceKernel) -> int:
        """Blocks of the kernel that one multiprocessor holds at once."""
        warps = -(-kernel.threads // WARP)
        # A multiprocessor has four parts with a file of registers each.
        of_registers = self.registers // 4 // (kernel.registers * WARP) * 4 // warps
        shared = -(-kernel.shared // SHARED_UNIT) * SHARED_UNIT + RESERVED_SHARED
        return min(self.blocks, self.warps // warps, of_registers, self.shared // shared)

    def occupancy(self, kernel: DeviceKernel) -> float:
        """Of the warps that a multiprocessor can hold, the share that the kernel lets it."""
        return self.blocks_of(kernel) * -(-kernel.threads // WARP) / self.warps


GPUS = (
    Gpu(
        "A100", 64, 32, 65536, 164 << 10,
        {"read": 2039e9, "fp32": 19.5e12, "f16": 312e12, "int8": 624e12},
    ),
    Gpu(
        "H100", 64, 32, 65536, 228 << 10,
        {"read": 3350e9, "fp32": 66.9e12, "f16": 989e12, "int8": 1979e12},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """What a call must move and compute at least: ``operations`` count a multiply and an add."""

    call: str
    bytes: int
    operations: int
    unit: str = "f16"
    sparse: bool = False

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        """The least time, and what takes it."""
        memory = self.bytes / gpu.rates["read"]
        arithmetic = self.operations / gpu.rates[self.unit] / (2 if self.sparse else 1)
        return max((memory, "memory"), (arithmetic, self.unit))


FLOORS = (
    Floor("`quantize_rows`, 4096 x 4096 bf16", 4096 * 4096 * 3 + 4096 * 4, 0),
    Floor("`hadamard`, 4096 x 4096 bf16", 2 * 4096 * 4096 * 2, 12 * 4096 * 4096, "fp32"),
    # x of 16 bits, or rounded to 8; scales of 16 bits for 128 columns.
    *(
        Floor(
            f"`lowbit_linear` {bits} bit, {compute}, 4096 x 4096, m = {m}",
            4096 * 4096 // 8 * bits + 4096 * 32 * 2 + m * 8192 * 2,
            2 * m * 4096 * 4096,
            unit,
        )
        for bits in (8, 4)
        for compute, unit in (("float", "f16"), ("int8", "int8"))
        for m in (1, 16, 512)
    ),
    # x of 16 bits. Bits of a weight: half of a value, an index, scales of 16 bits for 128 columns.
    *(
        Floor(
            f"`nm_linear` {pattern} {dtype}, 4096 x 4096, m = {m}",
            int(4096 * 4096 * bits / 8) + m * 8192 * 2,
            2 * m * 4096 * 4096,
            sparse=pattern == "2:4",
        )
        for pattern, dtype, bits in (
            ("2:4", "bf16", 9),
            ("2:4", "int4", 3.125),
            ("4:8", "bf16", 9.5),
        )
        for m in (1, 16, 512)
    ),
)


def row_of(name: str) -> DeviceKernel | None:
    """The row that a kernel is held to."""
    return next(
        (k for k in (*KERNELS, *PACKING_KERNELS, *CHECK_KERNELS) if fnmatchcase(name, k.name)), None
    )


def occupancy_table() -> Iterator[str]:
    """Lines of markdown."""
    heads = "".join(f" {gpu.name} |" for gpu in GPUS)
    yield f"| kernel | threads | registers | shared bytes |{heads}"
    yield "|---|---|---|---|" + "---|" * len(GPUS)
    for kernel in KERNELS:
        cells = "".join(
            f" {gpu.blocks_of(kernel)} x {kernel.threads}, {gpu.occupancy(kernel):.0%} |"
            for gpu in GPUS
        )
        limits = f"{kernel.threads} | {kernel.registers} | {kernel.shared}"
        yield f"| `{kernel.name}` | {limits} |{cells}"


def floor_table() -> Iterator[str]:
    """Lines of markdown."""
    heads = "".join(f" {gpu.name} |" for gpu in GPUS)
    yield f"| call | bytes | operations |{heads}"
    yield "|---|---|---|" + "---|" * len(GPUS)
    for floor in FLOORS:
        cells = ""
        for gpu in GPUS:
            seconds, limiter = floor.seconds(gpu)
            cells += f" {seconds * 1e6:.3g} us, {limiter} |"
        needed = f"{floor.bytes / 1e6:.4g} MB | {floor.operations / 1e9:.4g} G"
        yield f"| {floor.call} | {needed} |{cells}"


def tables() -> str:
    """Both tables, as csrc/README.md has them."""
    return "\n".join([*occupancy_table(), "", *floor_table()])


if __name__ == "__main__":
    print(tables())
