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

    def compact(self, keep: list[int]) -> None:
        size = self.fmt.group_size
        tokens, held = self.tokens(), len([j for j in keep if j < len(self.hat)])
        if not self.whole_groups:
            self.hat, self.tail = self.hat[keep[:held]], tokens[keep[held:]]
            return
        end = held // size * size
        groups = []
        for source in (keep[i : i + size] for i in range(0, end, size)):
            together = source[0] % size == 0 and source[-1] == source[0] + size - 1
            hat = self.hat[source]
            groups.append(hat if together else quantize(hat.to(self.tail.dtype), self.fmt))
        self.hat = torch.cat([self.hat[:0], *groups])
        self.tail = tokens[keep[end:]]

    def merge(self, merges: dict[int, tuple[float, list[tuple[int, float]]]], norms: bool) -> None:
        """``merges[target]`` is its own weight, and its sources with theirs."""
        held, dtype = len(self.hat), self.tail.dtype
        size = self.fmt.group_size if self.whole_groups else 1
        self.hat, self.tail = self.hat.clone(), self.tail.clone()
        for begin in sorted({t // size * size if t < held else t for t in merges}):
            count = size if begin < held else 1
            now = self.fp32()
            group = self.tokens()[begin : begin + count].clone()
            for target in (t for t in merges if begin <= t < begin + count):
                own, sources = merges[target]
                x, wanted = own * now[target], own * now[target].double().norm()
                for source, weight in sources:
                    x = x + weight * now[source]
                    wanted = wanted + weight * now[source].double().norm()
                norm = x.double().norm()
                if norms and norm > 0:
                    x = x * (wanted / norm).float()
                group[target - begin] = x.to(dtype)
            if begin < held:
                self.hat[begin : begin + count] = quantize(group, self.fmt)
            else:
                self.tail[begin - held] = group[0]

    def fp32(self) -> Tensor:
        return torch.cat([self.hat, self.tail.float()])

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

    def kv_compact(self, kept: Tensor, *, begins: Tensor | None = None) -> None:
        for i, heads in enumerate(self.rows):
            before = range(0 if begins is None else int(begins[i]))
            for head, row in enumerate(heads):
                keep = [*before, *(j for j in kept[i, head].tolist() if j >= 0)]
                row.keys.compact(keep)
                row.values.compact(keep)
                row.positions = [row.positions[j] for j in keep]

    def kv_evict(self, evicted: Tensor) -> None:
        for i, heads in enumerate(self.rows):
            for head, row in enumerate(heads):
                gone = set(evicted[i, head].tolist())
                keep = [j for j in range(row.length) if j not in gone]
                row.keys.compact(keep)
                row.values.compact(keep)
                row.positions = [row.positions[j] for j in keep]

    def kv_merge(
        self, targets: Tensor, own: Tensor, indptr: Tensor, sources: Tensor, weights: Tensor, *,
        keys: bool = True, values: bool = True, norms: bool = False,
    ) -> None:  # fmt: skip
        for i, heads in enumerate(self.rows):
            for head, row in enumerate(heads):
                at = (i, head)
                merges = {}
                for n, target in enumerate(t for t in targets[at].tolist() if t >= 0):
                    mine = range(int(indptr[at][n]), int(indptr[at][n + 1]))
                    pairs = [(int(sources[at][j]), float(weights[at][j])) for j in mine]
                    merges[target] = (float(own[at][n]), pairs)
                if keys:
                    row.keys.merge(merges, norms)
                if values:
                    row.values.merge(merges, False)

    def page_scores(
        self, q: Tensor, page_size: int, chunks: bool, sum_: bool
    ) -> list[list[Tensor]]:
        """Of each row, one a page with keys, in float64; q is ``[b, t, heads, d]``."""
        scores: list[list[Tensor]] = []
        for i, heads in enumerate(self.rows):
            scores.append([])
            for head, row in enumerate(heads):
                group = q.shape[2] // len(heads)
                mine = q[i, :, head * group : (head + 1) * group].reshape(-1, 1, self.d).double()
                pages = []
                for begin in range(0, len(row.keys.hat), page_size):
                    keys = row.keys.hat[begin : begin + page_size]
                    parts = keys.split(16) if chunks else [keys]
                    low = torch.stack([round_down(p.amin(0), self.dtype) for p in parts])
                    high = torch.stack([round_up(p.amax(0), self.dtype) for p in parts])
                    bound = torch.maximum(mine * low.double(), mine * high.double()).sum(-1)
                    best = bound.amax(-1)
                    pages.append(best.sum() if sum_ else best.max())
                scores[-1].append(torch.stack(pages) if pages else torch.zeros(0))
        return scores

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
