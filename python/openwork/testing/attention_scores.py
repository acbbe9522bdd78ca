"""Line scores, means of blocks and the tree search: the slow truth, and small nasty calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..ops.attention_scores import block_means, hierarchical_topk, line_scores, longest_of
from .case import EPS, OpCase, Reject, Sample


def split(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The sequences of x ``[b, n, ...]``, ``[n_s, ...]`` each."""
    if cu_seqlens is None:
        return list(x)
    ends = cu_seqlens.tolist()
    return [x[0, begin:end] for begin, end in pairwise(ends)]


def probe_weights(q: Tensor, k: Tensor, probes: int, scale: float | None) -> Tensor:
    """Causal attention ``[heads, w, sk]`` in float64 of the last queries of one sequence."""
    sq, sk = len(q), len(k)
    w = min(probes, sq, sk)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * torch.einsum("ihd,jhd->hij", q[sq - w :].double(), keys)
    visible = torch.ones(w, sk, dtype=torch.bool).tril(sk - w)
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def line_scores_reference(
    q: Tensor,
    k: Tensor,
    *,
    probes: int = 64,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of the attention matrix along columns and diagonals."""
    sequences = list(zip(split(q, cu_seqlens_q), split(k, cu_seqlens_k), strict=True))
    shape = (len(sequences), q.shape[2], longest_of(k, cu_seqlens_k))
    columns = torch.zeros(shape, dtype=torch.float64)
    diagonals = torch.zeros(shape, dtype=torch.float64)
    for s, (q_s, k_s) in enumerate(sequences):
        weights = probe_weights(q_s, k_s, probes, scale)
        w, sk = weights.shape[1:]
        columns[s, :, :sk] = weights.sum(1)
        for i in range(w):
            p = sk - w + i
            diagonals[s, :, : p + 1] += weights[:, i, : p + 1].flip(1)
    return columns, diagonals


def _longest_row(x: Tensor) -> float:
    return float(x.double().norm(dim=3).amax()) if x.numel() else 0.0


def _line_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k = sample.args
    scale = sample.kwargs.get("scale")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    d = q.shape[3]
    # A score is a sum of d products; its error is a relative one of its weight, and that of all
    # weights once more, of their sum. Exponential, sums over keys and over queries: 16 + n + w.
    worst = abs(scale) * _longest_row(q) * _longest_row(k)
    steps = 2 * (d + 3) * worst + 16 + k.shape[1] + 64
    # What is below 1e-38 of the largest weight counts as that.
    return tuple(steps * EPS[torch.float32] * e + 1e-34 for e in expected)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _line_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(21)
    shapes = (
        # b, sq, sk, heads, kv_heads, d, probes
        (1, 1, 1, 1, 1, 1, 1),
        (2, 5, 37, 4, 2, 32, 64),
        (1, 64, 64, 3, 1, 64, 64),
        (1, 70, 150, 2, 2, 80, 65),
        (1, 130, 131, 1, 1, 17, 130),
        (1, 20, 9, 2, 1, 33, 16),  # queries before the first key
        (0, 3, 3, 2, 1, 8, 4),
        (1, 0, 3, 2, 1, 8, 4),
        (1, 3, 0, 2, 1, 8, 4),
    )
    for b, sq, sk, h, g, d, probes in shapes:
        for dtype in EPS:
            q = _random(generator, b, sq, h, d).to(dtype)
            k = _random(generator, b, sk, g, d).to(dtype)
            name = f"{b}x{sq}x{sk}x{h}x{g}x{d}-{probes}-{str(dtype)[6:]}"
            yield Sample(name, (q, k), {"probes": probes})
    q, k = _random(generator, 1, 60, 4, 16), _random(generator, 1, 90, 2, 16)
    lengths: dict[str, Any] = {
        "cu_seqlens_q": _offsets(1, 0, 59),
        "cu_seqlens_k": _offsets(40, 1, 49),
    }
    for dtype in (torch.float32, torch.bfloat16):
        kwargs: dict[str, Any] = {"probes": 20, **lengths}
        yield Sample(f"packed-{str(dtype)[6:]}", (q.to(dtype), k.to(dtype)), kwargs)
    cache = k.transpose(1, 2).contiguous().transpose(1, 2)
    yield Sample("strided", (q[:, ::2], cache[..., :16]), {"probes": 8})
    yield Sample("scale", (q, k), {"probes": 8, "scale": -0.7})
    yield Sample("steep", (30 * q, 30 * k), {"probes": 8})


def _raw_lines(sample: Sample) -> tuple[Any, ...]:
    q, k = sample.args
    options: dict[str, Any] = {
        "probes": 64,
        "scale": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
    }
    options |= sample.kwargs
    offsets = options["cu_seqlens_q"], options["cu_seqlens_k"]
    longest = longest_of(k, offsets[1])
    return (q, k, *offsets, longest, options["probes"], options["scale"])


def _pair_rejects() -> Iterator[tuple[str, tuple[Tensor, Tensor], dict[str, Any], str, bool]]:
    q, k = torch.ones(1, 6, 4, 8), torch.ones(1, 6, 2, 8)
    four = _offsets(2, 4)
    both: dict[str, Any] = {"cu_seqlens_q": four, "cu_seqlens_k": four}
    yield "rank", (q[0], k), {}, "q must be [b, n, heads, d]", False
    yield "dtype", (q.double(), k), {}, "q must be float32, bfloat16 or float16", False
    yield "mixed", (q, k.half()), {}, "k must be float32, got float16", False
    yield "d", (q, k[..., :4]), {}, "k must have the d of q, 8, got 4", False
    yield "heads", (q[:, :, :3], k), {}, "q must have a multiple of kv_heads = 2 heads", False
    yield "stride", (q.transpose(2, 3), k), {}, "q must have a last stride of 1", False
    yield "sequences", (q, k.expand(2, 6, 2, 8)), {}, "keys must come in 1 sequences", False
    yield "end", (q[:, :5], k), both, "cu_seqlens_q must rise from 0 to 5 (tokens), got", True
    yield "batch", (q.expand(2, 6, 4, 8), k), both, "q must have a batch of 1", False
    yield "one", (q, k), {"cu_seqlens_q": four}, "keys must come in 2 sequences", False


def _line_rejects() -> Iterator[Reject]:
    for name, args, kwargs, message, of_values in _pair_rejects():
        yield Reject(name, args, kwargs, message, of_values)
    q = torch.ones(1, 6, 4, 8)
    yield Reject("probes", (q, q), {"probes": 0}, "probes must be at least 1, got 0")


def block_means_reference(x: Tensor, block: int, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means in float64."""
    sequences = split(x, cu_seqlens)
    max_blocks = -(-longest_of(x, cu_seqlens) // block)
    shape = (len(sequences), x.shape[2], max_blocks, x.shape[3])
    means = torch.zeros(shape, dtype=torch.float64)
    for s, x_s in enumerate(sequences):
        for c, tokens in enumerate(x_s.double().split(block) if len(x_s) else ()):
            means[s, :, c] = tokens.mean(0)
    return means


def _means_tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor]:
    # `block` sums, the share and its product.
    x, block = sample.args
    size = block_means_reference(x.abs(), block, **sample.kwargs)
    return ((block + 2) * EPS[torch.float32] * size,)


def _means_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(22)
    for b, n, h, d, block in (
        (1, 1, 1, 1, 1),
        (2, 33, 3, 64, 16),
        (1, 128, 2, 80, 128),
        (1, 50, 1, 67, 7),
        (1, 0, 2, 8, 4),
    ):
        for dtype in EPS:
            x = _random(generator, b, n, h, d).to(dtype)
            yield Sample(f"{b}x{n}x{h}x{d}-{block}-{str(dtype)[6:]}", (x, block))
    x = _random(generator, 1, 40, 2, 16)
    yield Sample("packed", (x, 16), {"cu_seqlens": _offsets(17, 0, 23)})
    yield Sample("strided", (x.transpose(1, 2).contiguous().transpose(1, 2)[:, ::3], 4))


def _means_rejects() -> Iterator[Reject]:
    x = torch.ones(1, 6, 2, 8)
    yield Reject("rank", (x[0], 2), {}, "x must be [b, n, heads, d]")
    yield Reject("dtype", (x.int(), 2), {}, "x must be float32, bfloat16 or float16, got int32")
    yield Reject("block", (x, 0), {}, "block must be in 1 .. 1073741824, got 0")
    bad = {"cu_seqlens": _offsets(2, 3)}
    yield Reject("end", (x, 2), bad, "cu_seqlens must rise from 0 to 6 (tokens), got", True)


def hierarchical_topk_reference(
    q: Tensor,
    k: Tensor,
    windows: Tensor,
    top: int,
    *,
    block_m: int = 64,
    block_n: int = 64,
    query_stride: int = 2,
    key_stride: int = 1,
    smallest: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The search, group by group, in float64."""
    sequences = list(zip(split(q, cu_seqlens_q), split(k, cu_seqlens_k), strict=True))
    rows = -(-longest_of(q, cu_seqlens_q) // block_m)
    max_blocks = -(-longest_of(k, cu_seqlens_k) // block_n)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    blocks = torch.zeros(len(sequences), heads, rows, max_blocks, dtype=torch.bool)
    scored = torch.zeros(len(sequences), heads, rows, dtype=torch.int32)
    for s, (q_s, k_s) in enumerate(sequences):
        for x in range(heads):
            for r in range(-(-len(q_s) // block_m)):
                first = len(k_s) - len(q_s) + r * block_m
                candidates = max(first - int(windows[x]) + 1, 0) // block_n
                queries = q_s[r * block_m : (r + 1) * block_m : query_stride, x].double()
                keys = k_s[:, x // group].double()
                if smallest:
                    queries = -queries

                def score(c: int, queries: Tensor = queries, keys: Tensor = keys) -> float:
                    sampled = keys[c * block_n : (c + 1) * block_n : key_stride]
                    return float((queries @ sampled.T).max())

                chosen, count = _search(candidates, top, score)
                blocks[s, x, r, chosen] = True
                scored[s, x, r] = count
    return blocks, scored


def _search(candidates: int, top: int, score: Any) -> tuple[list[int], int]:
    """Chosen blocks, and how many scores were asked for."""
    if candidates <= top:
        return list(range(candidates)), 0
    ends = [candidates * i // top for i in range(top + 1)]
    groups = list(pairwise(ends))
    known: dict[int, float] = {}
    asked = 0
    while any(end - begin > 1 for begin, end in groups):
        halves = []
        for begin, end in groups:
            middle = begin + (end - begin + 1) // 2
            halves += [(begin, middle)] + ([(middle, end)] if middle < end else [])
        # A first half was scored as a whole the round before, if there was one.
        fresh = [begin for begin, _ in halves if begin not in known]
        asked += len(fresh)
        known |= {begin: score(begin) for begin in fresh}
        groups = sorted(halves, key=lambda half: (-known[half[0]], half[0]))[:top]
    return [begin for begin, _ in groups], asked


def _search_samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(23)
    for b, sq, sk, h, g, d, top, tile in (
        (1, 1, 1, 1, 1, 1, 1, (16, 16)),
        (1, 100, 100, 2, 1, 8, 3, (16, 4)),
        (2, 33, 90, 4, 2, 17, 5, (16, 2)),
        (1, 70, 50, 1, 1, 16, 2, (32, 4)),  # queries before the first key
        (1, 40, 300, 1, 1, 4, 16, (128, 1)),
        (1, 0, 8, 1, 1, 4, 1, (16, 4)),
    ):
        for dtype in EPS:
            # Small integers: products are exact, and ties are decided alike.
            q = torch.randint(-3, 4, (b, sq, h, d), generator=generator).to(dtype)
            k = torch.randint(-3, 4, (b, sk, g, d), generator=generator).to(dtype)
            windows = torch.arange(h).mul(5).int()
            options: dict[str, Any] = {"block_m": tile[0], "block_n": tile[1]}
            name = f"{b}x{sq}x{sk}x{h}x{g}x{d}-{top}-{str(dtype)[6:]}"
            yield Sample(name, (q, k, windows, top), options)
    q = torch.randint(-3, 4, (1, 90, 2, 8), generator=generator).float()
    windows = torch.tensor([1, 20]).int()
    sizes: dict[str, Any] = {"block_m": 16, "block_n": 8}
    strides = {"query_stride": 16, "key_stride": 3, **sizes}
    yield Sample("strides", (q, q, windows, 2), strides)
    yield Sample("smallest", (q, q, windows, 2), {"smallest": True, **sizes})
    lengths: dict[str, Any] = {
        "cu_seqlens_q": _offsets(30, 0, 60),
        "cu_seqlens_k": _offsets(35, 5, 50),
    }
    yield Sample("packed", (q, q, windows, 2), lengths | sizes)


_SEARCH = {
    "block_m": 64,
    "block_n": 64,
    "query_stride": 2,
    "key_stride": 1,
    "smallest": False,
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
}


def _raw_search(sample: Sample) -> tuple[Any, ...]:
    q, k, windows, top = sample.args
    o = {**_SEARCH, **sample.kwargs}
    rows = -(-longest_of(q, o["cu_seqlens_q"]) // max(o["block_m"], 1))
    blocks = -(-longest_of(k, o["cu_seqlens_k"]) // max(o["block_n"], 1))
    offsets = o["cu_seqlens_q"], o["cu_seqlens_k"]
    sizes = (o["block_m"], o["block_n"], o["query_stride"], o["key_stride"], o["smallest"])
    return (q, k, *offsets, windows, top, *sizes, rows, blocks)


def _search_rejects() -> Iterator[Reject]:
    windows = torch.ones(4).int()
    for name, (q, k), kwargs, message, of_values in _pair_rejects():
        yield Reject(name, (q, k, windows, 2), kwargs, message, of_values)
    q = torch.ones(1, 6, 4, 8)
    yield Reject("windows", (q, q, windows[:3], 2), {}, "windows must have shape [4], got [3]")
    yield Reject("top", (q, q, windows, 0), {}, "top must be in 1 .. 1073741824, got 0")
    for name, value in (("block_m", 129), ("block_n", 0), ("query_stride", 65), ("key_stride", 0)):
        yield Reject(name, (q, q, windows, 2), {name: value}, f"{name} must be in 1 .. ")


CASES = (
    OpCase(
        "line_scores",
        line_scores,
        line_scores_reference,
        _line_tolerance,
        raw=_raw_lines,
        samples=lambda: list(_line_samples()),
        rejects=lambda: list(_line_rejects()),
    ),
    OpCase(
        "block_means",
        block_means,
        block_means_reference,
        _means_tolerance,
        raw=lambda s: (
            s.args[0],
            s.kwargs.get("cu_seqlens"),
            s.args[1],
            -(-longest_of(s.args[0], s.kwargs.get("cu_seqlens")) // max(s.args[1], 1)),
        ),
        samples=lambda: list(_means_samples()),
        rejects=lambda: list(_means_rejects()),
    ),
    OpCase(
        "hierarchical_topk",
        hierarchical_topk,
        hierarchical_topk_reference,
        lambda sample, expected: (0.0, 0.0),
        raw=_raw_search,
        samples=lambda: list(_search_samples()),
        rejects=lambda: list(_search_rejects()),
    ),
)
