"""How good a model is on a text: perplexity, and closeness to the dense model.

With ``p(. | i)`` a model's distribution of token ``i + 1`` given the tokens of its window up to
``i``, ``q`` the reference's, and means over all scored tokens::

    ppl       = exp(mean -log p(x[i+1] | i))
    kl        = mean sum_v q(v | i) log(q(v | i) / p(v | i))      nats
    agreement = mean [argmax p(. | i) = argmax q(. | i)]

Windows of ``window`` tokens start every ``stride`` tokens; each scores only the tokens that no
earlier window scored, so after the first every token has at least ``window - stride`` tokens of
context, and every token but the first of the text is scored once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from openwork.models import Llama

# Positions whose logits exist at one time: 128 x 49152 float32 are 25 MB, and there are a few
# copies (both models' logits and log-probabilities).
_CHUNK = 128


@dataclass(frozen=True)
class EvalResult:
    """What :func:`evaluate` found.

    Attributes:
        ppl: perplexity.
        kl: mean Kullback-Leibler divergence from the reference, nats a token; None without one.
        agreement: share of tokens where both find the same token likeliest; None without one.
        tokens: how many tokens were scored.
    """

    ppl: float
    kl: float | None
    agreement: float | None
    tokens: int


@dataclass(frozen=True)
class Reference:
    """A model's predictions on a text, kept for comparing several models against.

    Kept as the final hidden states, from which the head gives the logits back exactly: 85 times
    smaller than logits for a vocabulary of 49152 and a width of 576.

    Attributes:
        tokens: ``[length]`` the text.
        window, stride: see :func:`evaluate`.
        hidden: ``[scored tokens, d]``, in the order of the text.
        head: the model's head; it must stay as it is.
    """

    tokens: Tensor
    window: int
    stride: int
    hidden: Tensor
    head: nn.Module


class Window(NamedTuple):
    """Tokens ``begin .. end - 1`` are seen, and of them ``first .. end - 1`` scored."""

    begin: int
    end: int
    first: int


def windows(length: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of a text, in order.

    Args:
        length: tokens in the text, at least 2.
        window: tokens in a window, at least 2.
        stride: distance of the windows, 1 to ``window - 1``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> [tuple(span) for span in windows(10, window=6, stride=3)]
        [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    """
    if length < 2 or window < 2 or not 1 <= stride < window:
        raise ValueError(
            "evaluate: a text of 2 tokens or more, a window of 2 or more and a stride from 1 to "
            f"window - 1 expected, got {length}, {window} and {stride}"
        )
    first = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        yield Window(begin, end, first)
        first = end
        if end == length:
            return


@torch.inference_mode()
def predictions(
    model: Llama, tokens: Tensor, *, window: int = 1024, stride: int = 512, progress: bool = True
) -> Reference:
    """Run ``model`` over a text once and keep its predictions as a :class:`Reference`.

    Args:
        model: usually the dense model. Its head must not be changed in place afterwards.
        tokens: ``[length]`` int64.
        window, stride, progress: see :func:`evaluate`.

    Raises:
        ValueError: see :func:`evaluate`.
    """
    _check_text(tokens)
    states = [
        _hidden(model, tokens, *span)
        for span in _spans(tokens, window, stride, progress, "reference")
    ]
    return Reference(tokens, window, stride, torch.cat(states), model.head)


@torch.inference_mode()
def evaluate(
    model: Llama,
    tokens: Tensor,
    *,
    window: int = 1024,
    stride: int = 512,
    reference: Llama | Reference | None = None,
    progress: bool = True,
) -> EvalResult:
    """Score ``model`` on a text, and compare it with ``reference`` in the same pass.

    Args:
        model: the model.
        tokens: ``[length]`` int64, 2 or more.
        window: tokens the model sees at a time; at most its context.
        stride: tokens from one window's start to the next's, less than ``window``.
        reference: the dense model, or its :func:`predictions` on the same text, window and stride;
            None for perplexity alone.
        progress: show a progress bar.

    Returns:
        The result. Sums are kept in float64.

    Raises:
        ValueError: tokens of another shape or dtype, sizes out of range, or a reference made on
            another text, window or stride.
    """
    _check_text(tokens)
    if isinstance(reference, Reference):
        _check_reference(reference, tokens, window, stride)
    sums = torch.zeros(3, dtype=torch.float64)
    scored = 0
    for span in _spans(tokens, window, stride, progress, "evaluate"):
        states, targets = _hidden(model, tokens, *span), tokens[span.first : span.end]
        dense = None
        if isinstance(reference, Reference):
            dense = reference.hidden[scored : scored + len(targets)]
        elif reference is not None:
            dense = _hidden(reference, tokens, *span)
        for i in range(0, len(targets), _CHUNK):
            part = slice(i, i + _CHUNK)
            p = _log_probabilities(model.head, states[part])
            sums[0] += F.nll_loss(p, targets[part], reduction="none").double().sum()
            if reference is not None and dense is not None:
                q = _log_probabilities(reference.head, dense[part])
                if p.shape != q.shape:
                    raise ValueError(
                        f"evaluate: reference must have the vocabulary of the model, {p.shape[1]}, "
                        f"got {q.shape[1]}"
                    )
                # Rows in float32, their sum in float64: a row's error is far below its value.
                sums[1] += F.kl_div(p, q, reduction="none", log_target=True).sum(-1).double().sum()
                sums[2] += (p.argmax(-1) == q.argmax(-1)).sum()
        scored += len(targets)
    nll, kl, agreement = (sums / scored).tolist()
    compared = reference is not None
    return EvalResult(
        ppl=math.exp(nll) if nll < 700 else math.inf,
        kl=kl if compared else None,
        agreement=agreement if compared else None,
        tokens=scored,
    )


def _log_probabilities(head: nn.Module, states: Tensor) -> Tensor:
    return torch.log_softmax(head(states).float(), dim=-1)


def _hidden(model: Llama, tokens: Tensor, begin: int, end: int, first: int) -> Tensor:
    """The states that predict the tokens ``first .. end - 1``, seeing from ``begin`` on."""
    return model.hidden(tokens[None, begin : end - 1])[0, first - 1 - begin :]


def _spans(tokens: Tensor, window: int, stride: int, progress: bool, name: str) -> Iterable[Window]:
    spans = list(windows(len(tokens), window=window, stride=stride))
    return track(spans, description=name, disable=not progress)


def _check_text(tokens: Tensor) -> None:
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"evaluate: tokens must be [length] int64, got {list(tokens.shape)} {tokens.dtype}"
        )


def _check_reference(reference: Reference, tokens: Tensor, window: int, stride: int) -> None:
    if (reference.window, reference.stride) != (window, stride):
        raise ValueError(
            f"evaluate: reference must be of window {window} and stride {stride}, "
            f"got {reference.window} and {reference.stride}"
        )
    if not torch.equal(reference.tokens, tokens):
        raise ValueError("evaluate: reference must be of the same tokens, got others")
