"""Every operator against its reference, on every tier, by torch's own checks, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

import openwork
from openwork.testing import CASES, OpCase, Reject, Sample
from openwork.testing.case import as_tuple


def _each_sample() -> list[object]:
    return [pytest.param(c, s, id=f"{c.name}-{s.name}") for c in CASES for s in c.samples()]


def _each_reject() -> list[object]:
    return [pytest.param(c, r, id=f"{c.name}-{r.name}") for c in CASES for r in c.rejects()]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_reference(case: OpCase, isa: str) -> None:
    for sample in case.samples():
        case.check(sample)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_result_does_not_depend_on_threads(case: OpCase) -> None:
    before = torch.get_num_threads()
    try:
        for sample in case.samples():
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(as_tuple(case.op(*sample.args, **sample.kwargs)))
            for one, two in zip(*results, strict=True):
                assert torch.equal(one.nan_to_num(), two.nan_to_num()), sample.name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "sample"), _each_sample())
def test_inputs_are_left_alone(case: OpCase, sample: Sample) -> None:
    tensors = [t for t in case.raw(sample) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    case.op(*sample.args, **sample.kwargs)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


def _opcheck_samples() -> list[object]:
    # opcheck takes a second a call: one sample in nine, and each of the unusual ones.
    chosen = []
    for case in CASES:
        for i, sample in enumerate(case.samples()):
            if i % 9 == 0 or not any(ch.isdigit() for ch in sample.name):
                chosen.append(pytest.param(case, sample, id=f"{case.name}-{sample.name}"))
    return chosen


@pytest.mark.parametrize(("case", "sample"), _opcheck_samples())
def test_opcheck(case: OpCase, sample: Sample) -> None:
    overload = getattr(torch.ops.openwork, case.name).default
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not any(bool(t.isnan().any()) for t in as_tuple(overload(*case.raw(sample)))):
        # It compares traced results with eager ones, and takes NaN for different from NaN.
        utilities.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, case.raw(sample), test_utils=utilities)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_compiles_without_graph_breaks(case: OpCase) -> None:
    torch._dynamo.reset()
    sample = case.samples()[0]
    eager = as_tuple(case.op(*sample.args, **sample.kwargs))
    overload = getattr(torch.ops.openwork, case.name).default
    compiled = torch.compile(lambda *args: overload(*args), fullgraph=True, backend="aot_eager")
    got = as_tuple(compiled(*case.raw(sample)))
    want = as_tuple(overload(*case.raw(sample)))
    assert eager
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_module_compiles_with_inductor() -> None:
    from openwork.testing.lowbit import make_weight

    torch._dynamo.reset()
    module = openwork.nn.LowbitLinear(make_weight(48, 64, 4, 32, False, torch.float32))
    compiled = torch.compile(module, fullgraph=True)
    for rows in (3, 7):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(("case", "reject"), _each_reject())
def test_bad_input_is_refused(case: OpCase, reject: Reject) -> None:
    with pytest.raises(ValueError, match=f"^{case.name}: ") as error:
        case.op(*reject.args, **reject.kwargs)
    assert reject.message in str(error.value)


@pytest.mark.parametrize(("case", "reject"), _each_reject())
def test_fake_refuses_in_the_same_words(case: OpCase, reject: Reject) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    sample = Sample(reject.name, reject.args, reject.kwargs)
    if case.name == "lowbit_linear":
        bias, add = (*reject.args, None, None)[2:4]
        sample = Sample(reject.name, reject.args[:2], {"bias": bias, "add": add})
    if case.name == "pack_lowbit":
        sample = Sample(reject.name, (*reject.args, None)[:3], reject.kwargs)
    with pytest.raises(ValueError, match=f"^{case.name}: ") as real:
        case.op(*reject.args, **reject.kwargs)
    mode = FakeTensorMode()
    raw = tree_map_only(torch.Tensor, mode.from_tensor, case.raw(sample))
    overload = getattr(torch.ops.openwork, case.name).default
    if reject.of_values:
        with mode:
            overload(*raw)
        return
    with mode, pytest.raises(ValueError, match=f"^{case.name}: ") as fake:
        overload(*raw)
    assert str(fake.value) == str(real.value)
