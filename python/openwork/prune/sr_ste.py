"""SR-STE: fine-tuning that learns an N:M weight, the mask chosen anew at every step.

The weight ``W`` stays dense while it trains. With ``m`` the mask of its largest values::

    forward    y = x (W * m)^T
    backward   dL/dW <- dL/d(W * m) + decay (1 - m) * W

The gradient passes the mask as if it were not there ("straight through"), so that removed weights
can come back, and ``decay`` pulls them towards 0, so that the mask comes to rest.

The loss is the next token's cross entropy plus SquareHead: with ``h_l`` and ``t_l`` the residual
stream after layer ``l`` of the model and of a teacher, usually the dense model::

    loss = CE + mean over l of  |h_l - t_l|^2 / |t_l|^2

SR-STE: Zhou et al. 2021, arXiv 2102.04010. SquareHead: Kurtic et al. 2023, arXiv 2310.06927.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from openwork.ops import straight_through
from openwork.prune.magnitude import keep_largest, magnitude
from openwork.prune.masks import NM
from openwork.prune.report import LinearReport, describe
from openwork.prune.storage import install
from openwork.quant.calibration import check_dense

if TYPE_CHECKING:
    from openwork.models import Llama


class SrSteLinear(nn.Module):
    """``y = x (W * m)^T + bias + add`` with ``m`` chosen anew from ``|W|`` at every call.

    Args:
        linear: gives weight and bias; they are shared with it.
        pattern: of the mask.
        decay: see :func:`~openwork.ops.straight_through`.
    """

    def __init__(self, linear: nn.Linear, pattern: NM, decay: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.pattern, self.decay = pattern, decay

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x [..., k] -> [..., n]``; ``add`` has the shape of the result."""
        # Not ops.nm_linear_ste, which packs the weight anew for a product without zeros: on layers
        # of a small model that took longer (1536 x 576, 255 tokens, both ways: 19 ms for 17).
        keep = keep_largest(self.weight.detach(), self.pattern)
        y = F.linear(x, straight_through(self.weight, keep, self.decay), self.bias)
        return y if add is None else y + add


@dataclass(frozen=True)
class FineTuneReport:
    """What :func:`sr_ste` did.

    Attributes:
        losses: of each step, before its update.
        linears: the final weights against those before the training.
    """

    losses: tuple[float, ...]
    linears: tuple[LinearReport, ...]


def sr_ste(
    model: Llama,
    samples: Tensor,
    pattern: str | NM,
    *,
    steps: int,
    teacher: Llama | None = None,
    learning_rate: float = 1e-4,
    decay: float = 2e-4,
    batch: int = 1,
    warm_up: float = 0.1,
    progress: bool = True,
) -> FineTuneReport:
    """Fine-tune the linears of the layers to an N:M pattern, in place.

    Adam, at a rate that rises from 0 over the first steps and then falls linearly to 0. While it
    works it holds the dense model and, of the linears, the new weights, gradients and two moments.

    Args:
        model: dense; its embedding, norms and head do not change.
        samples: ``[samples, length]`` int64 token ids of text to train on, taken in order and again
            from the start.
        pattern: of the final weights, ``"N:M"`` or ``"V:N:M"``.
        steps: updates, 1 or more.
        teacher: the dense model, if ``model`` was pruned already (to its largest weights, which the
            first mask then keeps). None: ``model`` as it is.
        learning_rate: the highest.
        decay: what pulls removed weights towards 0.
        batch: samples of a step.
        warm_up: share of the steps in which the rate rises, 0 to 1.
        progress: show a progress bar with the loss.

    Returns:
        The losses and the change of every linear. The weights have exactly the pattern. If an error
        is raised, the model is as it was.

    Raises:
        ValueError: an option out of its range, tokens of another form, or a model that is not
            dense.
    """
    _check(model, samples, steps, batch, warm_up)
    pattern = NM.parse(pattern) if isinstance(pattern, str) else pattern
    if teacher is None:
        # A model of its own, on the same tensors.
        teacher = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with _trainable(model, pattern, decay) as weights:
        optimizer = torch.optim.Adam(weights.values(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate(step, steps, warm_up)
        )
        losses = []
        with torch.enable_grad(), Progress(disable=not progress) as bar:
            task = bar.add_task("training", total=steps)
            for step in range(steps):
                rows = torch.arange(step * batch, (step + 1) * batch) % len(samples)
                loss = _loss(model, teacher, samples[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update(task, advance=1, description=f"training: loss {losses[-1]:.3f}")
    reports = []
    for name, parent, attribute in model.linears():
        before = getattr(parent, attribute).weight
        pruned = magnitude(weights[name].detach(), pattern)
        install(parent, attribute, pruned)
        reports.append(describe(name, before, pruned, pattern, None))
    return FineTuneReport(tuple(losses), tuple(reports))


@contextmanager
def _trainable(model: Llama, pattern: NM, decay: float) -> Iterator[dict[str, nn.Parameter]]:
    """New weights by name that ``model`` runs on until the block ends."""
    linears = [(*place, getattr(*place[1:])) for place in model.linears()]
    weights = {}
    try:
        for name, parent, attribute, dense in linears:
            linear = SrSteLinear(dense, pattern, decay)
            linear.weight = nn.Parameter(dense.weight.detach().clone())
            weights[name] = linear.weight
            setattr(parent, attribute, linear)
        yield weights
    finally:
        for _, parent, attribute, dense in linears:
            setattr(parent, attribute, dense)


def _rate(step: int, steps: int, warm_up: float) -> float:
    """The learning rate of a step as a share of the highest; never 0 before the last step ended."""
    rising = warm_up * steps
    return min((step + 1) / (rising + 1), (steps - step) / max(steps - rising, 1))


def _loss(model: Llama, teacher: Llama, tokens: Tensor) -> Tensor:
    """Cross entropy plus SquareHead on ``tokens [b, t]``."""
    with torch.no_grad():
        wanted, _ = _states(teacher, tokens[:, :-1], logits=False)
    states, logits = _states(model, tokens[:, :-1], logits=True)
    distance = [
        (state - target).square().mean() / target.square().mean().clamp(min=1e-12)
        for state, target in zip(states, wanted, strict=True)
    ]
    entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    return entropy + torch.stack(distance).mean()


def _states(model: Llama, tokens: Tensor, *, logits: bool) -> tuple[list[Tensor], Tensor]:
    """The residual stream after each layer, and the logits if asked for, else the last state."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        states.append(output.float())

    with ExitStack() as hooks:
        for layer in model.layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        last = model(tokens) if logits else model.hidden(tokens)
    return states, last


def _check(model: Llama, samples: Tensor, steps: int, batch: int, warm_up: float) -> None:
    if steps < 1 or batch < 1 or not 0 <= warm_up <= 1:
        raise ValueError(
            "sr_ste: steps and batch of at least 1 and warm_up in 0 .. 1 expected, "
            f"got {steps}, {batch} and {warm_up}"
        )
    if samples.dim() != 2 or samples.dtype != torch.int64 or samples.shape[1] < 2:
        raise ValueError(
            "sr_ste: samples must be [samples, length >= 2] int64, "
            f"got {list(samples.shape)} {samples.dtype}"
        )
    if len(samples) == 0:
        raise ValueError("sr_ste: samples must be at least one, got none")
    check_dense("sr_ste", model)
