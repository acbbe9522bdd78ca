"""Random calls: valid ones equal the reference; damaged ones are refused or answered, never worse.

A new operator is damaged here from the samples of its case. A strategy in ``_VALID`` draws valid
calls of it too.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from openwork.ops import compress_nm, nm_mask, pack_lowbit
from openwork.testing import CASES, OpCase, Sample, nm
from openwork.testing.active import make_column_weight
from openwork.testing.block_sparse import make_block_sparse_weight
from openwork.testing.case import as_tuple
from openwork.testing.lowbit import make_weight
from openwork.testing.sparse import make_sparse_weight

Draw = st.DrawFn
Raw = tuple[Any, ...]

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BITS = st.sampled_from([2, 3, 4, 8])
VECTORS = st.sampled_from([1, 8, 16, 32])
SIZES = st.integers(0, 5)
HALVES = st.integers(1, 40)
DENSITIES = st.sampled_from([0.0, 0.02, 0.5, 1.0])


def _fuzz(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        # A loaded machine is no fault of the calls.
        suppress_health_check=[HealthCheck.too_slow],
    )


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


_VALID = {
    "active_linear": _active_linear,
    "block_sparse_linear": _block_sparse_linear,
    "compress_nm": _compress_nm,
    "lowbit_linear": _lowbit_linear,
    "nm_linear": _nm_linear,
    "pack_lowbit": _pack_lowbit,
    "quantize_rows": _quantize_rows,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "rope_append": _rope_append,
    "silu_mul": _silu_mul,
    "sparse_linear": _sparse_linear,
}


@st.composite
def _samples(draw: Draw, case: OpCase) -> Sample:
    if case.name in _VALID:
        return _VALID[case.name](draw)
    # By number: hypothesis prints what it samples from.
    samples = case.samples()
    return samples[draw(st.integers(0, len(samples) - 1))]


# The samples of the others are run by test_ops.py.
@pytest.mark.parametrize("case", [c for c in CASES if c.name in _VALID], ids=lambda c: c.name)
def test_valid_calls_equal_the_reference(case: OpCase, isa: str) -> None:
    @given(_samples(case))
    @_fuzz(max_examples=40)
    def check(sample: Sample) -> None:
        case.check(sample)

    check()


def _unpack_arguments(sample: Sample) -> Raw:
    weight = pack_lowbit(*sample.args, **sample.kwargs)
    tensors = (weight.packed, weight.scales, weight.zeros)
    return (*tensors, weight.layout_id, weight.n, weight.k, weight.group_size)


def _expand_arguments(sample: Sample) -> Raw:
    weight = compress_nm(*sample.args, **sample.kwargs)
    numbers = (weight.layout_id, weight.n, weight.k, *weight.pattern, weight.vector)
    return (weight.values, weight.index, weight.scales, *numbers, weight.group_size)


# The operators and their raw arguments: those of the cases, and the inverses, which have no case.
_CALLS = {case.name: (case, case.raw) for case in CASES}
_CALLS["expand_nm"] = (_CALLS["compress_nm"][0], _expand_arguments)
_CALLS["unpack_lowbit"] = (_CALLS["pack_lowbit"][0], _unpack_arguments)

_DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
_INTS = [
    -(2**63) - 1, -(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 16, 31, 32, 33, 64, 65536, 65537,
    2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 32, 2**63 - 1, 2**63,
]  # fmt: skip
_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 1e-320, 1e300]
_OTHER_KINDS = [None, 1, 1.5, "text", torch.ones(3), torch.ones(0), []]


def _damaged_tensor(draw: Draw, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    if not shape:
        return tensor.to(draw(st.sampled_from(_DTYPES)))
    d = draw(st.integers(0, len(shape) - 1))
    match draw(st.sampled_from(["dtype", "rank", "size", "strides", "values"])):
        case "dtype":
            return tensor.to(draw(st.sampled_from(_DTYPES)))
        case "rank":
            more = [1] * draw(st.sampled_from([1, 2, 17]))
            less = shape[:d] + shape[d + 1 :]
            shapes = [[], less, [tensor.numel()], [*more, *shape], [*shape, *more]]
            return tensor.new_ones(draw(st.sampled_from(shapes)))
        case "size":
            shape[d] = max(0, draw(st.sampled_from([0, shape[d] - 1, shape[d] + 1, 2 * shape[d]])))
            return tensor.new_ones(shape)
        case "strides":
            gaps = tensor.repeat_interleave(2, d)[(slice(None),) * d + (slice(None, None, 2),)]
            turned = tensor.transpose(d, -1).contiguous().transpose(d, -1)
            shape[d] = 1
            repeated = tensor.new_ones(shape).expand(tensor.shape)
            return draw(st.sampled_from([gaps, turned, repeated]))
        case _:
            values: list[float] = [float("nan"), float("inf"), 6e4]
            if not tensor.is_floating_point():
                integers = tensor.dtype != torch.bool
                values = [-1, 1, torch.iinfo(tensor.dtype).max] if integers else [False, True]
            return torch.full_like(tensor, draw(st.sampled_from(values)))


def _damaged(draw: Draw, value: object) -> object:
    if isinstance(value, torch.dtype):
        return draw(st.sampled_from(_DTYPES))
    if draw(st.integers(0, 9)) == 9:
        return draw(st.sampled_from(_OTHER_KINDS))
    if isinstance(value, Tensor):
        return _damaged_tensor(draw, value)
    if isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        one = _damaged(draw, value[i])
        return draw(st.sampled_from([value[:i] + rest for rest in ([], [one, *value[i + 1 :]])]))
    if isinstance(value, int):
        return draw(st.sampled_from([value - 1, value + 1, 2 * value, *_INTS]))
    if isinstance(value, float):
        return draw(st.sampled_from(_NUMBERS))
    return torch.ones(draw(SIZES))


@st.composite
def _damaged_calls(draw: Draw, name: str) -> Raw:
    case, raw_of = _CALLS[name]
    raw = list(raw_of(draw(_samples(case))))
    # Two, to see that both sides check in one order.
    for i in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=2)):
        raw[i] = _damaged(draw, raw[i])
    return tuple(raw)


# Conditions on values, which a fake does not have.
_ON_VALUES = (
    r"block_index_\w+: (blocks|columns|slashes) must have shape|"
    r"\w+: ((codes|zeros|ids|offsets|indices|weight) must be in 0 \.\.|scales must be finite|"
    r"((column_)?indptr|cu_seqlens(_[qk])?) must rise|(nnz|blocks) must be the number|"
    r"max_(keys|rows|blocks)\b.* must be (the longest|that of|those of)|rows must be the|"
    r"((column_)?nnz|indptr) must be (the last|that of)|(indices|columns|selected) must rise|"
    r"columns must be outside|indptr must have the \d+ blocks|cos must have a row|"
    r"(mask must keep|weight must have nonzeros in) at most|"
    r"block_table must hold|(key|value)_committed must (be at most|be whole groups)|"
    r"(key|value)_table must be finite|(lengths|counts|drop|begins) must be in 0 \.\.|"
    r"(kept|targets) must rise|"
    r"sources must be tokens|(the tail|pages) must have room)"
)


def _call(name: str, raw: Raw) -> tuple[Tensor, ...] | Exception:
    try:
        return as_tuple(getattr(torch.ops.openwork, name).default(*raw))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        return error


def _fakes(name: str, raw: Raw, mode: FakeTensorMode) -> Raw:
    """Tensors become fake; where numbers belong, one of a single element is its value."""

    def number(tensor: Tensor) -> object:
        return tensor.item() if tensor.numel() == 1 else tensor

    arguments = getattr(torch.ops.openwork, name).default._schema.arguments
    makers = [mode.from_tensor if "Tensor" in str(a.type) else number for a in arguments]
    return tuple(tree_map_only(Tensor, *pair) for pair in zip(makers, raw))  # noqa: B905 (some have defaults)


def _words(error: Exception) -> str:
    """The text without what fakes know better: names of rare dtypes, sizes beyond 64 bits."""
    text = re.sub(r"-?\d{10,}", "huge", str(error))
    return re.sub("float8_e4m3fn|complex64", "another dtype", text)


@pytest.mark.parametrize("name", _CALLS)
def test_damaged_calls_are_refused_or_answered(name: str) -> None:
    @given(_damaged_calls(name))
    @_fuzz(max_examples=150)
    def check(raw: Raw) -> None:
        mode = FakeTensorMode()
        fakes = _fakes(name, raw, mode)
        real = _call(name, raw)
        with mode:
            fake = _call(name, fakes)
        if isinstance(real, tuple):
            assert isinstance(fake, tuple), fake
            assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
            return
        assert not isinstance(real, AttributeError)
        assert re.search(rf"\b{name}\b", str(real)), real
        if re.match(_ON_VALUES, str(real)):
            assert isinstance(fake, tuple), (fake, real)
            return
        assert isinstance(fake, Exception), real
        assert not isinstance(real, ValueError) or _words(fake) == _words(real)

    check()
