"""What a change of a weight costs the output, and the inverse that second-order methods work with.

With ``H = E[x x^T]`` over the inputs of a linear (:class:`InputSecondMoment`), changing its weight
by ``D [n, k]`` changes its outputs by ``tr(D H D^T)``, in mean square summed over the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DAMPING_GROWTH = 10.0
# The factorisation of a positive semi-definite matrix succeeds long before its diagonal is a
# hundred times its mean.
_MAX_DAMPING = 100.0


def output_error(weight: Tensor, changed: Tensor, hessian: Tensor) -> float:
    """``tr(D H D^T) / tr(W H W^T)`` with ``D = changed - weight``: a share of the output's energy.

    Args:
        weight: ``[n, k]`` float32; ``changed`` alike.
        hessian: ``[k, k]`` float32.

    Example:
        >>> output_error(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.eye(2))
        0.5
    """
    energy, lost = _energy(weight, hessian), _energy(changed - weight, hessian)
    return lost / max(energy, torch.finfo().tiny)


def _energy(weight: Tensor, hessian: Tensor) -> float:
    return float(torch.sum((weight @ hessian) * weight, dtype=torch.float64))


def inverse_factor(where: str, hessian: Tensor, damping: float, order: Tensor) -> Tensor:
    """Upper triangular ``U`` with ``U^T U = (H[order, order] + damping * mean(diag H) I)^-1``.

    With ``J`` the reversal, ``J H J = L L^T`` gives ``H^-1 = (J L^-1 J)^T (J L^-1 J)``, so
    ``U = J L^-1 J``: one factorisation and one triangular solve, where inverting ``H`` and
    factorising the inverse would square its condition number on the way.

    Args:
        where: what the messages start with.
        hessian: ``[k, k]``, as :func:`check_hessian` accepts it.
        damping: share of the mean of the diagonal that is added to it; ten times more as often as
            the factorisation fails.
        order: ``[k]``, the columns in the order they will be done.

    Returns:
        ``[k, k]`` float32, computed in float64.

    Raises:
        ValueError: ``damping`` is not above 0, or ``hessian`` not positive semi-definite.
    """
    if damping <= 0:
        raise ValueError(f"{where}: damping must be above 0, got {damping}")
    backwards = order.flip(0)
    damped = hessian[backwards][:, backwards].double()
    diagonal = damped.diagonal().clone()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    # Any positive value serves a dead column: its weights are 0 and so is its rounding error. The
    # mean of the live ones leaves the damping as it would be without dead columns.
    diagonal[~live] = mean
    while damping <= _MAX_DAMPING:
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            del damped
            identity = torch.eye(len(lower), dtype=lower.dtype)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.float().flip(0, 1)
        damping *= _DAMPING_GROWTH
    raise ValueError(f"{where}: hessian must be positive semi-definite")


def check_hessian(where: str, hessian: Tensor, k: int) -> None:
    """Raise ValueError unless ``hessian`` is ``[k, k]`` float32 or float64 and can be a moment."""
    if list(hessian.shape) != [k, k] or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{where}: hessian must be [k, k] = {[k, k]} float32 or float64, "
            f"got {list(hessian.shape)} {hessian.dtype}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"{where}: hessian must be finite, got inf or nan values")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(
            f"{where}: hessian must be positive semi-definite, got a negative diagonal"
        )
    # Sums in float32 differ between the two halves only by rounding.
    if float((hessian - hessian.t()).abs().max()) > 1e-4 * float(diagonal.max()):
        raise ValueError(f"{where}: hessian must be symmetric")
