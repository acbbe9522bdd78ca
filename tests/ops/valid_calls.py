"""Strategies that draw valid calls of operators; a new operator gets one in ``VALID``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from openwork.ops import nm_mask
from openwork.packing import SPARSE_LAYOUTS
from openwork.testing import Sample, nm
from openwork.testing.active import make_column_weight
from openwork.testing.block_sparse import make_block_sparse_weight
from openwork.testing.kv_cache import History
from openwork.testing.lowbit import make_weight
from openwork.testing.sparse import make_sparse_weight

from .caches import caches, random_lists

Draw = st.DrawFn
Raw = tuple[Any, ...]

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BITS = st.sampled_from([2, 3, 4, 8])
VECTORS = st.sampled_from([1, 8, 16, 32])
SIZES = st.integers(0, 5)
HALVES = st.integers(1, 40)
DENSITIES = st.sampled_from([0.0, 0.02, 0.5, 1.0])


def _random(
    draw: Draw, shape: list[int], dtype: torch.dtype, *, dense_last: bool = False
) -> Tensor:
    """Normal numbers of several sizes; dimensions in any order in memory, with gaps or without."""
    fixed = len(shape) - 1 if dense_last else len(shape)
    order = [*draw(st.permutations(range(fixed))), *range(fixed, len(shape))]
    gaps = [draw(st.integers(1, 2)) if i < fixed else 1 for i in order]
    size = draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    wide = [shape[i] * gap for i, gap in zip(order, gaps, strict=True)]
    memory = (size * torch.randn(wide, generator=generator)).to(dtype)
    spaced = memory[tuple(slice(None, None, gap) for gap in gaps)]
    return spaced.permute([order.index(i) for i in range(len(shape))])


def _rows(draw: Draw, width: int) -> Tensor:
    """``[..., width]``: up to 3 small leading dimensions, or one that fills row blocks."""
    lead = draw(st.lists(SIZES, max_size=3) | st.lists(st.integers(0, 70), min_size=1, max_size=1))
    return _random(draw, [*lead, width], draw(FLOATS))


def _contiguous(draw: Draw, shape: list[int], dtype: torch.dtype) -> Tensor:
    return _random(draw, shape, dtype).contiguous()


def _rms_norm(draw: Draw) -> Sample:
    x = _rows(draw, draw(st.integers(1, 150)))
    weight = _contiguous(draw, [x.shape[-1]], x.dtype)
    return Sample("fuzz", (x, weight, draw(st.sampled_from([1e-6, 1e-5, 1.0]))))


def _silu_mul(draw: Draw) -> Sample:
    return Sample("fuzz", (_rows(draw, 2 * draw(HALVES)),))


def _tables(draw: Draw, t: int, d: int) -> tuple[Tensor, Tensor]:
    angles = 100 * _contiguous(draw, [t, d // 2], torch.float32)
    return angles.cos(), angles.sin()


def _rope(draw: Draw) -> Sample:
    b, t, h, d = draw(SIZES), draw(SIZES), draw(SIZES), 2 * draw(HALVES)
    return Sample("fuzz", (_random(draw, [b, t, h, d], draw(FLOATS)), *_tables(draw, t, d)))


def _rope_append(draw: Draw) -> Sample:
    b, t, g, d = draw(SIZES), draw(SIZES), draw(SIZES), 2 * draw(HALVES)
    position, rest, dtype = draw(SIZES), draw(SIZES), draw(FLOATS)
    x = _random(draw, [b, t, draw(st.integers(1, 5)) + 2 * g, d], dtype)
    cache = [b, g, position + t + rest, d]
    keys, values = (_random(draw, cache, dtype, dense_last=True) for _ in range(2))
    return Sample("fuzz", (x, *_tables(draw, t, d), keys, values, position))


def _grid(draw: Draw) -> dict[str, Any]:
    k = draw(st.integers(1, 300))
    return {
        "n": draw(st.integers(1, 100)),
        "k": k,
        "bits": draw(BITS),
        "group_size": draw(st.sampled_from([16, 32, 64, 128, k])),
    }


def _lowbit_linear(draw: Draw) -> Sample:
    grid = _grid(draw)
    weight = make_weight(
        **grid, symmetric=draw(st.booleans()), dtype=draw(FLOATS), seed=draw(st.integers(0, 9))
    )
    x = _rows(draw, weight.k)
    options: dict[str, Any] = {"compute": draw(st.sampled_from(["float", "int8"]))}
    if draw(st.booleans()):
        options["bias"] = _contiguous(draw, [weight.n], x.dtype)
    if draw(st.booleans()):
        options["add"] = _contiguous(draw, [*x.shape[:-1], weight.n], x.dtype)
    return Sample("fuzz", (x, weight), options)


def _pack_lowbit(draw: Draw) -> Sample:
    grid = _grid(draw)
    n, k, bits = grid.pop("n"), grid.pop("k"), grid["bits"]
    groups = -(-k // grid["group_size"])

    def codes(columns: int) -> Tensor:
        # Every code: the random numbers' own bits, cut to the width.
        return (
            _random(draw, [n, columns], torch.float32)
            .view(torch.int32)
            .remainder(2**bits)
            .to(torch.uint8)
        )

    zeros = codes(groups) if draw(st.booleans()) else None
    return Sample("fuzz", (codes(k), _random(draw, [n, groups], draw(FLOATS)), zeros), grid)


def _quantize_rows(draw: Draw) -> Sample:
    return Sample("fuzz", (_rows(draw, draw(st.integers(1, 150))),))


def _hadamard(draw: Draw) -> Sample:
    block = 2 ** draw(st.integers(0, 9))
    x = _rows(draw, block * draw(st.integers(1, 3)))
    return Sample("fuzz", (x, block))


def _terms(draw: Draw, x: Tensor, n: int) -> dict[str, Any]:
    terms: dict[str, Any] = {}
    if draw(st.booleans()):
        terms["bias"] = _contiguous(draw, [n], x.dtype)
    if draw(st.booleans()):
        terms["add"] = _contiguous(draw, [*x.shape[:-1], n], x.dtype)
    return terms


def _sparse_linear(draw: Draw) -> Sample:
    weight = make_sparse_weight(
        draw(st.integers(1, 100)),
        draw(st.integers(1, 300)),
        draw(DENSITIES),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8])),
        draw(st.integers(0, 9)),
        draw(st.booleans()),
        draw(st.sampled_from(SPARSE_LAYOUTS)),
    )
    x = _rows(draw, weight.k)
    return Sample("fuzz", (x, weight), _terms(draw, x, weight.n))


def _block_sparse_linear(draw: Draw) -> Sample:
    weight = make_block_sparse_weight(
        draw(st.integers(1, 150)),
        draw(st.integers(1, 300)),
        draw(st.sampled_from([16, 32, 64])),
        draw(DENSITIES),
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    x = _rows(draw, weight.k)
    return Sample("fuzz", (x, weight), _terms(draw, x, weight.n))


def _active_linear(draw: Draw) -> Sample:
    k = draw(st.integers(1, 200))
    weight = make_column_weight(
        draw(st.integers(1, 600)),
        k,
        draw(st.sampled_from(["float32", "bfloat16", "w2", "w4", "w8"])),
        draw(st.sampled_from([16, 32, 64, 128, k])),
        draw(st.booleans()),
    )
    x = _rows(draw, k)
    threshold = draw(st.sampled_from([0.0, 0.5, 4.0]))
    return Sample("fuzz", (x, weight, threshold), _terms(draw, x, weight.n))


def _pattern(draw: Draw) -> tuple[int, int]:
    block = draw(st.sampled_from([4, 8, 16, 32]))
    return draw(st.integers(1, block - 1)), block


def _nm_linear(draw: Draw) -> Sample:
    n, k = draw(st.integers(1, 80)), draw(st.integers(1, 300))
    weight = nm.make_weight(
        n,
        k,
        _pattern(draw),
        draw(st.sampled_from(list(nm.BITS))),
        vector=draw(VECTORS),
        group_size=draw(st.sampled_from([32, 64, 128, k])),
        scales=draw(FLOATS),
        seed=draw(st.integers(0, 9)),
    )
    x = _rows(draw, k)
    options: dict[str, Any] = {"compute": "float"}
    if weight.bits <= 8:
        options["compute"] = draw(st.sampled_from(["float", "int8"]))
    if draw(st.booleans()):
        options["bias"] = _contiguous(draw, [n], x.dtype)
    if draw(st.booleans()):
        options["add"] = _contiguous(draw, [*x.shape[:-1], n], x.dtype)
    return Sample("fuzz", (x, weight), options)


def _compress_nm(draw: Draw) -> Sample:
    n, k = draw(st.integers(1, 80)), draw(st.integers(1, 150))
    pattern, vector = _pattern(draw), draw(VECTORS)
    mask = nm_mask(_random(draw, [n, k], torch.float32), pattern, vector=vector)
    weight = _random(draw, [n, k], draw(st.sampled_from([torch.float32, torch.bfloat16])))
    return Sample("fuzz", (weight,), {"pattern": pattern, "vector": vector, "mask": mask})


def _tokens_of(draw: Draw, history: History) -> History:
    """With tokens whose number differs between sequences, then between heads."""
    most = draw(st.sampled_from([0, 3, 40, 300]))
    counts = draw(st.lists(st.integers(0, most), min_size=history.b, max_size=history.b))
    history = history.appended(most, 0, counts=torch.tensor(counts, dtype=torch.int32))
    if draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9)))
        kept = random_lists(history.reference(), rng, draw(st.sampled_from([0.3, 0.8])))
        history = replace(history, steps=(*history.steps, ("kv_compact", (kept,), {})))
    if draw(st.booleans()):
        history = history.appended(draw(st.integers(0, 40)), 1, commit=draw(st.booleans()))
    return history


def _paged_attention(draw: Draw) -> Sample:
    pages = _tokens_of(draw, draw(caches())).pages()
    b, kv_heads = pages.lengths.shape
    heads = kv_heads * draw(st.integers(1, 4))
    q = _random(draw, [b, draw(st.integers(0, 8)), heads, pages.d], pages.dtype)
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.1, -0.3]))}
    if pages.d % 2 == 0 and draw(st.booleans()):
        # Positions of the second round count from 1000.
        options["cos"], options["sin"] = _tables(draw, 1040, pages.d)
    if draw(st.booleans()):
        budget = draw(st.integers(0, 4))
        options["selected"] = torch.full((b, kv_heads, budget), -1, dtype=torch.int32)
        for row in itertools.product(range(b), range(kv_heads)):
            places = range(-(-int(pages.lengths[row]) // pages.page_size))
            chosen = [place for place in places if draw(st.booleans())][:budget]
            options["selected"][row][: len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return Sample("fuzz", (q, pages), options)


VALID = {
    "active_linear": _active_linear,
    "block_sparse_linear": _block_sparse_linear,
    "compress_nm": _compress_nm,
    "hadamard": _hadamard,
    "lowbit_linear": _lowbit_linear,
    "nm_linear": _nm_linear,
    "pack_lowbit": _pack_lowbit,
    "paged_attention": _paged_attention,
    "quantize_rows": _quantize_rows,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "rope_append": _rope_append,
    "silu_mul": _silu_mul,
    "sparse_linear": _sparse_linear,
}
