"""What is special about N:M weights: masks, the training form, modules, and sizes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import openwork
from openwork.ops import nm_linear_ste, nm_mask
from openwork.testing.nm import make_weight


def _problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(5, 40, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 40, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(5, 12, dtype=dtype)


@pytest.mark.parametrize("vector", [1, 8, 16])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (5, 32)])
def test_mask_keeps_the_largest(pattern: tuple[int, int], vector: int) -> None:
    kept, block = pattern
    weight = torch.randn(20, 70)
    mask = nm_mask(weight, pattern, vector=vector)
    size = torch.zeros(-(-20 // vector) * vector, 70)
    size[:20] = weight.square()
    for rows, shared in zip(mask.split(vector), size.split(vector), strict=True):
        assert (rows == rows[0]).all()
        total = shared.sum(0)
        for first in range(0, 70, block):
            chosen = rows[0, first : first + block]
            sums = total[first : first + block]
            assert chosen.sum() == min(kept, len(chosen))
            if not chosen.all():
                assert sums[chosen].min() >= sums[~chosen].max()
    openwork.compress_nm(weight, pattern, mask=mask, vector=vector)


def test_mask_keeps_the_first_of_equals() -> None:
    assert nm_mask(torch.ones(1, 8), (2, 4)).int().tolist() == [[1, 1, 0, 0] * 2]


@pytest.mark.parametrize(
    ("weight", "pattern", "vector", "message"),
    [
        (torch.ones(4), (2, 4), 1, "nm_mask: weight must be [n, k], got [4]"),
        (torch.ones(4, 4), (4, 4), 1, "pattern must be N:M with 1 <= N < M, got 4:4"),
        (torch.ones(4, 4), (2, 4), 0, "vector must be at least 1, got 0"),
    ],
)
def test_mask_refuses(weight: Tensor, pattern: tuple[int, int], vector: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        nm_mask(weight, pattern, vector=vector)


@pytest.mark.parametrize("vector", [1, 8])
def test_forward_is_the_masked_product(vector: int) -> None:
    x, weight, _ = _problem()
    y = nm_linear_ste(x, weight, (2, 4), vector=vector)
    masked = weight * nm_mask(weight, (2, 4), vector=vector)
    torch.testing.assert_close(y, x @ masked.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.5])
def test_gradients_are_those_of_the_formula(decay: float, dtype: torch.dtype) -> None:
    x, weight, grad = _problem(dtype)
    nm_linear_ste(x, weight, (2, 4), decay=decay).backward(grad)
    mask = nm_mask(weight.detach(), (2, 4))
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, grad @ (weight * mask).detach())
    straight_through = grad.T @ x.detach()
    # Kept weights get the plain gradient, to the bit; masked ones are pulled to zero.
    assert torch.equal(weight.grad[mask], straight_through[mask])
    pull = (weight.grad - straight_through)[~mask]
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(pull, decay * weight.detach()[~mask], **tolerance)


def test_masked_weights_shrink_and_the_others_stay() -> None:
    weight = torch.randn(8, 16, requires_grad=True)
    mask = nm_mask(weight.detach(), (2, 4))
    before = weight.detach().clone()
    for _ in range(10):
        weight.grad = None
        nm_linear_ste(torch.zeros(2, 16), weight, (2, 4), decay=0.1).sum().backward()
        assert weight.grad is not None
        with torch.no_grad():
            weight -= weight.grad
    assert torch.equal(weight[mask], before[mask])
    torch.testing.assert_close(weight[~mask], before[~mask] * 0.9**10)


def test_only_what_is_needed_is_differentiated() -> None:
    x, weight, grad = _problem()
    nm_linear_ste(x.detach(), weight).backward(grad)
    assert x.grad is None
    assert weight.grad is not None


# torch's tracer instantiates every autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_training_compiles() -> None:
    torch._dynamo.reset()
    x, weight, grad = _problem()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return (nm_linear_ste(x, weight, (2, 4)) * grad).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for fn in (loss, compiled):
        x.grad = weight.grad = None
        fn(x, weight).backward()
        grads.append((x.grad, weight.grad))
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 4), torch.ones(4, 4).double(), "must both be float32 or both bfloat16"),
        (torch.ones(1, 4), torch.ones(4, 4).bfloat16(), "must both be float32 or both bfloat16"),
        (torch.ones(1, 4), torch.ones(4), "weight must be [n, k], got [4]"),
        (torch.ones(4), torch.ones(4, 4), "x must have at least two dimensions, got [4]"),
    ],
)
def test_training_form_refuses(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^nm_linear_ste: .*{re.escape(message)}"):
        nm_linear_ste(x, weight)


@pytest.mark.parametrize(
    ("dtype", "vector", "bits"),
    # N / M * (value + log2(M) / V) bits a weight of 4096 x 4096, and scales of 16 bits for 128.
    [("float32", 1, 17), ("bfloat16", 1, 9), ("int8", 1, 5.125), ("int4", 1, 3.125),
     ("int4", 16, 2.1875), ("int4", 32, 2.15625)],
)  # fmt: skip
def test_bytes_are_what_the_format_says(dtype: str, vector: int, bits: float) -> None:
    weight = make_weight(512, 512, (2, 4), dtype, vector=vector)
    assert weight.nbytes == 512 * 512 * bits / 8


def test_module_is_the_operator() -> None:
    weight = make_weight(48, 64, (2, 4), "int8")
    bias, x, add = torch.randn(48), torch.randn(3, 64), torch.randn(3, 48)
    module = openwork.nn.NmLinear(weight, bias, compute="int8")
    assert (module.in_features, module.out_features) == (64, 48)
    expected = openwork.nm_linear(x, weight, bias, add, compute="int8")
    assert torch.equal(module(x, add), expected)
    assert not any(name.endswith(("values", "index")) for name in module.state_dict())
    assert "pattern=2:4" in repr(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_unknown_compute_is_refused() -> None:
    weight = make_weight(16, 64, (2, 4), "int8")
    with pytest.raises(ValueError, match="nm_linear: compute must be 'float' or 'int8', got 'f'"):
        openwork.nm_linear(torch.ones(1, 64), weight, compute="f")  # type: ignore[arg-type]


def test_layouts_of_other_families_are_refused() -> None:
    weight = make_weight(16, 64, (2, 4), "int8")
    with pytest.raises(ValueError, match="NmWeight: layout must be one of nm4_n16k8@1, "):
        replace(weight, layout="w8_n32k4@1")
    tensors = (weight.values, weight.index, weight.scales)
    for layout in (-1, 0, 99):
        with pytest.raises(ValueError, match=f"expand_nm: layout must be .* got id {layout}; "):
            torch.ops.openwork.expand_nm(*tensors, layout, 16, 64, 2, 4, 1, 128)
