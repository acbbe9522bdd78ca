"""Training on a support: the gradient of stored values, and the product that has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.sparse import expand_sparse
from ..ops.sparse_training import sparse_linear_train, sparse_values_grad, transposed_pattern
from ..packing import SPARSE_LAYOUTS, SparseWeight
from .case import EPS, OpCase, Reject, Sample
from .sparse import (
    SHAPES,
    linear_tolerance,
    make_sparse_weight,
    pattern_numbers,
    pattern_rejects,
    sparse_linear_reference,
    stored_of,
)


def values_grad_reference(g: Tensor, x: Tensor, weight: SparseWeight) -> Tensor:
    """``(g.T @ x)`` in float64, in the order of the stored values."""
    w = g.double().flatten(0, -2).T @ x.double().flatten(0, -2)
    return _in_order(w, weight)


def _in_order(dense: Tensor, weight: SparseWeight) -> Tensor:
    place = torch.arange(weight.values.numel(), dtype=torch.int32).view(torch.float32)
    places = expand_sparse(replace(weight, values=place, scales=None)).view(torch.int32)
    stored = stored_of(weight)
    values = torch.zeros(weight.values.numel(), dtype=torch.float64)
    values[places[stored].long()] = dense[stored]
    return values


def _grad_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Rounding of fp32 sums of as many products as there are rows."""
    g, x, weight = sample.args
    magnitude = g.double().abs().flatten(0, -2).T @ x.double().abs().flatten(0, -2)
    rows = g[..., 0].numel()
    return (_in_order((rows + 4) * EPS[torch.float32] * magnitude + 1e-37, weight),)


def _grad_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(3)
    for i, (m, n, k, density) in enumerate(SHAPES):
        dtype = list(EPS)[i % 3]
        g = torch.randn(m, n, generator=generator).to(dtype)
        x = torch.randn(m, k, generator=generator).to(dtype)
        for layout in SPARSE_LAYOUTS:
            weight = make_sparse_weight(n, k, density, torch.float32, layout=layout)
            name = f"{layout.partition('_')[0]}-{m}x{n}x{k}-{density}-{str(dtype)[6:]}"
            yield Sample(name, (g, x, weight))
    yield Sample("batched", (g.view(1, m, n), x.view(1, m, k), weight))
    yield Sample("no-rows", (g[:0], x[:0], weight))


def _grad_rejects() -> Iterator[Reject]:
    g, x = torch.randn(2, 48), torch.randn(2, 100)
    for layout in SPARSE_LAYOUTS:
        weight = make_sparse_weight(48, 100, 0.5, torch.float32, layout=layout)
        for name, broken, message, of_values in pattern_rejects(weight):
            if name != "n" and "values" not in name:
                kind = layout.partition("_")[0]
                yield Reject(f"{kind} {name}", (g, x, broken), {}, message, of_values)
    yield Reject("g", (g[:, :47], x, weight), {}, "a last one of n = 48, got [2, 47]")
    yield Reject("rows", (g[:1], x, weight), {}, "g must have the rows of x, [2, 100]")
    yield Reject("g dtype", (g.half(), x, weight), {}, "g must be float32, got float16")


def _raw_grad(sample: Sample) -> tuple[Any, ...]:
    g, x, w = sample.args
    return (g, x, w.index, w.offsets, w.nnz, *pattern_numbers(w))


def train_reference(
    x: Tensor, values: Tensor, weight: SparseWeight, transposed: SparseWeight, order: Tensor
) -> Tensor:
    """The product with ``values`` in place of the weight's."""
    return sparse_linear_reference(x, replace(weight, values=values))


def _train_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(4)
    for m, n, k, density in SHAPES[1::3]:
        x = torch.randn(m, k, generator=generator)
        for layout in SPARSE_LAYOUTS:
            weight = make_sparse_weight(n, k, density, torch.float32, layout=layout)
            args = (x, weight.values, weight, *transposed_pattern(weight))
            yield Sample(f"{layout.partition('_')[0]}-{m}x{n}x{k}-{density}", args)


def _train_rejects() -> Iterator[Reject]:
    weight = make_sparse_weight(48, 100, 0.5, torch.float32)
    x = torch.randn(2, 100)
    t, order = transposed_pattern(weight)
    for name, broken, message, of_values in pattern_rejects(weight):
        if "values" not in name:
            args = (x, weight.values, broken, t, order)
            yield Reject(name, args, {}, message, of_values)
    values = weight.values
    yield Reject("order", (x, values, weight, t, order[1:]), {}, "order must have shape")
    yield Reject("transposed", (x, values, weight, weight, order), {}, "t_index must have shape")
    bad = (x, values.bfloat16(), weight, t, order)
    yield Reject("values", bad, {}, "values must be float32, got bfloat16")


def _raw_train(sample: Sample) -> tuple[Any, ...]:
    x, values, w, t, order = sample.args
    return (x, values, w.index, w.offsets, t.index, t.offsets, order, *pattern_numbers(w))


CASES = (
    OpCase(
        "sparse_values_grad",
        sparse_values_grad,
        values_grad_reference,
        _grad_tolerance,
        raw=_raw_grad,
        samples=lambda: list(_grad_samples()),
        rejects=lambda: list(_grad_rejects()),
    ),
    OpCase(
        "sparse_linear_train",
        sparse_linear_train,
        train_reference,
        lambda sample, expected: linear_tolerance(
            Sample("", (sample.args[0], replace(sample.args[2], values=sample.args[1]))), expected
        ),
        raw=_raw_train,
        samples=lambda: list(_train_samples()),
        rejects=lambda: list(_train_rejects()),
    ),
)
