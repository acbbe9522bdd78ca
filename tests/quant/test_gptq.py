"""Invariants of GPTQ."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from openwork.quant import QuantizedTensor, gptq, rtn

K = 200  # groups of 128 and 64 leave a short last one; two blocks of 128, one short


def _case(seed: int, n: int = 24, k: int = K, tokens: int = 1000) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of strongly correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.02
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k) * 0.3
    inputs = torch.randn(tokens, k, generator=generator) @ mixing
    inputs[:, :5] *= 8
    return weight, inputs.t() @ inputs / tokens


def _output_error(weight: Tensor, q: QuantizedTensor, hessian: Tensor) -> float:
    error = (weight - q.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    if a.zeros is None or b.zeros is None:
        zeros = a.zeros is b.zeros
    else:
        zeros = torch.equal(a.zeros, b.zeros)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_order": False},
        {"act_order": False, "static_groups": False},
        {"search": True},
    ],
)
def test_identity_hessian_is_rtn_to_the_bit(
    bits: int, group_size: int | None, symmetric: bool, options: dict[str, Any]
) -> None:
    weight, _ = _case(1)
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    plain = rtn(weight, **grid, search=options.get("search", False))
    for scale in (1.0, 0.37):
        assert _same(gptq(weight, torch.eye(K) * scale, **grid, **options), plain)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_output_error_is_below_rtn(
    bits: int, group_size: int | None, symmetric: bool, act_order: bool
) -> None:
    for seed in range(3):
        weight, hessian = _case(seed)
        grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        ours = gptq(weight, hessian, **grid, act_order=act_order)
        limit = _output_error(weight, rtn(weight, **grid), hessian)
        assert _output_error(weight, ours, hessian) < 0.9 * limit


def test_late_grids_are_below_rtn_too() -> None:
    weight, hessian = _case(4)
    ours = gptq(weight, hessian, bits=3, group_size=32, act_order=False, static_groups=False)
    plain = rtn(weight, bits=3, group_size=32)
    assert not torch.equal(ours.scales, plain.scales)
    assert _output_error(weight, ours, hessian) < 0.9 * _output_error(weight, plain, hessian)


def test_static_grids_are_those_of_the_weight() -> None:
    weight, hessian = _case(5)
    ours = gptq(weight, hessian, bits=4, group_size=64)
    plain = rtn(weight, bits=4, group_size=64)
    assert torch.equal(ours.scales, plain.scales)
    assert ours.zeros is not None and plain.zeros is not None
    assert torch.equal(ours.zeros, plain.zeros)


def test_act_order_undoes_its_permutation() -> None:
    # The columns are worked on in the same order whatever order they arrive in, and one group a row
    # has the same grid, so the codes must come back permuted as the columns were.
    weight, hessian = _case(6)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    straight = gptq(weight, hessian, bits=3, group_size=None)
    shuffled = gptq(weight[:, order], hessian[order][:, order], bits=3, group_size=None)
    assert torch.equal(shuffled.codes, straight.codes[:, order])
    assert torch.equal(shuffled.scales, straight.scales)


def test_a_decreasing_diagonal_makes_act_order_a_no_op() -> None:
    weight, hessian = _case(7)
    order = hessian.diagonal().argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    grid = {"bits": 3, "group_size": 32}
    assert _same(gptq(weight, hessian, **grid), gptq(weight, hessian, **grid, act_order=False))


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = _case(9)
    # A power of two scales every intermediate result exactly.
    assert _same(
        gptq(weight, hessian, bits=4, group_size=64),
        gptq(weight, hessian * 1024, bits=4, group_size=64),
    )


def test_rows_are_independent() -> None:
    weight, hessian = _case(10)
    whole = gptq(weight, hessian, bits=4, group_size=64)
    part = gptq(weight[:8], hessian, bits=4, group_size=64)
    # Only the order of summation in the block products may differ.
    assert float((whole.codes[:8] != part.codes).float().mean()) < 0.01


@pytest.mark.parametrize("static_groups", [False, True])
def test_matches_the_column_by_column_definition(static_groups: bool) -> None:
    """Against float64 loops that follow the update formula one weight at a time."""
    n, k = 3, 104
    weight, hessian = _case(11, n, k)
    q = gptq(weight, hessian, bits=3, group_size=16, act_order=False, static_groups=static_groups)
    assert q.zeros is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(k).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = weight.double().clone()
    mismatches = 0
    for j in range(k):
        if j % 16 == 0:
            source = weight if static_groups else work.float()
            grid = rtn(source[:, j : j + 16], bits=3, group_size=None)
            # A late grid is that of the corrected weights, to the rounding of float32 sums.
            torch.testing.assert_close(q.scales[:, j // 16], grid.scales[:, 0], rtol=1e-3, atol=0)
        for i in range(n):
            scale, zero = float(q.scales[i, j // 16]), int(q.zeros[i, j // 16])
            code = min(max(round(float(work[i, j]) / scale) + zero, 0), 7)
            # Follow the implementation where float32 rounded a tie the other way.
            mismatches += code != int(q.codes[i, j])
            error = float(work[i, j]) - scale * (int(q.codes[i, j]) - zero)
            for later in range(j + 1, k):
                work[i, later] -= error / float(factor[j, j]) * float(factor[j, later])
    assert mismatches <= 1


def test_dead_columns_become_zero() -> None:
    weight, hessian = _case(12)
    dead = [0, 50, 199]
    hessian[dead] = 0
    hessian[:, dead] = 0
    q = gptq(weight, hessian, bits=4, group_size=64)
    assert bool((q.dequantize()[:, dead] == 0).all())
    # They take no part: the others are as if the dead columns had been 0 in the weight.
    zeroed = weight.clone()
    zeroed[:, dead] = 0
    assert _same(q, gptq(zeroed, hessian, bits=4, group_size=64))
    nothing = gptq(weight, torch.zeros(K, K), bits=4, group_size=64)
    assert bool((nothing.dequantize() == 0).all())


def test_a_singular_hessian_is_damped_until_it_factorises() -> None:
    weight, _ = _case(13)
    one = torch.ones(K, K)  # rank 1
    assert bool(torch.isfinite(gptq(weight, one, bits=4, group_size=64).dequantize()).all())
    # Slightly indefinite, as sums in float32 can be: 1 % is not enough, 10 % is.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(K, K, generator=generator).double()).Q
    eigenvalues = torch.linspace(-0.03, 2, K).double()
    hessian = (basis * eigenvalues) @ basis.t()
    ours = gptq(weight, hessian, bits=4, group_size=64)
    assert bool(torch.isfinite(ours.dequantize()).all())


def test_arguments_are_unchanged() -> None:
    weight, hessian = _case(14)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, bits=4, group_size=64)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


_EYE = torch.eye(64)
_LOPSIDED = _EYE.clone()
_LOPSIDED[0, 1] = 0.5
_NEGATIVE = _EYE.clone()
_NEGATIVE[3, 3] = -1


@pytest.mark.parametrize(
    ("hessian", "options", "message"),
    [
        (torch.eye(63), {}, "gptq: hessian must be [k, k] = [64, 64] float32 or float64"),
        (_EYE.half(), {}, "got [64, 64] torch.float16"),
        (_EYE * torch.nan, {}, "gptq: hessian must be finite"),
        (_LOPSIDED, {}, "gptq: hessian must be symmetric"),
        (_NEGATIVE, {}, "gptq: hessian must be positive semi-definite"),
        (1000 * torch.ones(64, 64) - 999.9 * torch.eye(64) * 2, {}, "positive semi-definite"),
        (_EYE, {"static_groups": False}, "gptq: act_order needs static_groups=True"),
        (_EYE, {"damping": 0.0}, "gptq: damping must be above 0, got 0.0"),
        (_EYE, {"bits": 6}, "gptq: bits must be one of 2, 3, 4, 8, got 6"),
        (_EYE, {"group_size": 48}, "gptq: group_size must be one of"),
    ],
)
def test_bad_arguments_are_named(hessian: Tensor, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"bits": 4, "group_size": 16} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        gptq(torch.ones(4, 64), hessian, **arguments)
