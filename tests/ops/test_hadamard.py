"""What is special about the Hadamard transform: its matrix, its inverse, its gradient."""

from __future__ import annotations

import pytest
import torch

import openwork
from openwork.ops import hadamard
from openwork.testing.hadamard import hadamard_matrix


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_reference_is_the_definition(block: int) -> None:
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    matrix = torch.tensor(signs, dtype=torch.float64) / block**0.5
    torch.testing.assert_close(hadamard_matrix(block), matrix)


@pytest.mark.parametrize("block", [2, 32, 256, 2048, 16384])
def test_integers_are_exact_and_it_is_its_own_inverse(isa: str, block: int) -> None:
    """Even powers of two divide by a power of two; sums of small integers are exact."""
    x = torch.randint(-8, 9, (3, block)).float()
    y = hadamard(x) * block**0.5
    if (block.bit_length() - 1) % 2 == 0:
        assert torch.equal(y, (x.double() @ hadamard_matrix(block) * block**0.5).float())
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiers_are_equal_to_the_bit(isa: str, dtype: torch.dtype) -> None:
    for d, block in ((48, 8), (96, 16), (768, 256), (2048, 2048), (65536, 32768)):
        x = torch.randn(3, d).to(dtype)
        y = hadamard(x, block)
        openwork.set_isa("scalar")
        assert torch.equal(y, hadamard(x, block))
        openwork.set_isa(isa)


def test_energy_stays_and_outliers_spread() -> None:
    x = torch.randn(16, 1024)
    x[:, 7] = 100.0
    y = hadamard(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert y.abs().max() < 10


def test_other_sizes_are_products_with_a_small_matrix() -> None:
    x = torch.randn(2, 3 * 8, dtype=torch.float32)
    small = torch.linalg.qr(torch.randn(3, 3)).Q.contiguous()
    y = small @ hadamard(x, 8).unflatten(-1, (3, 8))
    whole = torch.kron(small.double(), hadamard_matrix(8))
    torch.testing.assert_close(y.flatten(1), (x.double() @ whole.T).float())


def test_gradient_is_the_transform(isa: str) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    weight = torch.randn(3, 64)
    (grad,) = torch.autograd.grad((hadamard(x, 16) * weight).sum(), x, create_graph=True)
    assert torch.equal(grad, hadamard(weight, 16))
    squares = hadamard(x, 16).square().sum() / 2  # |x|^2 / 2, whose Hessian is the identity
    (first,) = torch.autograd.grad(squares, x, create_graph=True)
    (second,) = torch.autograd.grad((first * weight).sum(), x)
    torch.testing.assert_close(second, weight, rtol=1e-5, atol=1e-5)


def test_blocks_of_more_than_one_dimension_compile() -> None:
    torch._dynamo.reset()
    x = torch.randn(5, 128)
    compiled = torch.compile(lambda x: hadamard(x, 64) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), hadamard(x, 64) * 2)
