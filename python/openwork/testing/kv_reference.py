"""A slow cache of keys and values in plain torch: what the operators over pages must equal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kv_format import KVFormat

_INFINITY = float("inf")


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of ``dtype`` that are not below ``x``, which is float32."""
    nearest = x.to(dtype)
    if dtype == torch.float32:
        return nearest
    bits = nearest.view(torch.int16)
    above = torch.where(bits < 0, bits - 1, bits + 1)
    above = torch.where((bits & 0x7FFF) == 0, 1, above).to(torch.int16)
    return torch.where(nearest.float() < x, above, bits).view(dtype)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    return -round_up(-x, dtype)


def _outliers(x: Tensor, means: Tensor, count: int) -> Tensor:
    """The ``count`` channels of each token that are furthest from ``means``."""
    distance = (x.float() - means.float()).abs()
    order = torch.sort(distance, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _group(x: Tensor, exact: Tensor, dim: int, fmt: KVFormat) -> Tensor:
    """Quantizes groups along ``dim`` of ``x`` and gives them back as float32."""
    dtype, steps = x.dtype, 2**fmt.bits - 1
    x = x.float()
    low = torch.where(exact, _INFINITY, x).amin(dim, keepdim=True)
    high = torch.where(exact, -_INFINITY, x).amax(dim, keepdim=True)
    none = exact.all(dim, keepdim=True)
    low, high = torch.where(none, 0.0, low), torch.where(none, 0.0, high)
    scale = round_up((high - low) / (1.0 if fmt.codebook else float(steps)), dtype).float()
    broken = ~(x.isfinite() | exact).all(dim, keepdim=True) | ~scale.isfinite()
    scale = torch.where(broken, 0.0, scale)
    low = torch.where(broken, float("nan"), low)
    unit = ((x - low) / torch.where(scale > 0, scale, 1.0)).nan_to_num(nan=0.0).clamp(0, steps)
    if fmt.codebook:
        table = torch.tensor(fmt.codebook)
        middles = 0.5 * (table[:-1] + table[1:])
        level = table[(unit[..., None] > middles).sum(-1)]
    else:
        level = unit.round()
    # In float64 the product is exact; rounding the sum twice does not matter in any test.
    return (level.double() * scale.double() + low.double()).float()


def quantize(x: Tensor, fmt: KVFormat) -> Tensor:
    """``[tokens, d]`` as they are once they are in pages, float32; channel axis: whole groups."""
    tokens, d = x.shape
    if fmt.dense or tokens == 0:
        return x.float()
    size = fmt.group_size
    if fmt.axis == "channel":
        groups = x.view(-1, size, d)
        means = groups.double().sum(1, keepdim=True) / size
        exact = _outliers(groups, means, fmt.outliers)
        hat = _group(groups, exact, 1, fmt).view(tokens, d)
        return torch.where(exact.view(tokens, d), x.float(), hat)
    parts = x.split(size, 1)
    means = torch.cat([(p.double().mean(1, keepdim=True)).expand_as(p) for p in parts], 1)
    exact = _outliers(x, means, fmt.outliers)
    hats = [_group(p, e, 1, fmt) for p, e in zip(parts, exact.split(size, 1), strict=True)]
    return torch.where(exact, x.float(), torch.cat(hats, 1))


@dataclass
class Side:
    """Keys or values of one row: ``hat`` in pages (float32), ``tail`` as they came."""

    fmt: KVFormat
    hat: Tensor
    tail: Tensor

    def tokens(self) -> Tensor:
        return torch.cat([self.hat.to(self.tail.dtype), self.tail])

    def append(self, x: Tensor, commit: bool) -> None:
        self.tail = torch.cat([self.tail, x])
        if self.fmt.dense:
            self.hat, self.tail = torch.cat([self.hat, self.tail.float()]), self.tail[:0]
        elif commit:
            due = max(len(self.tail) - self.fmt.window, 0) // self.fmt.step * self.fmt.step
            self.hat = torch.cat([self.hat, quantize(self.tail[:due], self.fmt)])
            self.tail = self.tail[due:]

    def rollback(self, length: int) -> None:
        held = len(self.hat)
        if length < held:
            unit = self.fmt.group_size if self.whole_groups else 1
            kept = length // unit * unit
            self.tail = self.hat[kept:length].to(self.tail.dtype)
            self.hat = self.hat[:kept]
        else:
            self.tail = self.tail[: length - held]

    @property
    def whole_groups(self) -> bool:
        return not self.fmt.dense and self.fmt.axis == "channel"


@dataclass
class Row:
    """One head of one sequence."""

    keys: Side
    values: Side
    positions: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.keys.hat) + len(self.keys.tail)


class ReferenceCache:
    """Lists of tokens, appended with ``torch.cat``."""

    def __init__(
        self, b: int, kv_heads: int, d: int, value_d: int, keys: KVFormat, values: KVFormat,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        def empty(fmt: KVFormat, width: int) -> Side:
            return Side(fmt, torch.zeros(0, width), torch.zeros(0, width, dtype=dtype))

        self.d, self.value_d, self.dtype = d, value_d, dtype
        self.rows = [
            [Row(empty(keys, d), empty(values, value_d)) for _ in range(kv_heads)] for _ in range(b)
        ]

    def kv_append(
        self, keys: Tensor, values: Tensor, *, counts: Tensor | None = None,
        positions: Tensor | None = None, commit: bool = True,
    ) -> None:  # fmt: skip
        for i, heads in enumerate(self.rows):
            n = keys.shape[1] if counts is None else int(counts[i])
            for head, row in enumerate(heads):
                row.keys.append(keys[i, :n, head], commit)
                row.values.append(values[i, :n, head], commit)
                if positions is not None:
                    row.positions += positions[i, :n].tolist()

    def kv_commit(self) -> None:
        for row in (row for heads in self.rows for row in heads):
            row.keys.append(row.keys.tail[:0], True)
            row.values.append(row.values.tail[:0], True)

    def kv_rollback(self, drop: Tensor) -> None:
        for i, heads in enumerate(self.rows):
            for row in heads:
                length = row.length - int(drop[i])
                row.keys.rollback(length)
                row.values.rollback(length)
                del row.positions[length:]

    def read(self, part: str, begin: int, end: int) -> Tensor:
        """As ``kv_read`` gives keys or values."""
        width = self.d if part == "keys" else self.value_d
        shape = (len(self.rows), len(self.rows[0]), end - begin, width)
        out = torch.zeros(shape, dtype=self.dtype)
        for i, heads in enumerate(self.rows):
            for head, row in enumerate(heads):
                tokens = getattr(row, part).tokens()[begin:end]
                out[i, head, : len(tokens)] = tokens
        return out

    def bounds(self, chunks: int) -> tuple[Tensor, Tensor]:
        """Bounds of each 16 keys in pages, ``[b, kv_heads, chunks, d]``; zeros where there are
        none."""
        low = torch.zeros(len(self.rows), len(self.rows[0]), chunks, self.d, dtype=self.dtype)
        high = low.clone()
        for i, heads in enumerate(self.rows):
            for head, row in enumerate(heads):
                for chunk, keys in enumerate(row.keys.hat.split(16)):
                    if len(keys):
                        low[i, head, chunk] = round_down(keys.amin(0), self.dtype)
                        high[i, head, chunk] = round_up(keys.amax(0), self.dtype)
        return low, high

    def lengths(self, part: str | None = None) -> Tensor:
        """Tokens held, or those of ``part`` in pages."""
        return torch.tensor(
            [
                [row.length if part is None else len(getattr(row, part).hat) for row in heads]
                for heads in self.rows
            ],
            dtype=torch.int32,
        )
