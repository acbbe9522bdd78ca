"""N:M masks from scores, and from weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import check


def nm_mask(weight: Tensor, pattern: tuple[int, int] = (2, 4), *, vector: int = 1) -> Tensor:
    """The N:M mask that keeps the largest magnitudes: of each block of M columns the N largest.

    With ``vector`` V, V consecutive rows share a mask, by the sums of their squares: what is lost
    is least. Of equal magnitudes the first is kept.

    Args:
        weight: ``[n, k]`` of any float dtype, finite.
        pattern: ``(N, M)``.
        vector: rows that share a mask.

    Returns:
        ``[n, k]`` bool.

    Raises:
        ValueError: weight is no matrix, or N:M or V is none.

    Example:
        >>> openwork.ops.nm_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), (2, 4)).int().tolist()
        [[0, 1, 1, 0]]
    """
    op = "nm_mask"
    kept, block = pattern
    check(weight.dim() == 2, f"{op}: weight must be [n, k], got {list(weight.shape)}")
    check(1 <= kept < block, f"{op}: pattern must be N:M with 1 <= N < M, got {kept}:{block}")
    check(vector >= 1, f"{op}: vector must be at least 1, got {vector}")
    scores = weight.abs() if vector == 1 else weight.float().square()
    return largest_of_blocks(scores, kept, block, vector)


def largest_of_blocks(scores: Tensor, kept: int, block: int, vector: int) -> Tensor:
    """The ``kept`` largest scores of every ``block`` columns; ``vector`` rows share their sums.

    Args:
        scores: ``[n, k]`` of any float dtype, finite. Of equal ones the first is kept.
        kept, block, vector: N, M and V. A block at the end of a row may be short, and a set of rows
            at the end of the matrix small.

    Returns:
        ``[n, k]`` bool.
    """
    n, k = scores.shape
    sets, blocks = -(-n // vector), -(-k // block)
    shared = pad(scores, (0, 0, 0, sets * vector - n)).view(sets, vector, k).sum(1)
    # The filler of a short block loses against every score.
    shared = pad(shared, (0, blocks * block - k), value=-torch.inf)
    # How many of its block are ahead of each column, counted a column at a time over all blocks:
    # for blocks of 4 a quarter of the time of a sort, for 32 half as much again.
    columns = shared.view(sets, blocks, block).movedim(2, 0).contiguous()
    ahead = torch.zeros(columns.shape, dtype=torch.uint8, device=scores.device)
    for i, column in enumerate(columns):
        ahead[:i] += column > columns[:i]
        ahead[i + 1 :] += column >= columns[i + 1 :]
    keep = (ahead < kept).movedim(0, 2).reshape(sets, -1)
    return keep[:, :k].repeat_interleave(vector, dim=0)[:n]
