"""Linear layers over sparse weights, and sums of terms that share one output."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ops.active import active_linear
from ..ops.sparse import compress_sparse, sparse_arguments, sparse_linear
from ..ops.sparse_training import sparse_linear_train, transposed_pattern
from ..packing import BlockSparseWeight, ColumnWeight, SparseWeight
from .packed_linear import PackedLinear


class SparseLinear(PackedLinear):
    """``y = x @ expand(weight).T + bias + add`` over a sparse weight.

    The packed tensors are not parameters and not part of ``state_dict()``, as in
    :class:`LowbitLinear`.

    Args:
        weight: from :func:`openwork.compress_sparse` or :func:`openwork.compress_block_sparse`.
        bias: ``[n]``, dtype of the activations, or None.

    Example:
        >>> layer = openwork.nn.SparseLinear(openwork.compress_sparse(torch.eye(16, 32)))
        >>> layer(torch.ones(2, 32)).shape
        torch.Size([2, 16])
    """

    weight: SparseWeight | BlockSparseWeight

    def __init__(
        self, weight: SparseWeight | BlockSparseWeight, bias: Tensor | None = None
    ) -> None:
        super().__init__(weight, bias)
        # Decoding makes a hundred short calls a token: what does not change is looked up once.
        self._arguments = sparse_arguments(weight)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is added before rounding."""
        overload, tensors, numbers = self._arguments
        y: Tensor = overload(x, *tensors, self.bias, add, *numbers)
        return y

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.k}, out_features={w.n}, density={w.density:.3g}, layout={w.layout!r}"
        )


# Rows of x up to which the kernel, one after another, takes no longer than one dense product: of
# 4096 x 4096 in fp32, half of it active, 5.8 ms for 7.3 of 8 rows, 12.6 for 8.7 of 16. Codes would
# have to be decoded first: the kernel is faster up to some hundred rows.
_FEW_ROWS = 8


class ActiveLinear(PackedLinear):
    """``y = sum over k with |x[k]| > threshold of x[k] * w[:, k]``, plus bias and add.

    Rows of x read only the columns that they need, one row after another; more than 8 rows of
    floats are one dense product, in which elements that are not active are 0.

    Args:
        weight: from :func:`openwork.pack_columns` or :func:`openwork.pack_lowbit_columns`.
        threshold: at least 0; see :func:`openwork.active_linear`.
        bias: ``[n]``, dtype of the activations, or None.

    Example:
        >>> layer = openwork.nn.ActiveLinear(openwork.pack_columns(torch.ones(3, 4)), 0.5)
        >>> layer(torch.tensor([1.0, 0.1, 2.0, 0.2])).tolist()
        [3.0, 3.0, 3.0]
    """

    weight: ColumnWeight

    def __init__(self, weight: ColumnWeight, threshold: float, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.threshold = threshold

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is added before rounding."""
        w = self.weight
        if w.scales is not None or x.numel() <= _FEW_ROWS * w.k:
            return active_linear(x, w, self.threshold, self.bias, add)
        active = x.masked_fill(x.float().abs() <= self.threshold, 0)
        dense = w.columns[:, : w.n].T.to(x.dtype)
        y = nn.functional.linear(active, dense, self.bias)
        return y if add is None else y.add_(add)

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.k}, out_features={w.n}, threshold={self.threshold:.3g}, "
            f"layout={w.layout!r}"
        )


class LowRankLinear(nn.Module):
    """``y = scale * (x @ down.T) @ up.T + add``: a term of low rank.

    Args:
        up: ``[n, r]`` float tensor, B of the papers.
        down: ``[r, k]``, A.
        scale: ``alpha / r``, or 1.
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)
        self.scale = scale

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is what the product starts from."""
        n, r = self.up.shape
        rows = nn.functional.linear(x, self.down).reshape(-1, r)
        if add is None:
            y = self.scale * (rows @ self.up.T)
        else:
            y = torch.addmm(add.reshape(-1, n), rows, self.up.T, alpha=self.scale)
        return y.view(*x.shape[:-1], n)

    def extra_repr(self) -> str:
        n, r = self.up.shape
        return f"in_features={self.down.shape[1]}, out_features={n}, rank={r}"


class SumLinear(nn.Module):
    """``y = sum of terms(x)``: a weight that is a sum of weights.

    Each term adds to the output of the one before as it writes its own, so a sum has no pass of its
    own over y. Quantized + sparse outliers is ``SumLinear([LowbitLinear(...), SparseLinear(...)])``
    (SpQR, arXiv:2306.03078); sparse + low rank ends in a :class:`LowRankLinear` (SLTrain,
    arXiv:2406.02214); a dense ``nn.Linear`` may come first, a sparse delta after it (DARE,
    arXiv:2311.03099).

    Args:
        terms: modules, at least one; all but the first are called as ``term(x, add=y)``.

    Example:
        >>> base = torch.nn.Linear(32, 16)
        >>> delta = openwork.nn.SparseLinear(openwork.compress_sparse(torch.eye(16, 32)))
        >>> openwork.nn.SumLinear([base, delta])(torch.ones(2, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, terms: Iterable[nn.Module]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        if len(self.terms) == 0:
            raise ValueError("SumLinear: terms must hold at least one module, got none")

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is one more term."""
        y = add
        for term in self.terms:
            y = term(x) if y is None else term(x, add=y)
        assert y is not None
        return y


class SparseLowRankLinear(nn.Module):
    """``y = (alpha / r) * (x @ down.T) @ up.T + x @ S.T + add`` with S on a fixed support.

    For training. SLTrain (arXiv:2406.02214): up, down and the values of S are trained; the gradient
    of S is the dense gradient restricted to the support, and neither it nor the sum of the weights
    is ever made as a dense matrix. The support is saved with the module (``state_dict()``).

    Args:
        up: ``[n, r]`` float32, B of the paper.
        down: ``[r, k]`` float32, A.
        sparse: float32 S ``[n, k]``, from :func:`openwork.compress_sparse`.
        alpha: of the scale ``alpha / r``.

    Attributes:
        values: parameter, the stored values of S as :class:`~openwork.SparseWeight` has them; the
            zeros after them stay zero.

    Raises:
        ValueError: shapes that do not make a sum, or values of S in another dtype.
    """

    def __init__(self, up: Tensor, down: Tensor, sparse: SparseWeight, alpha: float = 32.0) -> None:
        super().__init__()
        n, k = sparse.n, sparse.k
        if up.shape[:1] != (n,) or down.shape[1:] != (k,) or up.shape[1:] != down.shape[:1]:
            raise ValueError(
                f"SparseLowRankLinear: up [n, r] and down [r, k] of S, {[n, k]}, expected, "
                f"got {list(up.shape)} and {list(down.shape)}"
            )
        if sparse.values.dtype != torch.float32 or sparse.scales is not None:
            raise ValueError(
                "SparseLowRankLinear: S must hold float32 values without scales, "
                f"got {sparse.values.dtype} and scales = {sparse.scales}"
            )
        self.in_features, self.out_features = k, n
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)
        self.values = nn.Parameter(sparse.values.clone())
        self.scale = alpha / up.shape[1]
        transposed, order = transposed_pattern(sparse)
        for name, tensor in (
            ("index", sparse.index), ("offsets", sparse.offsets), ("order", order),
            ("transposed_index", transposed.index), ("transposed_offsets", transposed.offsets),
        ):  # fmt: skip
            self.register_buffer(name, tensor)
        self._layout = sparse.layout

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        density: float = 0.03,
        alpha: float = 32.0,
        generator: torch.Generator | None = None,
    ) -> SparseLowRankLinear:
        """SLTrain's start: up 0, down Kaiming-uniform, S uniform in ``+-1/sqrt(k)``.

        Args:
            in_features, out_features: k and n.
            rank: r, at least 1.
            density: share of the places of S that are its support, 0 to 1; chosen at random, to the
                nearest whole number of places.
            alpha: of the scale ``alpha / r``.
            generator: of the support and of all values.

        Raises:
            ValueError: a size below 1, or a density out of its range.

        Example:
            >>> layer = openwork.nn.SparseLowRankLinear.random(64, 32, rank=4)
            >>> layer(torch.ones(2, 64)).shape
            torch.Size([2, 32])
        """
        if min(in_features, out_features, rank) < 1 or not 0 <= density <= 1:
            raise ValueError(
                "SparseLowRankLinear: sizes and a rank of at least 1 and density in 0 .. 1 "
                f"expected, got {in_features}, {out_features}, {rank} and {density}"
            )
        shape = (out_features, in_features)
        bound = 1.0 / math.sqrt(in_features)
        places = torch.randperm(out_features * in_features, generator=generator)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[places[: round(density * len(places))]] = True
        values = (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound
        # Kaiming-uniform with a = sqrt(5), as torch's own linear: bound 1 / sqrt(fan in).
        down = (2.0 * torch.rand(rank, in_features, generator=generator) - 1.0) * bound
        return cls(torch.zeros(out_features, rank), down, compress_sparse(values, mask), alpha)

    def sparse_weight(self) -> SparseWeight:
        """S with its current values, for :class:`SparseLinear`."""
        return self._pattern(self.get_buffer("index"), self.get_buffer("offsets"))

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x ``[..., k]`` -> ``[..., n]``; ``add [..., n]`` is one more term."""
        sparse = self.sparse_weight()
        if torch.is_grad_enabled():
            transposed = self._pattern(
                self.get_buffer("transposed_index"), self.get_buffer("transposed_offsets"), True
            )
            y = sparse_linear_train(x, self.values, sparse, transposed, self.get_buffer("order"))
        else:
            y = sparse_linear(x, sparse)
        n, r = self.up.shape
        rows = nn.functional.linear(x, self.down).reshape(-1, r)
        y = torch.addmm(y.view(-1, n), rows, self.up.T, alpha=self.scale).view(y.shape)
        return y if add is None else y + add

    def _pattern(self, index: Tensor, offsets: Tensor, transposed: bool = False) -> SparseWeight:
        n, k = self.out_features, self.in_features
        sizes = (k, n) if transposed else (n, k)
        return SparseWeight(index, offsets, self.values.detach(), None, self._layout, *sizes)

    def extra_repr(self) -> str:
        n, r = self.up.shape
        density = self.sparse_weight().density
        return f"in_features={self.in_features}, out_features={n}, rank={r}, density={density:.3g}"
