"""EvoPress: how much of each linear to remove, by evolution.

The total is given; which linears give more and which less is searched. Every linear has a few
levels of sparsity, equally far apart, and its weight at each is made once. A candidate is a level
for every linear. In every generation the best candidate so far has offspring::

    mutation      one linear a level up, another of the same size a level down: the total stays
    flips         of them at a time: the smaller of two draws from 1, 2, 3
    fitness       KL from the dense model on sample text, lower is better, run without zeros
    tournament    all offspring on little text, the best few on more, they and the parent on all

The last stage always has the same text, and the parent in it, so fitness never rises.

Sieberling et al. 2024, arXiv 2410.14649.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from openwork.prune.masks import Unstructured
from openwork.prune.methods import METHODS, Method
from openwork.prune.storage import sparse_module
from openwork.quant.calibration import InputSecondMoment, calibrate, check_dense

if TYPE_CHECKING:
    from openwork.models import Llama

Levels = tuple[int, ...]


@dataclass(frozen=True)
class Stage:
    """One round of a tournament.

    Attributes:
        samples: of the sample text, from the first on.
        survivors: candidates that go on; 1 in the last stage.
    """

    samples: int
    survivors: int


@dataclass(frozen=True)
class Allocation:
    """What :func:`evopress` found.

    Attributes:
        sparsity: by the name of the linear, for :func:`~openwork.prune.prune_model`.
        fitness: KL of the best candidate before the first and after every generation, nats a token.
    """

    sparsity: dict[str, float]
    fitness: tuple[float, ...]


def search(
    sizes: Sequence[Hashable],
    start: Levels,
    highest: int,
    fitness: Callable[[Levels, int], float],
    *,
    stages: Sequence[Stage],
    generations: int,
    offspring: int,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Levels, tuple[float, ...]]:
    """Search levels of least fitness whose sum over the units of each size is that of ``start``.

    Args:
        sizes: of the units; levels are traded between units of the same size.
        start: the first candidate, a level 0 .. ``highest`` for each unit.
        highest: level.
        fitness: of a candidate on the first so many samples; the same for the same arguments.
        stages: of the tournament, the last with one survivor.
        generations: how often the best has offspring.
        offspring: in each.
        seed: of the mutations.
        progress: show a progress bar with the fitness.

    Returns:
        The best candidate, and its fitness on the last stage's samples before the first generation
        and after each; it never rises.

    Raises:
        ValueError: sizes, levels or stages that do not fit.

    Example:
        >>> wanted = (0, 2, 1, 1)
        >>> far = lambda levels, samples: sum(abs(a - b) for a, b in zip(levels, wanted))
        >>> search([5, 5, 7, 7], (1, 1, 1, 1), 2, far, stages=[Stage(1, 1)], generations=9,
        ...        offspring=4, progress=False)[0]
        (0, 2, 1, 1)
    """
    _check_search(sizes, start, highest, stages, generations, offspring)
    generator = random.Random(seed)
    samples = stages[-1].samples
    best, score = start, fitness(start, samples)
    history = [score]
    with Progress(disable=not progress) as bar:
        task = bar.add_task("evolution", total=generations)
        for _ in range(generations):
            children = [_mutate(best, sizes, highest, generator) for _ in range(offspring)]
            candidates = list(dict.fromkeys(child for child in children if child != best))
            for stage in stages[:-1]:
                scored = [(fitness(levels, stage.samples), levels) for levels in candidates]
                candidates = [levels for _, levels in sorted(scored)[: stage.survivors]]
            for levels in candidates:
                value = fitness(levels, samples)
                if value < score:
                    best, score = levels, value
            history.append(score)
            bar.update(task, advance=1, description=f"evolution: KL {score:.4f}")
    return best, tuple(history)


def _mutate(
    levels: Levels, sizes: Sequence[Hashable], highest: int, generator: random.Random
) -> Levels:
    """``levels`` after a few trades of one level between two units of the same size."""
    result = list(levels)
    for _ in range(min(generator.randint(1, 3), generator.randint(1, 3))):
        trades = [
            (up, down)
            for up, level in enumerate(result)
            if level < highest
            for down, other in enumerate(result)
            if other > 0 and up != down and sizes[up] == sizes[down]
        ]
        if not trades:
            break
        up, down = generator.choice(trades)
        result[up] += 1
        result[down] -= 1
    return tuple(result)


@torch.no_grad()
def evopress(
    model: Llama,
    method: str | Method,
    sparsity: float,
    calibration: Tensor,
    *,
    step: float = 0.05,
    reach: int = 3,
    stages: Sequence[Stage] = (Stage(1, 4), Stage(4, 2), Stage(16, 1)),
    generations: int = 50,
    offspring: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Allocation:
    """Find the sparsity of every linear for a total, by running the model.

    The weights of every linear at ``2 reach + 1`` levels are made first, on the dense model's
    inputs, and are all in memory without their zeros. Candidates run through
    :class:`~openwork.nn.SparseLinear`, as the pruned model would. ``model`` is as before
    afterwards.

    Args:
        model: dense.
        method: as for :func:`~openwork.prune.prune_model`, one that prunes a linear at a time.
        sparsity: share of the weights of every linear at the start, and of all together always.
        calibration: ``[samples, length]`` int64 token ids, for the levels and the fitness; shuffle
            them if neighbouring samples are alike.
        step: between levels, 0 to 1; rounded to whole columns, so that trades are exact.
        reach: levels above and below ``sparsity``; all must be in 0 .. 1.
        stages: of the tournament; by default on 1, 4 and then 16 samples.
        generations, offspring, seed: see :func:`search`.
        progress: show progress bars.

    Returns:
        The sparsities, which weighed by size average to ``sparsity`` (to a column), and the
        fitness.

    Raises:
        ValueError: an unknown method, levels outside 0 .. 1, more samples than there are, bad
            calibration tokens, or a model that is not dense.
    """
    check_dense("evopress", model)
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(
            f"evopress: method must be a function or one of {', '.join(METHODS)}, got {method!r}"
        )
    shares = _shares(model, sparsity, step, reach)
    start = (reach,) * len(shares)
    _check_search(list(shares), start, 2 * reach, stages, generations, offspring)
    most = max(stage.samples for stage in stages)
    if len(calibration) < most:
        raise ValueError(
            f"evopress: calibration must have {most} samples, the most a stage looks at, "
            f"got {len(calibration)}"
        )
    function = METHODS[method] if isinstance(method, str) else method
    run = _Database(function, dict(shares))
    run.start(model)
    calibrate(model, calibration, run, progress=progress)
    fitness = _Fitness(model, run.linears, calibration)
    try:
        best, history = search(
            [model.get_submodule(name).get_parameter("weight").shape for name in shares],
            start,
            2 * reach,
            fitness,
            stages=stages,
            generations=generations,
            offspring=offspring,
            seed=seed,
            progress=progress,
        )
    finally:
        fitness.restore()
    found = zip(shares, best, strict=True)
    return Allocation({name: shares[name][level] for name, level in found}, history)


def _shares(model: Llama, sparsity: float, step: float, reach: int) -> dict[str, list[float]]:
    """The sparsities of the levels of every linear: whole columns of a row, equally far apart."""
    shares = {}
    for name, parent, attribute in model.linears():
        k = getattr(parent, attribute).in_features
        middle, apart = round(sparsity * k), round(step * k)
        counts = [middle + (level - reach) * apart for level in range(2 * reach + 1)]
        if reach < 1 or apart < 1 or counts[0] < 0 or counts[-1] > k:
            raise ValueError(
                "evopress: sparsity with reach >= 1 levels of at least a column above and below "
                f"in 0 .. 1 expected, got sparsity = {sparsity}, reach = {reach}, step = {step}"
            )
        shares[name] = [count / k for count in counts]
    return shares


class _Database:
    """A calibration that changes nothing and keeps every linear at every level, without zeros."""

    def __init__(self, method: Method, shares: dict[str, list[float]]) -> None:
        self.linears: dict[str, list[nn.Module]] = {}
        self._method, self._shares = method, shares
        self._shares_of: dict[nn.Module, list[float]] = {}

    def start(self, model: Llama) -> None:
        self._shares_of = {model.get_submodule(n): shares for n, shares in self._shares.items()}

    def options(self) -> Mapping[str, Any]:
        return {"algorithm": "evopress"}

    def statistic(self, linear: nn.Linear) -> InputSecondMoment:
        return InputSecondMoment(linear.in_features)

    def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
        weight, moment = linear.weight.float(), statistic.mean()
        return {
            f"{level:04d}": self._method(weight, moment, Unstructured(share)).weight.to(
                linear.weight.dtype
            )
            for level, share in enumerate(self._shares_of.pop(linear))
        }

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        bias = getattr(parent, attribute).bias
        levels = [tensors[key] for key in sorted(tensors)]
        if levels[0].dtype is torch.float16:  # stored values are float32 or bfloat16
            levels = [weight.float() for weight in levels]
        self.linears[name] = [sparse_module(weight, bias, None) for weight in levels]


class _Fitness:
    """KL from the dense model of a model with given levels; nats a token.

    The model stays at the levels asked for last, until :meth:`restore`.
    """

    def __init__(
        self, model: Llama, linears: Mapping[str, Sequence[nn.Module]], tokens: Tensor
    ) -> None:
        self._model, self._linears, self._tokens = model, linears, tokens
        self._dense = {name: model.get_submodule(name) for name in linears}
        # The head gives the logits back exactly, and states are far smaller.
        self._states = [model.hidden(sample[None])[0] for sample in tokens]
        self._known: dict[tuple[Levels, int], float] = {}

    def __call__(self, levels: Levels, samples: int) -> float:
        key = levels, samples
        if key not in self._known:
            for (name, linears), level in zip(self._linears.items(), levels, strict=True):
                self._model.set_submodule(name, linears[level])
            sums = [self._divergence(index) for index in range(samples)]
            self._known[key] = sum(sums) / samples
        return self._known[key]

    def _divergence(self, sample: int) -> float:
        model = self._model
        q = torch.log_softmax(model.head(self._states[sample]).float(), dim=-1)
        p = torch.log_softmax(model(self._tokens[sample][None])[0].float(), dim=-1)
        total = F.kl_div(p, q, reduction="none", log_target=True).sum(-1).double().mean()
        return float(total)

    def restore(self) -> None:
        for name, linear in self._dense.items():
            self._model.set_submodule(name, linear)


def _check_search(
    sizes: Sequence[Hashable],
    start: Levels,
    highest: int,
    stages: Sequence[Stage],
    generations: int,
    offspring: int,
) -> None:
    if len(start) != len(sizes) or not all(0 <= level <= highest for level in start):
        raise ValueError(
            f"search: start must be a level in 0 .. {highest} for each of {len(sizes)} units, "
            f"got {list(start)}"
        )
    counts = [stage.samples for stage in stages], [stage.survivors for stage in stages]
    if not stages or min(map(min, counts)) < 1 or stages[-1].survivors != 1:
        raise ValueError(
            "search: stages of at least one sample and survivor, the last with one survivor, "
            f"expected, got {list(stages)}"
        )
    if generations < 0 or offspring < 1:
        raise ValueError(
            "search: generations of at least 0 and offspring of at least 1 expected, "
            f"got {generations} and {offspring}"
        )
