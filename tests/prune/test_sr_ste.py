"""SR-STE: its gradient, and that training ends in the exact pattern with a smaller loss."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openwork.models import DenseLinear, Llama
from openwork.ops import straight_through
from openwork.prune import NM, SrSteLinear, magnitude, prune_model, sr_ste
from openwork.prune.masks import follows

from .weights import model, rounding, tokens, weight


def _trained(**options: Any) -> tuple[Llama, tuple[float, ...]]:
    dense = model(layers=2)
    defaults: dict[str, Any] = {"steps": 20, "learning_rate": 3e-3, "batch": 2, "progress": False}
    report = sr_ste(dense, tokens(4, 24), NM(2, 4), **defaults | options)
    return dense, report.losses


@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_the_gradient(decay: float) -> None:
    w, x = weight(6, 16).requires_grad_(True), weight(9, 16, seed=1)
    target = weight(9, 6, seed=2)
    keep = magnitude(w.detach(), NM(2, 4)).keep
    ((x @ straight_through(w, keep, decay).t() - target) ** 2).sum().backward()
    masked = (w.detach() * keep).requires_grad_(True)
    ((x @ masked.t() - target) ** 2).sum().backward()
    assert w.grad is not None
    assert masked.grad is not None
    expected = masked.grad + decay * w.detach() * ~keep
    torch.testing.assert_close(w.grad, expected)
    # Kept weights see nothing of the decay; without it this is the straight-through estimator.
    assert torch.equal(w.grad[keep], masked.grad[keep])


def test_removed_weights_shrink_and_kept_ones_do_not() -> None:
    linear = DenseLinear(16, 6, bias=False)
    sparse = SrSteLinear(linear, NM(2, 4), decay=0.1)
    before = linear.weight.detach().clone()
    keep = magnitude(before, NM(2, 4)).keep
    optimizer = torch.optim.SGD([sparse.weight], lr=1.0)
    (sparse(torch.zeros(1, 16)) * 0).sum().backward()
    optimizer.step()
    after = linear.weight.detach()
    assert torch.equal(after[keep], before[keep])
    torch.testing.assert_close(after[~keep], before[~keep] * 0.9)


def test_a_removed_weight_comes_back_when_it_grows() -> None:
    linear = DenseLinear(4, 1, bias=False)
    sparse = SrSteLinear(linear, NM(2, 4), decay=0.0)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 2.0, 1.0, 0.5]]))
    assert sparse(torch.eye(4)).flatten().tolist() == [3.0, 2.0, 0.0, 0.0]
    with torch.no_grad():
        linear.weight[0, 3] = -5.0
    assert sparse(torch.eye(4)).flatten().tolist() == [3.0, 0.0, 0.0, -5.0]
    add = torch.ones(4, 1)
    assert torch.equal(sparse(torch.eye(4), add), sparse(torch.eye(4)) + 1)
    assert torch.equal(add, torch.ones(4, 1))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:2:4"])
def test_training_ends_in_the_pattern_and_the_loss_falls(pattern: str) -> None:
    dense, parsed = model(layers=2), NM.parse(pattern)
    original = model(layers=2)
    report = sr_ste(
        dense, tokens(4, 24), pattern, steps=20, learning_rate=3e-3, batch=2, progress=False
    )
    for name, _, _ in dense.linears():
        linear = dense.get_submodule(name)
        assert isinstance(linear, DenseLinear)
        assert follows(linear.weight != 0, parsed)
        assert not linear.weight.requires_grad
    first, last = sum(report.losses[:4]), sum(report.losses[-4:])
    assert last < 0.9 * first
    assert [linear.name for linear in report.linears] == [name for name, _, _ in dense.linears()]
    assert all(linear.sparsity == pytest.approx(0.5) for linear in report.linears)
    for name in ("embed.weight", "norm", "head.weight", "layers.1.attn_norm"):
        assert torch.equal(dense.state_dict()[name], original.state_dict()[name])


def test_the_loss_is_cross_entropy_and_square_head() -> None:
    dense, pruned, text = model(layers=2), model(layers=2), tokens(2, 24)
    prune_model(pruned, "magnitude", pattern="2:4", progress=False)
    states: dict[str, list[Tensor]] = {"dense": [], "pruned": []}
    for kind, one in (("dense", dense), ("pruned", pruned)):
        for layer in one.layers:
            layer.register_forward_hook(lambda *a, into=states[kind]: into.append(a[2].double()))
    logits = [one(text[:, :-1]) for one in (dense, pruned)][1]
    entropy = F.cross_entropy(logits.double().flatten(0, 1), text[:, 1:].flatten())
    pairs = list(zip(states["pruned"], states["dense"], strict=True))
    assert len(pairs) == 2
    distance = sum((h - t).square().sum() / t.square().sum() for h, t in pairs) / 2
    report = sr_ste(model(layers=2), text, "2:4", steps=1, batch=2, progress=False)
    assert report.losses[0] == pytest.approx(float(entropy + distance), rel=rounding(dense))


def test_training_beats_pruning_alone() -> None:
    text, dense = tokens(4, 24), model(layers=2)
    expected = dense(text)
    trained, _ = _trained()
    prune_model(dense, "magnitude", pattern="2:4", progress=False)
    entropy = [
        float(F.cross_entropy(m(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
        for m in (trained, dense)
    ]
    assert expected.isfinite().all()
    assert entropy[0] < entropy[1]


def test_a_pruned_model_follows_the_dense_one() -> None:
    text, teacher, pruned = tokens(4, 24), model(layers=2), model(layers=2)
    prune_model(pruned, "sparsegpt", pattern="2:4", calibration=text, progress=False)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    options: dict[str, Any] = {"steps": 20, "learning_rate": 3e-3, "progress": False}
    report = sr_ste(pruned, text, NM(2, 4), teacher=teacher, **options)
    # The first mask is the one it came with, and its distance to the teacher counts.
    alone = model(layers=2)
    prune_model(alone, "sparsegpt", pattern="2:4", calibration=text, progress=False)
    assert report.losses[0] > sr_ste(alone, text, NM(2, 4), **options).losses[0]
    assert sum(report.losses[-4:]) < sum(report.losses[:4])
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_training_repeats() -> None:
    (first, losses), (second, again) = _trained(steps=3), _trained(steps=3)
    assert losses == again
    assert torch.equal(first(tokens()), second(tokens()))


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model(layers=2)
    before = dense(tokens())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        sr_ste(dense, tokens(), NM(2, 4), steps=2, progress=False)
    assert torch.equal(dense(tokens()), before)
    assert not any(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "sr_ste: steps and batch of at least 1 and warm_up in 0 .. 1 expected"),
        ({"batch": 0}, "got 20, 0 and 0.1"),
        ({"warm_up": 2.0}, "got 20, 2 and 2.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _trained(**options)


def test_bad_samples_are_named() -> None:
    for samples, message in (
        (tokens()[:, :1], "samples must be [samples, length >= 2] int64, got [6, 1] torch.int64"),
        (tokens().int(), "torch.int32"),
        (tokens()[:0], "samples must be at least one, got none"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sr_ste(model(), samples, NM(2, 4), steps=1, progress=False)
