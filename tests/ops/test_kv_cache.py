"""What is special of caches: error bounds, when tokens are quantized, bounds of pages."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import openwork
from openwork import KVFormat, KVPages, ops
from openwork.testing.case import EPS
from openwork.testing.kv_cache import FORMATS, NUQ3, History, dense, state

KIVI = (KVFormat(2, "channel", 32, step=128), KVFormat(2, "token", 32, window=128))


def _cache(fmt: KVFormat, dtype: torch.dtype, d: int = 64, **options: object) -> KVPages:
    return KVPages.allocate(1, 1, d, 1024, keys=fmt, values=fmt, dtype=dtype, **options)  # type: ignore[arg-type]


def _through(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor]:
    """``[tokens, d]`` as keys and as values of a cache of that format."""
    pages = _cache(fmt, x.dtype, x.shape[1])
    tokens = x[None, :, None]
    ops.kv_append(pages, tokens, tokens)
    keys, values = ops.kv_read(pages)
    return keys[0, 0], values[0, 0]


def _spans(x: Tensor, fmt: KVFormat) -> Tensor:
    """Of each number of ``[tokens, d]``: max - min of its group."""
    x = x.double()
    if fmt.axis == "channel":
        groups = x.view(-1, fmt.group_size, x.shape[1])
        return (groups.amax(1) - groups.amin(1)).repeat_interleave(fmt.group_size, 0)
    parts = x.split(fmt.group_size, 1)
    return torch.cat([(p.amax(1) - p.amin(1))[:, None].expand_as(p) for p in parts], 1)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_error_is_at_most_half_a_step(isa: str, bits: int, axis: str, dtype: torch.dtype) -> None:
    fmt = KVFormat(bits, axis, 64 if axis == "channel" else 32)  # type: ignore[arg-type]
    x = (torch.randn(128, 80) * torch.logspace(-2, 2, 80)).to(dtype)
    step = _spans(x, fmt) / (2**bits - 1)
    # The scale is rounded up by at most two roundoffs, x^ to the dtype, the quotient in fp32.
    slack = step * (EPS[dtype] + 2.0**-15) + (x.double().abs() + step) * (2 * EPS[dtype])
    for got in _through(x, fmt):
        assert ((got.double() - x.double()).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("name", FORMATS)
def test_equal_numbers_are_exact(isa: str, name: str) -> None:
    for fmt in FORMATS[name]:
        for value in (0.0, -3.7, 1e-30):
            x = torch.full((64, 48), value)
            if fmt.group_size in (32, 64):
                assert all(torch.equal(got, x) for got in _through(x, fmt))


def test_kivi_commits_keys_by_the_residual_and_values_behind_a_window() -> None:
    pages = KVPages.allocate(1, 1, 16, 1024, keys=KIVI[0], values=KIVI[1])
    length = 0
    for t in (1, 126, 1, 1, 3, 200, 128, 0, 55):
        ops.kv_append(pages, torch.randn(1, t, 1, 16), torch.randn(1, t, 1, 16))
        length += t
        assert pages.lengths.item() == length
        assert pages.keys.committed is not None and pages.values.committed is not None
        assert pages.keys.committed.item() == length // 128 * 128
        assert pages.values.committed.item() == max(length - 128, 0)


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 30, 1)])
def test_drafts_that_are_taken_back_leave_no_trace(name: str, sizes: tuple[int, ...]) -> None:
    """Append, roll back, append is bit for bit what append is."""
    formats = dense(torch.bfloat16) if name == "dense" else FORMATS[name]
    history = replace(History(*formats, drafts=40), steps=()).appended(75, 1)
    pages, other = history.pages(), history.pages()
    for i, t in enumerate(sizes):
        keys, values, positions = history.tokens(t, 10 + i)
        ops.kv_append(pages, keys, values, positions=positions, commit=False)
    ops.kv_rollback(pages, torch.full((2,), sum(sizes), dtype=torch.int32))
    assert all(map(torch.equal, state(pages), state(other)))
    keys, values, positions = history.tokens(90, 2)
    for cache in (pages, other):
        ops.kv_append(cache, keys, values, positions=positions)
    assert all(map(torch.equal, state(pages), state(other)))


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_how_tokens_arrive_does_not_matter(name: str) -> None:
    """One by one, in any pieces, or at once."""
    formats = dense(torch.bfloat16) if name == "dense" else FORMATS[name]
    history = History(*formats)
    keys, values, positions = history.tokens(170, 1)
    states = []
    for sizes in ([170], [1] * 170, [3, 60, 0, 100, 7]):
        pages = history.pages()
        pieces = zip(*(x.split(sizes, 1) for x in (keys, values, positions)), strict=True)
        for k, v, p in pieces:
            ops.kv_append(pages, k, v, positions=p.contiguous())
        states.append(state(pages))
    for other in states[1:]:
        assert all(map(torch.equal, states[0], other))


@pytest.mark.parametrize("name", [*FORMATS, "dense"])
def test_no_score_is_above_the_bound_of_its_page(isa: str, name: str) -> None:
    formats = dense(torch.bfloat16) if name == "dense" else FORMATS[name]
    history = History(*formats).appended(150, 1)
    pages = history.pages()
    assert pages.key_min is not None and pages.key_max is not None
    keys = ops.kv_read(pages)[0].double()
    committed = pages.lengths if pages.keys.committed is None else pages.keys.committed
    q = torch.randn(2, 2, 1, history.d, dtype=torch.float64)
    scores = (q * keys).sum(-1)
    for page, tokens in enumerate(scores.split(pages.page_size, -1)):
        place = page * pages.page_size
        rows = pages.block_table[..., page].long().clamp(min=0)
        low, high = pages.key_min[rows].double(), pages.key_max[rows].double()
        chunks = torch.maximum(q * low, q * high).sum(-1)
        held = place + torch.arange(tokens.shape[-1]) < committed[..., None]
        filled = place + 16 * torch.arange(chunks.shape[-1]) < committed[..., None]
        filled4 = filled[..., None]
        flat_low = torch.where(filled4, low, torch.inf).amin(2, keepdim=True)
        flat_high = torch.where(filled4, high, -torch.inf).amax(2, keepdim=True)
        flat = torch.maximum(q * flat_low, q * flat_high).sum(-1)[..., 0].nan_to_num(-torch.inf)
        best = torch.where(filled, chunks, -torch.inf).amax(-1)
        # x^ was rounded to bf16 by kv_read; the bounds are of what it is before.
        slack = 2.0**-7 * (q.abs() * keys.abs().amax(2, keepdim=True)).sum(-1)[..., 0]
        assert (torch.where(held, tokens, -torch.inf).amax(-1) <= best + slack).all()
        assert (best <= flat).all()


def test_all_pages_within_the_budget_are_selected() -> None:
    history = History(*dense(torch.bfloat16)).appended(150, 1)
    q = torch.randn(2, 1, 4, history.d).bfloat16()
    for method in ("flat", "chunks"):
        got = ops.select_pages(q, history.pages(), 4, method=method)  # type: ignore[arg-type]
        assert got.tolist() == [[[0, 1, 2, -1]] * 2] * 2


def test_pages_without_heads_are_refused() -> None:
    """``KVPages`` are not made so, but operators take tensors."""
    history = History(*dense(torch.bfloat16)).appended(150, 1)
    pages = history.pages()
    table, lengths, *rest = pages.tensors
    tensors = [table[:, :0].contiguous(), lengths[:, :0].contiguous(), *rest]
    tensors[-1] = tensors[-1][:, :0].contiguous()  # positions
    q = torch.zeros(2, 1, 4, history.d).bfloat16()
    mode = FakeTensorMode()
    for number in (mode.from_tensor, lambda x: x):
        given = [number(x) for x in (q, *tensors)]
        with mode if number is mode.from_tensor else contextlib.nullcontext():
            for name, message, more in (
                ("select_pages", "heads a multiple of 0", (2, False, False)),
                ("paged_attention", "multiple of kv_heads = 0 heads", ()),
            ):
                op = getattr(torch.ops.openwork, name).default
                with pytest.raises(ValueError, match=f"{name}: q must .*{message}"):
                    op(given[0], given[1:], pages.format, *more)


def test_codebook_beats_the_uniform_grid_on_laplace_numbers() -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((512, 64))
    groups = x.view(-1, 64, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    points = ((groups - low) / (high - low)).flatten()
    centers = torch.quantile(points[:200000], (torch.arange(8) + 0.5) / 8)
    for _ in range(50):  # Lloyd's algorithm
        nearest = (points[:, None] - centers).abs().argmin(1)
        centers = torch.stack([points[nearest == i].mean() for i in range(8)])
    book = tuple(centers.sort().values.tolist())
    errors = []
    for codebook in (None, book):
        fmt = KVFormat(3, "channel", 64, codebook=codebook)
        errors.append((_through(x, fmt)[0] - x).square().mean())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_outliers_are_exact_and_the_rest_is_better_for_it(isa: str, axis: str) -> None:
    x = torch.randn(128, 64)
    loud = torch.rand(128, 64).argsort(1)[:, :2]
    x.scatter_(1, loud, 50.0)
    plain, outlying = (
        KVFormat(2, axis, 32, outliers=n)  # type: ignore[arg-type]
        for n in (0, 2)
    )
    quiet = torch.ones(128, 64, dtype=torch.bool).scatter_(1, loud, False)
    for worse, better in zip(_through(x, plain), _through(x, outlying), strict=True):
        assert torch.equal(better[~quiet], x[~quiet])
        # A sixth of the range, of 8 normal numbers at most and of those up to 50.
        assert (better - x)[quiet].abs().max() < 1.4 < (worse - x)[quiet].abs().max()


def test_a_cache_of_another_tier_reads_the_same(isa: str) -> None:
    """Bits do not depend on who wrote them."""
    history = History(KVFormat(3, "channel", 32, codebook=NUQ3), FORMATS["outliers3"][1])
    pages = history.appended(150, 1).pages()
    here = [t.clone() for t in pages.tensors]
    openwork.set_isa("scalar")
    other = history.appended(150, 1).pages()
    assert all(map(torch.equal, here, other.tensors))
