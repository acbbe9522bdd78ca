"""Random calls: valid ones equal the reference; damaged ones are refused or answered, never worse.

A new operator is damaged here from the samples of its case. A strategy in valid_calls.py draws
valid calls of it too.
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

from openwork.ops import compress_nm, pack_lowbit
from openwork.testing import CASES, OpCase, Sample
from openwork.testing.case import as_tuple

from .valid_calls import VALID

Draw = st.DrawFn
Raw = tuple[Any, ...]


def _fuzz(max_examples: int) -> settings:
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        # A loaded machine is no fault of the calls.
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def _samples(draw: Draw, case: OpCase) -> Sample:
    if case.name in VALID:
        return VALID[case.name](draw)
    # By number: hypothesis prints what it samples from.
    samples = case.samples()
    return samples[draw(st.integers(0, len(samples) - 1))]


# The samples of the others are run by test_ops.py.
@pytest.mark.parametrize("case", [c for c in CASES if c.name in VALID], ids=lambda c: c.name)
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
    return torch.ones(draw(st.integers(0, 5)))


@st.composite
def _damaged_calls(draw: Draw, name: str) -> Raw:
    case, raw_of = _CALLS[name]
    raw = list(raw_of(draw(_samples(case))))
    # Two, to see that both sides check in one order.
    for i in draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=2, unique=True)):
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
