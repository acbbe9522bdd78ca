"""What pruning did to a model, linear by linear."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from openwork.prune.masks import Pattern
from openwork.prune.pruned import PrunedTensor
from openwork.prune.storage import sparse_bytes


@dataclass(frozen=True)
class LinearReport:
    """One pruned linear.

    Attributes:
        name: such as ``"layers.3.attn.qkv"``.
        shape: ``(n, k)`` before pruning.
        sparsity: share of the weights that were removed.
        weight_error: ``|W - P|^2 / |W|^2``, Frobenius; removed rows and columns count as 0.
        output_error: ``tr(D H D^T) / tr(W H W^T)`` with ``D = W - P`` and the inputs that reach the
            linear in the pruned model. None without calibration, and where rows or columns were
            removed.
        bytes_dense: of the weight before.
        bytes_sparse: of the weight after, stored without its zeros; see
            :func:`~openwork.prune.storage.sparse_bytes`.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    weight_error: float
    output_error: float | None
    bytes_dense: int
    bytes_sparse: int


@dataclass(frozen=True)
class PruningReport:
    """What :func:`~openwork.prune.prune_model` did and what it took.

    Attributes:
        linears: one entry per pruned linear, in the order of the model.
        model_bytes_before: :func:`~openwork.quant.model_bytes` of the dense model.
        model_bytes_after: the same of the pruned one as it is held, zeros included.
        hidden_bytes: see :class:`~openwork.quant.calibration.CalibrationReport`; 0 without
            calibration.
        statistics_bytes: alike.
        peak_bytes: highest resident memory of the whole process so far, as the system counts it.
    """

    linears: tuple[LinearReport, ...]
    model_bytes_before: int
    model_bytes_after: int
    hidden_bytes: int
    statistics_bytes: int
    peak_bytes: int

    @property
    def sparsity(self) -> float:
        """Share of the weights of all linears that were removed."""
        sizes = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        removed = [linear.sparsity * size for linear, size in zip(self.linears, sizes, strict=True)]
        return sum(removed) / sum(sizes)


def describe(
    name: str,
    weight: Tensor,
    pruned: PrunedTensor,
    pattern: Pattern,
    output_error: float | None,
) -> LinearReport:
    """The entry of a linear with the dense weight ``[n, k]``."""
    n, k = weight.shape
    dense = weight.float()
    error = (pruned.weight - dense).norm() / dense.norm().clamp(min=1e-30)
    return LinearReport(
        name=name,
        shape=(n, k),
        sparsity=pruned.sparsity,
        weight_error=float(error) ** 2,
        output_error=output_error,
        bytes_dense=weight.nbytes,
        bytes_sparse=sparse_bytes(pruned, pattern, weight.itemsize),
    )


def describe_removed(name: str, before: Tensor, after: Tensor) -> LinearReport:
    """The entry of a linear that lost rows or columns of its weight."""
    n, k = before.shape
    left = after.float().norm() / before.float().norm().clamp(min=1e-30)
    return LinearReport(
        name=name,
        shape=(n, k),
        sparsity=1 - after.numel() / before.numel(),
        weight_error=1 - float(left) ** 2,
        output_error=None,
        bytes_dense=before.nbytes,
        bytes_sparse=after.nbytes,
    )
