"""CUDA operators against the references: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch

import openwork
from bench.gpu import Gpu, missing
from openwork.testing import CASES, OpCase, Reject
from openwork.testing.case import EPS, Sample, as_tuple

from .devices import built, emulated_operator, overload

# Operators with a CUDA implementation, and those whose case is a way there and back, which tests
# of their own go.
NAMES = ("quantize_rows", "hadamard", "lowbit_linear", "lowbit_embedding", "nm_linear")
ROUND_TRIPS = ("pack_lowbit", "compress_nm")
COVERED = [case for case in CASES if case.name in NAMES]
REFUSING = [case for case in CASES if case.name in (*NAMES, *ROUND_TRIPS)]
# To see these values the host would have to wait for the device.
UNSEEN = ("lowbit_embedding",)
on_gpu = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_equals_reference(case: OpCase, device: str) -> None:
    on_device = overload(case.name, device)

    def op(*args: Any, **kwargs: Any) -> Any:
        return on_device(*case.raw(Sample("", args, kwargs)))

    for sample in case.samples():
        replace(case, op=op).check(sample)


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_opcheck(case: OpCase) -> None:
    emulated = emulated_operator(case.name)
    samples = case.samples()
    # A second a call: a few of them.
    for sample in samples[:: -(-len(samples) // 5)]:
        raw = case.raw(sample)
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not any(bool(t.isnan().any()) for t in as_tuple(emulated(*raw))):
            # It compares traced results with eager ones, and takes NaN for different from NaN.
            utilities.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(emulated, raw, test_utils=utilities)


@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_compiles_without_graph_breaks(case: OpCase) -> None:
    torch._dynamo.reset()
    emulated = emulated_operator(case.name)
    raw = case.raw(case.samples()[0])
    compiled = torch.compile(lambda *args: emulated(*args), fullgraph=True, backend="aot_eager")
    for got, want in zip(as_tuple(compiled(*raw)), as_tuple(emulated(*raw)), strict=True):
        assert torch.equal(got, want)


@on_gpu
def test_instructions_are_what_the_emulation_takes_them_for() -> None:
    done = subprocess.run([built("cuda_check_gpu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout


@on_gpu
@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_runs_in_a_graph(case: OpCase) -> None:
    gpu, results = Gpu(), list[Any]()
    call = gpu.bound(case, case.samples()[-1])
    replay = gpu.captured(lambda: results.append(call()))
    replay()
    for got, want in zip(as_tuple(results[-1]), as_tuple(call()), strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("case", COVERED, ids=lambda c: c.name)
def test_runs_where_its_operands_are(case: OpCase) -> None:
    """On another GPU than the current one, of torch and of the CUDA runtime."""
    sample = case.samples()[-1]
    got = Gpu("cuda:1").bound(case, sample)()
    want = Gpu("cuda:0").bound(case, sample)()
    for one, other in zip(as_tuple(got), as_tuple(want), strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.cpu().nan_to_num(), other.cpu().nan_to_num())


@pytest.mark.parametrize(
    ("case", "reject"),
    [
        pytest.param(c, r, id=f"{c.name}-{r.name}")
        for c in REFUSING
        for r in c.rejects()
        if not (r.of_values and c.name in UNSEEN)
    ],
)
def test_bad_input_is_refused_in_the_same_words(case: OpCase, reject: Reject, device: str) -> None:
    raw = case.raw(Sample(reject.name, reject.args, reject.kwargs))
    with pytest.raises(ValueError, match=f"^{case.name}: ") as error:
        overload(case.name, device)(*raw)
    assert reject.message in str(error.value)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 255, 256, 257, 4096])
def test_quantize_rows_equals_the_cpu_bit_for_bit(k: int, device: str) -> None:
    on_device = overload("quantize_rows", device)
    for dtype in EPS:
        x = (torch.randn(3, k) * torch.logspace(-6, 4, 3)[:, None]).to(dtype)
        for got, want in zip(on_device(x), openwork.quantize_rows(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("block", [2**i for i in range(16)])
def test_hadamard_equals_the_cpu_bit_for_bit(block: int, device: str) -> None:
    on_device = overload("hadamard", device)
    for dtype in EPS:
        x = torch.randn(2, 3 * max(block, 4)).to(dtype)
        assert torch.equal(on_device(x, block), openwork.ops.hadamard(x, block))
