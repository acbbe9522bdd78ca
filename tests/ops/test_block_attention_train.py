"""Training through block attention: with an index, in parts that are merged, and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openwork.attention import causal_index, vertical_slash_index
from openwork.ops import block_attention_train


def _operands(n: int = 90, h: int = 4, g: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, n, h, 32), (1, n, g, 32), (1, n, g, 32))
    q, k, v = (torch.randn(shape).requires_grad_() for shape in shapes)
    return q, k, v


def _grads(total: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("listed", [False, True])
def test_dense_gradients_are_those_of_torch(listed: bool) -> None:
    inputs = q, k, v = _operands()
    g = torch.randn(1, 90, 4, 32)
    index = causal_index([90], block_m=32, block_n=16) if listed else None
    got = _grads((block_attention_train(q, k, v, index) * g).sum(), inputs)
    turned = (x.transpose(1, 2) for x in inputs)
    o = scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)
    for mine, theirs in zip(got, _grads((o * g).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_gradients_are_as_close_as_those_of_torch(isa: str) -> None:
    q, k, v = (x.bfloat16().detach().requires_grad_() for x in _operands(n=300))
    g = torch.randn(1, 300, 4, 32).bfloat16()

    def dense(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        turned = (x.transpose(1, 2) for x in inputs)
        o = scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
        return _grads((o.transpose(1, 2) * g.to(o.dtype)).sum(), tuple(inputs))

    exact = dense([x.detach().double().requires_grad_() for x in (q, k, v)])
    mine = _grads((block_attention_train(q, k, v) * g).sum(), (q, k, v))
    for ours, theirs, want in zip(mine, dense([q, k, v]), exact, strict=True):
        assert (ours.double() - want).norm() <= 1.05 * (theirs.double() - want).norm()


def test_keys_that_are_not_listed_get_no_gradient() -> None:
    inputs = q, k, v = _operands()
    index = vertical_slash_index(
        q.detach(), k.detach(), 6, 8, probes=16, sinks=2, window=2, block_m=16, block_n=16
    )
    (mask,) = index.to_mask([90], [90])
    o = block_attention_train(q, k, v, index)
    read = (mask & torch.ones(90, 90, dtype=torch.bool).tril())[:, -16:].any(1)  # [heads, keys]
    _, grad_k, grad_v = _grads(o[:, -16:].sum(), inputs)
    for grad in (grad_k, grad_v):
        touched = (grad[0] != 0).any(-1).T  # [kv_heads, keys]
        assert not (touched & ~read.view(2, 2, 90).any(1)).any()
    assert not read.all()


def test_gradients_pass_through_the_parts_of_a_merge() -> None:
    inputs = q, k, v = _operands()
    g = torch.randn(1, 90, 4, 32)
    near, lse_near = block_attention_train(q, k, v, window=20, return_lse=True)
    far, lse_far = block_attention_train(q, k, v, min_distance=20, return_lse=True)
    # The first 20 queries have no far keys, and a weight of 0 for them.
    share = torch.sigmoid(lse_near - lse_far)[..., None]
    merged = share * near + (1 - share) * far
    got = _grads((merged * g).sum(), inputs)
    want = _grads((block_attention_train(q, k, v) * g).sum(), inputs)
    for mine, whole in zip(got, want, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_training_step_compiles() -> None:
    torch._dynamo.reset()
    q, k, v = _operands(n=40)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = block_attention_train(q, k, v, window=16, sinks=2)
        assert isinstance(o, Tensor)
        return o.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, want in zip(
        _grads(compiled(q, k, v), (q, k, v)), _grads(loss(q, k, v), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(mine, want)
