"""Arrays of other libraries through DLPack, and other libraries' sparse products.

CuPy and a GPU, or numpy and the emulation: the protocol is the same.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import openwork
from bench.gpu import Gpu, has_kernel, missing
from openwork.testing import CASES, OpCase, Sample

EMULATED = Path(openwork.__file__).with_name("openwork_emulated.so")


def _case(name: str) -> OpCase:
    return next(case for case in CASES if case.name == name)


def _needs_gpu(*packages: str) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(params=("numpy", "cupy"))
def arrays(request: pytest.FixtureRequest) -> Any:
    """The module whose arrays are handed over."""
    if request.param == "cupy":
        _needs_gpu("cupy")
    elif not EMULATED.is_file():
        pytest.skip("built without OPENWORK_CUDA_EMULATION")
    return importlib.import_module(request.param)


def _place(arrays: Any) -> Gpu:
    if arrays.__name__ == "cupy":
        return Gpu()
    torch.ops.load_library(str(EMULATED))
    return Gpu("cpu", torch.ops.openwork_emulated)


def _pointer(array: Any) -> int:
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_are_transformed_where_they_lie(arrays: Any, dtype: str) -> None:
    x = arrays.linspace(-3, 3, 5 * 64).reshape(5, 64).astype(dtype)
    tensor = torch.from_dlpack(x)
    assert tensor.data_ptr() == _pointer(x)
    result = _place(arrays).bound(_case("hadamard"), Sample("", (tensor, 64)))()
    y = arrays.from_dlpack(result)
    assert _pointer(y) == result.data_ptr()
    want = openwork.ops.hadamard(tensor.cpu(), 64)
    assert torch.equal(torch.from_dlpack(y).cpu(), want)


def test_strided_arrays_are_read_in_order(arrays: Any) -> None:
    whole = arrays.arange(64 * 3, dtype="float32").reshape(64, 3)
    turned = torch.from_dlpack(whole).T
    place = _place(arrays)
    got = place.bound(_case("hadamard"), Sample("", (turned, 16)))()
    want = place.bound(_case("hadamard"), Sample("", (turned.contiguous(), 16)))()
    assert torch.equal(got, want)


def test_calls_run_on_the_stream_of_torch() -> None:
    _needs_gpu("cupy")
    import cupy

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), cupy.cuda.ExternalStream(stream.cuda_stream):
        x = cupy.ones((4096, 4096), "float32")
        for _ in range(20):
            x += 1  # the transform must wait for these
        y = openwork.ops.hadamard(torch.from_dlpack(x), 16)
        right = (cupy.from_dlpack(y)[:, ::16] == 21 * 4).all()
    stream.synchronize()
    assert bool(right)


def _two_of_four(n: int, k: int) -> torch.Tensor:
    weight = torch.randn(n, k, dtype=torch.float16)
    return weight * openwork.ops.nm_mask(weight, (2, 4))


def _ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """nm_linear on the GPU, from and to the CPU."""
    if not has_kernel("nm_linear"):
        pytest.skip("nm_linear has no kernel for GPUs")
    sparse = openwork.compress_nm(weight.bfloat16(), (2, 4), mask=weight != 0)
    y = Gpu().bound(_case("nm_linear"), Sample("", (x.bfloat16(), sparse)))()
    assert isinstance(y, torch.Tensor)
    return y.cpu().float()


def _same_product(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of operands rounded to bfloat16 and float16: 2**-9 each, of k terms whose errors average."""
    difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert difference <= 2.0**-7


def test_product_is_that_of_cusparselt() -> None:
    _needs_gpu()
    if not torch.backends.cusparselt.is_available():
        pytest.skip("torch has no cuSPARSELt")
    x, weight = torch.randn(64, 256, dtype=torch.float16), _two_of_four(128, 256)
    compressed = torch._cslt_compress(weight.cuda())
    theirs = torch._cslt_sparse_mm(compressed, x.cuda().T).T
    _same_product(_ours(x, weight), theirs.cpu())


def test_product_is_that_of_torch_semi_structured() -> None:
    _needs_gpu()
    x, weight = torch.randn(64, 256, dtype=torch.float16), _two_of_four(128, 256)
    theirs = torch.nn.functional.linear(
        x.cuda(), torch.sparse.to_sparse_semi_structured(weight.cuda())
    )
    _same_product(_ours(x, weight), theirs.cpu())


def test_product_is_that_of_cusparse() -> None:
    _needs_gpu("cupy", "cupyx")
    pytest.importorskip("cupyx.cusparse", exc_type=ImportError)
    import cupy
    from cupyx.scipy.sparse import csr_matrix

    x, weight = torch.randn(64, 256, dtype=torch.float16), _two_of_four(128, 256)
    matrix = csr_matrix(cupy.asarray(weight.float().numpy()))
    theirs = (matrix @ cupy.asarray(x.float().numpy().T.copy())).T
    _same_product(_ours(x, weight), torch.from_numpy(cupy.asnumpy(theirs)))
