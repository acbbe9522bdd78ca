"""Sparse linear modules: sums of terms, and training restricted to a support."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import openwork
from openwork.nn import (
    ActiveLinear,
    LowbitLinear,
    LowRankLinear,
    SparseLinear,
    SparseLowRankLinear,
    SumLinear,
)
from openwork.ops import sparse_linear_train, sparse_values_grad, transposed_pattern
from openwork.packing import SPARSE_LAYOUTS
from openwork.testing.active import make_column_weight
from openwork.testing.sparse import make_sparse_weight

N, K = 48, 130


def _sparse(density: float = 0.3) -> openwork.SparseWeight:
    return make_sparse_weight(N, K, density, torch.float32)


def _close(y: Tensor, want: Tensor) -> None:
    """Within fp32 rounding: n eps for the n terms of two sums, whose parts stay below 10."""
    eps = 2.0**-24 * (N + K)
    torch.testing.assert_close(y.double(), want.double(), rtol=eps, atol=10 * eps)


def test_sparse_linear_is_its_weight_and_bias() -> None:
    weight, bias, x = _sparse(), torch.randn(N), torch.randn(2, 3, K)
    module = SparseLinear(weight, bias)
    assert (module.in_features, module.out_features) == (K, N)
    assert not module.state_dict().keys() - {"bias"}
    _close(module(x), x @ openwork.expand_sparse(weight).T + bias)
    add = torch.randn(2, 3, N)
    _close(module(x, add), module(x) + add)
    assert "density=0." in repr(module)


def test_block_sparse_linear_is_its_weight() -> None:
    dense = torch.randn(N, K)
    weight = openwork.compress_block_sparse(dense, block=16)
    x = torch.randn(5, K)
    _close(SparseLinear(weight)(x), x @ dense.T)


def test_active_linear_skips_small_activations() -> None:
    dense, x = torch.randn(N, K), torch.randn(K)
    module = ActiveLinear(openwork.pack_columns(dense), 0.6)
    _close(module(x), dense @ torch.where(x.abs() > 0.6, x, 0.0))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "w3"])
def test_active_linear_of_many_rows_is_the_same_product(kind: str) -> None:
    """Also at thresholds that some elements equal, and with NaN, which is active."""
    weight = make_column_weight(N, K, kind, 32, symmetric=False)
    bias, x = torch.randn(N), torch.randn(40, K).mul(4).round().div(4)
    module = ActiveLinear(weight, 0.75, bias)
    add = torch.randn(40, N)
    rows = torch.cat([module(row[None], add=a[None]) for row, a in zip(x, add, strict=True)])
    kept = add.clone()
    many = module(x, add=add)
    assert torch.equal(add, kept)
    size = x.abs() @ openwork.unpack_columns(weight).float().abs().T + bias.abs() + add.abs()
    assert ((many - rows).abs() <= 2 * 2.0**-24 * (K + 4) * size).all()
    x[3, 5] = torch.nan
    assert module(x)[3].isnan().all()
    assert not module(x)[4].isnan().any()


def test_quantized_and_sparse_outliers() -> None:
    """SpQR: the largest weights are kept apart, the rest is quantized without them."""
    dense = torch.randn(N, K)
    dense[::5, ::7] *= 20.0
    outliers = dense.abs() > 6.0
    q = openwork.quant.rtn(torch.where(outliers, 0.0, dense), bits=4, group_size=32)
    packed = openwork.pack_lowbit(q.codes, q.scales, q.zeros, bits=4, group_size=32)
    remainder = torch.where(outliers, dense - q.dequantize(), 0.0)
    module = SumLinear(
        [LowbitLinear(packed, compute="float"), SparseLinear(openwork.compress_sparse(remainder))]
    )
    x = torch.randn(7, K)
    _close(module(x), x @ (q.dequantize() + remainder).T)
    plain = openwork.quant.rtn(dense, bits=4, group_size=32).dequantize()
    assert (module(x) - x @ dense.T).norm() < 0.5 * (x @ (plain - dense).T).norm()


def test_sparse_and_low_rank() -> None:
    weight, up, down = _sparse(), torch.randn(N, 4), torch.randn(4, K)
    module = SumLinear([SparseLinear(weight), LowRankLinear(up, down, 0.5)])
    for x in (torch.randn(7, K), torch.randn(K), torch.randn(2, 3, K)):
        _close(module(x), x @ (openwork.expand_sparse(weight) + 0.5 * up @ down).T)


def test_dense_and_sparse_delta() -> None:
    """DARE: a tenth of a fine-tuned model's difference, ten times as large."""
    base = torch.nn.Linear(K, N)
    delta = 0.01 * torch.randn(N, K)
    kept = torch.rand(N, K) < 0.1
    module = SumLinear([base, SparseLinear(openwork.compress_sparse(10 * delta, kept))])
    x = torch.randn(7, K)
    with torch.no_grad():
        _close(module(x), base(x) + x @ (10 * delta * kept).T)


def test_a_sum_adds_its_own_add_once() -> None:
    module = SumLinear([SparseLinear(_sparse()), SparseLinear(_sparse(0.1))])
    x, add = torch.randn(3, K), torch.randn(3, N)
    _close(module(x, add=add), module(x) + add)


def test_a_sum_needs_a_term() -> None:
    with pytest.raises(ValueError, match="^SumLinear: terms must hold at least one module"):
        SumLinear([])


def test_sum_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    module = SumLinear(
        [SparseLinear(_sparse()), LowRankLinear(torch.randn(N, 2), torch.ones(2, K))]
    )
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_few_elements_are_stored_with_a_byte_each() -> None:
    """As many or fewer than an eighth, where that takes less than a bit an element."""
    weight = torch.zeros(64, 256)
    weight.view(-1)[::8] = 1.0
    assert openwork.compress_sparse(weight).layout == "bytes_n16k256@1"
    weight[0, 1] = 1.0
    assert openwork.compress_sparse(weight).layout == "bitmask_n16k64@1"
    with pytest.raises(ValueError, match="^compress_sparse: layout must be bitmask_.*, got csr"):
        openwork.compress_sparse(weight, layout="csr")


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
def test_transposed_pattern_finds_every_value(layout: str) -> None:
    weight = make_sparse_weight(N, K, 0.3, torch.float32, layout=layout)
    transposed, order = transposed_pattern(weight)
    assert torch.equal(openwork.expand_sparse(transposed), openwork.expand_sparse(weight).T)
    assert sorted(order.tolist()) == list(range(len(weight.values)))


@pytest.mark.parametrize("layout", SPARSE_LAYOUTS)
@pytest.mark.parametrize("m", [1, 20])
def test_gradients_are_the_dense_ones_on_the_support(
    isa: str, threads: int, m: int, layout: str
) -> None:
    weight = make_sparse_weight(N, K, 0.3, torch.float32, layout=layout)
    dense = openwork.expand_sparse(weight).requires_grad_()
    mask = dense.detach() != 0
    x = torch.randn(m, K, requires_grad=True)
    g = torch.randn(m, N)
    (x @ dense.T).backward(g)
    want_x, want_w = x.grad, dense.grad
    assert want_x is not None
    assert want_w is not None
    x.grad = None
    values = weight.values.clone().requires_grad_()
    sparse_linear_train(x, values, weight, *transposed_pattern(weight)).backward(g)
    assert x.grad is not None
    assert values.grad is not None
    _close(x.grad, want_x)
    assert (values.grad[weight.nnz :] == 0).all()
    grad = openwork.SparseWeight(
        weight.index, weight.offsets, values.grad, None, weight.layout, N, K
    )
    _close(openwork.expand_sparse(grad), want_w * mask)


def test_gradient_check_in_small() -> None:
    """Finite differences of the product, which is linear in x and in the values."""
    weight = make_sparse_weight(5, 9, 0.5, torch.float32)
    pattern = transposed_pattern(weight)
    x, g = torch.randn(3, 9), torch.randn(3, 5)

    def loss(values: Tensor) -> Tensor:
        return (sparse_linear_train(x, values, weight, *pattern) * g).sum()

    grad = sparse_values_grad(g, x, weight)
    # Two losses, sums of 9 and then of 15 terms; the step adds 1 to one weight.
    size = ((x.abs() @ (openwork.expand_sparse(weight).abs() + 1).T) * g.abs()).sum()
    for i in range(weight.nnz):
        step = torch.zeros_like(weight.values)
        step[i] = 1.0
        slope = loss(weight.values + step) - loss(weight.values)
        assert abs(slope - grad[i]) <= 2 * (9 + 15) * 2.0**-24 * size


def test_sparse_low_rank_layer_learns_on_its_support() -> None:
    layer = SparseLowRankLinear.random(K, N, rank=4, density=0.1)
    target = torch.randn(N, K) / K**0.5
    before = layer.values.detach().clone()
    index = layer.sparse_weight().index.clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        x = torch.randn(64, K)
        loss = (layer(x) - x @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = layer.sparse_weight()
    assert torch.equal(after.index, index)
    assert (after.values[after.nnz :] == 0).all()
    assert not torch.equal(after.values, before)


def test_sparse_low_rank_layer_is_the_sum_of_its_weights() -> None:
    layer = SparseLowRankLinear.random(K, N, rank=4, density=0.1, alpha=8.0)
    with torch.no_grad():
        layer.up.normal_()
        w = 2.0 * layer.up @ layer.down + openwork.expand_sparse(layer.sparse_weight())
        x = torch.randn(2, 3, K)
        _close(layer(x), x @ w.T)
    _close(layer(x).detach(), x @ w.T)
    add = torch.randn(2, 3, N)
    _close(layer(x, add=add).detach(), x @ w.T + add)
    assert "rank=4" in repr(layer)


def test_sparse_low_rank_gradients_are_those_of_the_dense_weight() -> None:
    """SLTrain: dB = c G A^T, dA = c B^T G, and G on the support, with G = dL/dW."""
    layer = SparseLowRankLinear.random(K, N, rank=4, density=0.1, alpha=8.0)
    torch.nn.init.normal_(layer.up)
    x, g = torch.randn(7, K, requires_grad=True), torch.randn(7, N)
    layer(x).backward(g)
    assert x.grad is not None
    assert layer.values.grad is not None
    sparse = openwork.expand_sparse(layer.sparse_weight())
    with torch.no_grad():
        dense = 2.0 * layer.up @ layer.down + sparse
        _close(x.grad, g @ dense)
        full = g.T @ x
        _close(layer.up.grad, 2.0 * full @ layer.down.T)
        _close(layer.down.grad, 2.0 * layer.up.T @ full)
        grad = replace(layer.sparse_weight(), values=layer.values.grad)
        _close(openwork.expand_sparse(grad), full * (sparse != 0))


def test_sparse_low_rank_layer_keeps_no_dense_weight() -> None:
    n, k = 400, 600
    layer = SparseLowRankLinear.random(k, n, rank=4)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, k))
    assert saved
    assert max(saved) < n * k / 10
    held = [*layer.parameters(), *layer.buffers()]
    assert max(tensor.numel() for tensor in held) < n * k / 10
    assert layer.sparse_weight().nnz == round(0.03 * n * k)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_extremes_of_the_support(density: float) -> None:
    layer = SparseLowRankLinear.random(5, 3, rank=1, density=density)
    assert layer.sparse_weight().nnz == round(density * 15)
    layer(torch.ones(2, 5)).sum().backward()


def test_the_support_is_saved_and_repeats() -> None:
    def layer(seed: int) -> SparseLowRankLinear:
        generator = torch.Generator().manual_seed(seed)
        return SparseLowRankLinear.random(K, N, rank=2, density=0.1, generator=generator)

    first, again, second = layer(5), layer(5), layer(6)
    x = torch.randn(4, K)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first.sparse_weight().index, second.sparse_weight().index)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    for module in (first, second):
        module(x).square().sum().backward()
    assert first.values.grad is not None
    assert torch.equal(first.values.grad, second.values.grad)


def test_sparse_low_rank_refuses() -> None:
    with pytest.raises(ValueError, match="expected, got 4, 4, 0 and 0.03"):
        SparseLowRankLinear.random(4, 4, rank=0)
    with pytest.raises(ValueError, match=r"density in 0 \.\. 1 expected, got 4, 4, 1 and 1\.5"):
        SparseLowRankLinear.random(4, 4, rank=1, density=1.5)
    with pytest.raises(
        ValueError, match=r"of S, \[48, 130\], expected, got \[48, 2\] and \[3, 130\]"
    ):
        SparseLowRankLinear(torch.zeros(N, 2), torch.zeros(3, K), _sparse())
    half = make_sparse_weight(N, K, 0.3, torch.bfloat16)
    with pytest.raises(ValueError, match="S must hold float32 values without scales, got torch.bf"):
        SparseLowRankLinear(torch.zeros(N, 2), torch.zeros(2, K), half)


def test_training_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    layer = SparseLowRankLinear.random(K, N, rank=4, density=0.1)
    x = torch.randn(6, K)
    layer(x).square().sum().backward()
    assert layer.values.grad is not None
    want = layer.values.grad.clone()
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, want)
