"""Attention over pages: reference, small nasty calls, and workloads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..kv_format import KVFormat
from ..kv_pages import KVPages
from .case import EPS, TINY, Cost, OpCase, Reject, Sample, Unit, Workload
from .kv_cache import FORMATS, History, dense

Part = Literal["keys", "values"]


def codes_of(codes: Tensor, bits: int) -> Tensor:
    """``[pages, 32 * panels, k]`` uint8: the codes in packed lines (csrc/core/code_lines.h).

    ``codes`` is ``[pages, panels, k_blocks, 2 halves, lines, 16 n, 4 bytes]`` uint8.
    """
    pages, panels, blocks = codes.shape[:3]
    lines = codes.unbind(4)
    subs = []  # 4 consecutive k of every n each
    if bits == 3:
        for j in range(8):
            code = lines[j // 3] >> 3 * (j % 3)
            if j % 3 == 2:
                code = code & 3 | (lines[2] >> 6 + j // 3 & 1) << 2
            subs.append(code & 7)
    else:
        for sub in range(4):
            line, place = divmod(sub * bits, 8)
            subs.append(lines[line] >> place & 2**bits - 1)
    unpacked = torch.stack(subs, 5)  # pages, panels, blocks, halves, n, sub, byte
    return unpacked.permute(0, 1, 3, 4, 2, 5, 6).reshape(pages, panels * 32, blocks * 4 * len(subs))


def dequantized_pages(pages: KVPages, part: Part, ids: Tensor) -> Tensor:
    """``[ids, page_size, d]`` float64: ``code * scale + min`` and the outliers."""
    side = getattr(pages, part)
    fmt, d = (pages.key_format, pages.d) if part == "keys" else (pages.value_format, pages.value_d)
    if fmt.dense:
        rows: Tensor = side.rows[ids].double()
        return rows
    codes = codes_of(side.codes[ids], fmt.bits)
    codes = codes[..., :d] if part == "keys" else codes[:, :d].transpose(1, 2)
    levels = codes if fmt.codebook is None else torch.tensor(fmt.codebook)[codes.long()]
    grids = []
    for pool in (side.scales, side.mins):
        grid = pool[ids].double().repeat_interleave(fmt.group_size, 1)
        grids.append(grid if fmt.axis == "channel" else grid[:, :d].transpose(1, 2))
    x: Tensor = levels * grids[0] + grids[1]
    if fmt.outliers:
        x = x.scatter(2, side.outlier_index[ids].long(), side.outlier_values[ids].double())
    return x


def tokens_of(pages: KVPages, part: Part, row: tuple[int, int], places: Tensor) -> Tensor:
    """``[places, d]`` float64: tokens of one head, rising, in pages or waiting in the tail."""
    side = getattr(pages, part)
    held = int((pages.lengths if side.committed is None else side.committed)[row])
    inside, waiting = places[places < held], places[places >= held]
    # Only pages that are asked for: of a long cache those may be few.
    used, index = (inside // pages.page_size).unique(return_inverse=True)
    x = dequantized_pages(pages, part, pages.block_table[row][used].long())
    x = x[index, inside % pages.page_size]
    if len(waiting) == 0:
        return x
    ring = side.tail[row].double()
    return torch.cat([x, ring[waiting % ring.shape[0]]])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attended(pages: KVPages, row: tuple[int, int], t: int, selected: Tensor | None) -> Tensor:
    """``[length]`` bool: tokens in selected pages, and the newest."""
    length = int(pages.lengths[row])
    places = torch.arange(length)
    if selected is None:
        return torch.ones(length, dtype=torch.bool)
    held = [s.committed for s in (pages.keys, pages.values) if s.committed is not None]
    newest = max(min([length - t + 1, *(int(c[row]) for c in held)]), 0) // 32 * 32
    return torch.isin(places // pages.page_size, selected[row]) | (places >= newest)


def paged_attention_reference(
    q: Tensor,
    pages: KVPages,
    *,
    selected: Tensor | None = None,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    magnitudes: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q @ k.T) @ v`` and its log-sum-exp head by head, in float64.

    ``magnitudes``: with absolute values in the place of values.
    """
    b, t, h, d = q.shape
    group = h // pages.lengths.shape[1]
    y = torch.zeros(b, t, h, pages.value_d, dtype=torch.float64)
    lse = torch.full((b, t, h), -math.inf, dtype=torch.float64)
    factor = 1 / math.sqrt(d) if scale is None else scale
    for row in itertools.product(range(b), range(pages.lengths.shape[1])):
        length = int(pages.lengths[row])
        places = _attended(pages, row, t, selected).nonzero()[:, 0]
        keys, values = (tokens_of(pages, part, row, places) for part in ("keys", "values"))
        values = values.abs() if magnitudes else values
        if cos is not None and sin is not None:
            at = places if pages.positions is None else pages.positions[row][places].long()
            keys = _rotated(keys, cos[at].double(), sin[at].double())
        for query in range(t):
            seen = places <= length - t + query
            if not seen.any():
                continue
            heads = slice(row[1] * group, (row[1] + 1) * group)
            scores = factor * q[row[0], query, heads].double() @ keys[seen].T
            y[row[0], query, heads] = scores.softmax(-1) @ values[seen]
            lse[row[0], query, heads] = scores.logsumexp(-1)
    return y, lse


def _op(q: Tensor, pages: KVPages, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return ops.paged_attention(q, pages, return_lse=True, **kwargs)


# What two digits round by, where the largest number is 1: half a step, or what sharing a digit with
# others takes.
_ROUNDING = {8: 0.5 / 32639, 4: 8.5 / 30464, 3: 0.5 / 32639, 2: 40 / 24320}


def _digit_error(dtype: torch.dtype, fmt: KVFormat, side: Any, n: int) -> Tensor:
    """Of a sum over n codes, where the other factor's largest is 1."""
    if dtype != torch.bfloat16 or fmt.dense or fmt.codebook or fmt.outliers:
        return torch.zeros(())
    # Codes past the last share digits with those before.
    most = -(-n // 16) * 16 * (2**fmt.bits - 1) / 2 * _ROUNDING[fmt.bits]
    error: Tensor = most * side.scales.float().abs().nan_to_num().max()
    return error


def _tolerance(sample: Sample, expected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, pages = sample.args
    d = q.shape[3]
    scale = sample.kwargs.get("scale")
    factor = 1 / math.sqrt(d) if scale is None else abs(scale)
    # As in decode_attention; the size of a score is bounded by those of its parts, code * scale and
    # min, of which each may be twice as large as the key, or more where a group lies far from 0.
    largest = torch.zeros(())
    for fmt, side in ((pages.key_format, pages.keys),):
        for pool in (side.rows, side.tail, side.outlier_values):
            if pool is not None:
                largest = torch.maximum(largest, pool.float().abs().nan_to_num().max())
        if not fmt.dense:
            top = max(fmt.codebook) if fmt.codebook else 2**fmt.bits - 1
            parts = side.scales.float().abs() * top + side.mins.float().abs()
            largest = torch.maximum(largest, parts.nan_to_num().max())
    worst = 2 * factor * largest * q.float().abs().sum(-1).max() if q.numel() else torch.zeros(())
    longest = int(pages.lengths.max()) if pages.lengths.numel() else 0
    steps = 2 * (d + 9) * worst + longest + 20
    reach, _ = paged_attention_reference(*sample.args, **sample.kwargs, magnitudes=True)
    if not pages.value_format.dense:
        # The parts of a value, code * scale and min, may cancel.
        top = (
            max(pages.value_format.codebook)
            if pages.value_format.codebook
            else 2**pages.value_format.bits - 1
        )
        parts = pages.values.scales.float().abs() * top + pages.values.mins.float().abs()
        reach = reach + 2 * parts.nan_to_num().max()
    # Digits of q * scale and of weight * scale, of up to 256 tokens together: each rounded, and as
    # far from the middle as a code can be.
    score_error, value_error = (
        _digit_error(q.dtype, fmt, side, n)
        for fmt, side, n in (
            (pages.key_format, pages.keys, d),
            (pages.value_format, pages.values, min(longest, 256)),
        )
    )
    score_error = score_error * factor * (q.float().abs().max() if q.numel() else 0.0)
    eps = EPS[q.dtype]
    inner = (EPS[torch.float32] * steps + (2 * score_error).expm1()) * reach + value_error
    y = inner + eps * (expected[0].abs() + inner) + TINY[q.dtype] * eps
    lse = EPS[torch.float32] * (steps + expected[1].abs().nan_to_num(posinf=0.0)) + score_error
    return y, lse


def _call(history: History, t: int, group: int, **kwargs: Any) -> Sample:
    pages = history.pages()
    generator = torch.Generator().manual_seed(t)
    heads = history.kv_heads * group
    q = torch.randn(history.b, t, heads, history.d, generator=generator).to(history.dtype)
    return Sample("", (q, pages), kwargs)


def _named(name: str, sample: Sample) -> Sample:
    return Sample(name, sample.args, sample.kwargs)


def _tables(positions: int, d: int) -> dict[str, Tensor]:
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    return {"cos": angles.cos(), "sin": angles.sin()}


def _samples() -> Iterator[Sample]:
    ragged = torch.tensor([150, 67], dtype=torch.int32)
    for i, (name, formats) in enumerate(FORMATS.items()):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        d, value_d = ((20, 36), (64, 64), (80, 80), (96, 128))[i % 4]
        page_size = 128 if formats[0].group_size == 128 else 64
        history = History(*formats, d=d, value_d=value_d, dtype=dtype, page_size=page_size)
        history = history.appended(150, 1, counts=ragged).appended(70, 2)
        yield _named(name, _call(history, 1 + i % 3, (1, 3, 4, 7)[i % 4]))
    for dtype in EPS:
        history = History(*dense(dtype), d=64, value_d=64, dtype=dtype, page_size=32)
        yield _named(f"dense-{str(dtype)[6:]}", _call(history.appended(100, 3), 2, 4))
    kivi = History(*FORMATS["kivi4"], d=64, value_d=64, dtype=torch.bfloat16).appended(280, 4)
    selected = torch.tensor(
        [[[0, 2, 3], [1, -1, -1]], [[-1, -1, -1], [0, 1, 4]]], dtype=torch.int32
    )
    yield _named("selected", _call(kivi, 1, 4, selected=selected))
    yield _named("many-rows", _call(kivi, 8, 9))
    yield _named("scale", _call(kivi, 2, 2, scale=-0.3))
    yield _named("empty", _call(History(*FORMATS["kivi2"], dtype=torch.float32), 2, 2))
    yield _named("short", _call(History(*FORMATS["kivi2"]).appended(3, 5), 8, 2))
    yield _named("no-queries", _call(History(*FORMATS["kivi2"]).appended(3, 5), 0, 2))
    before = History(*FORMATS["nuq3"], d=32, value_d=32, dtype=torch.float32).appended(200, 6)
    # Histories count positions from 1000 times their seed.
    yield _named("rotated", _call(before, 2, 3, **_tables(6300, 32)))


def _rejects() -> Iterator[Reject]:
    history = History(*FORMATS["kivi4"], d=64, value_d=64).appended(70, 1)
    q, pages = _call(history, 1, 2).args
    yield Reject("dtype", (q.float(), pages), {}, "q must be of the dtype of the pages")
    yield Reject("rank", (q[0], pages), {}, "q must be [b, t, h, d] with b = 2 and d = 64")
    yield Reject("heads", (q[:, :, :3], pages), {}, "multiple of kv_heads = 2 heads, got 3")
    yield Reject("tokens", (q.expand(2, 9, 4, 64), pages), {}, "at most 8 tokens, got 9")
    tables = _tables(9, 64)
    yield Reject("sin", (q, pages), {"cos": tables["cos"]}, "sin must be given, as cos is")
    yield Reject("positions", (q, pages), tables, "cos must have a row for position", True)
    for name, places, message in (
        ("far", [2], "selected must rise within 0 .. 1"),
        ("negative", [-2], "selected must rise within 0 .. 1"),
        ("falling", [1, 0], "got 0 after 1"),
        ("after-the-end", [-1, 1], "got 1 after -1"),
    ):
        selected = torch.tensor(places, dtype=torch.int32).expand(2, 2, -1).contiguous()
        yield Reject(name, (q, pages), {"selected": selected}, message, True)
    selected = torch.zeros(2, 2, 1)
    yield Reject("selected", (q, pages), {"selected": selected}, "selected must be int32")
    broken = history.pages()
    broken.block_table[1, 1, 0] = 99999
    yield Reject("table", (q, broken), {}, "block_table must hold pages in 0 ..", True)


def _workload(bits: int, group: int, t: int = 1, keys: int = 32768, budget: int = 0) -> Workload:
    """32 query heads on 8 key heads; ``bits`` of keys (by channel) and values (by token)."""
    params: dict[str, Any] = {"b": 1, "t": t, "h": 32, "kv_heads": 8, "d": 128, "keys": keys}
    params |= {"bits": bits, "group_size": group, "budget": budget}
    params["dtype"] = "float32" if bits == 32 else "bfloat16"

    def make() -> Sample:
        generator = torch.Generator().manual_seed(12)
        formats = dense(getattr(torch, params["dtype"]))
        if bits < 16:
            formats = (KVFormat(bits, "channel", group), KVFormat(bits, "token", group))
        dtype = getattr(torch, params["dtype"])
        page_size = 64 if bits < 16 and group < 128 else 128
        pages = KVPages.allocate(
            1, 8, 128, keys, keys=formats[0], values=formats[1], dtype=dtype, page_size=page_size
        )
        for begin in range(0, keys, 1024):
            x = torch.randn(2, 1, min(1024, keys - begin), 8, 128, generator=generator).to(dtype)
            ops.kv_append(pages, x[0], x[1])
        q = torch.randn(1, t, 32, 128, generator=generator).to(dtype)
        kwargs = {}
        if budget:
            count = budget // page_size
            chosen = torch.arange(count) * (keys // page_size) // count
            kwargs["selected"] = chosen.to(torch.int32).expand(1, 8, count).contiguous()
        return Sample("workload", (q, pages), kwargs)

    return Workload(params, make)


def _cost(params: Mapping[str, Any]) -> Cost:
    t, h, g, d = (params[name] for name in ("t", "h", "kv_heads", "d"))
    tokens = params["budget"] or params["keys"]
    bits = params["bits"]
    # Codes, and of each group a scale and a min of 16 bits; queries and results.
    number = bits / 8 if bits >= 16 else bits / 8 + 4 / params["group_size"]
    units: dict[int, Unit] = {32: "fp32", 16: "bf16"}
    # Products for each code: codes of 4 and 2 bits share the second digit.
    products = {32: 1.0, 4: 1.5, 2: 1.25}.get(bits, 2.0)
    size = getattr(torch, params["dtype"]).itemsize
    return Cost(
        int(2 * g * tokens * d * number) + 2 * t * h * d * size,
        int(4 * products * t * h * tokens * d),
        units.get(bits, "int8"),
    )


_WORKLOADS = (
    *(_workload(bits, 128) for bits in (32, 16, 8, 4, 2)),
    *(_workload(bits, 64) for bits in (8, 4, 3, 2)),
    *(_workload(bits, 128, t=4) for bits in (32, 16, 8, 4, 2)),
    *(_workload(4, 64, keys=keys, budget=4096) for keys in (8192, 32768, 131072)),
)


CASES = (
    OpCase(
        "paged_attention",
        _op,
        paged_attention_reference,
        _tolerance,
        raw=lambda s: (
            s.args[0],
            s.args[1].tensors,
            s.args[1].format,
            *(s.kwargs.get(name) for name in ("selected", "scale", "cos", "sin")),
        ),
        samples=lambda: list(_samples()),
        rejects=lambda: list(_rejects()),
        workloads=_WORKLOADS,
        cost=_cost,
    ),
)
