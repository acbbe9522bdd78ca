"""torch's 4-bit linear, ``aten::_weight_int4pack_mm``, and that of the CPU, ``.._for_cpu``.

w = scale * (code - 8) + zero        codes 0..15, groups of 32, 64, 128 or 256
"""

from __future__ import annotations

from functools import partial

import torch

from bench.grid import uniform_grid
from bench.problem import Competitor, Prepared, Problem, Variant

GROUP_SIZES = (32, 64, 128, 256)


# k of a tile of the GPU's layout, in units of 16.
INNER_TILES = 8


def _pack(codes: torch.Tensor, device: str) -> torch.Tensor:
    """Codes ``[n, k]`` uint8 in the layout of the device's product."""
    packed: torch.Tensor
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    else:
        # Two codes a byte, the first in the high half.
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    return packed


def _prepare(problem: Problem, group_size: int, dtype: torch.dtype) -> Prepared:
    grid = uniform_grid(problem.n, problem.k, 4, group_size)
    device = problem.device
    packed = _pack(torch.from_numpy(grid.codes), device)
    scales = torch.from_numpy(grid.scales)
    shift = scales * (8 - torch.from_numpy(grid.zeros).float())
    # [groups, n, 2]: scale and shift side by side.
    scales_and_zeros = torch.stack([scales.T, shift.T], dim=-1).to(device, dtype).contiguous()

    x = torch.from_numpy(problem.x).to(device, dtype)
    weight_bytes = packed.nbytes + scales_and_zeros.nbytes
    groups, calls = problem.plan(weight_bytes)
    weights = [(packed.clone(), scales_and_zeros.clone()) for _ in range(groups * calls)]
    result: list[torch.Tensor] = [torch.empty(0)]
    aten = torch.ops.aten
    multiply = aten._weight_int4pack_mm_for_cpu if device == "cpu" else aten._weight_int4pack_mm

    def run(group: int) -> None:
        for index in range(group * calls, (group + 1) * calls):
            codes, parameters = weights[index]
            result[0] = multiply(x, codes, group_size, parameters)

    return Prepared(
        run=run,
        groups=groups,
        calls=calls,
        weight_bytes=weight_bytes,
        output=lambda: result[0].float().cpu().numpy(),
    )


def _variants(problem: Problem) -> list[Variant]:
    """4-bit rows and narrower ones only: for 8 bit the int8 linear is torch's answer."""
    if problem.bits > 4 or problem.n % 16:
        return []
    wanted = problem.group_size if problem.group_size in GROUP_SIZES else 128
    if problem.k % wanted:
        # 576 = 4.5 * 128: the widest group that divides k stands in.
        fitting = [size for size in GROUP_SIZES if problem.k % size == 0]
        if not fitting:
            return []
        wanted = max(fitting)
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} x, g{wanted}",
            4,
            partial(_prepare, problem, wanted, dtype),
        )
        for dtype in (torch.bfloat16, torch.float32)
        if problem.device == "cpu" or dtype == torch.bfloat16
    ]


INT4 = Competitor(name="torch_int4", missing=lambda: None, variants=_variants)
