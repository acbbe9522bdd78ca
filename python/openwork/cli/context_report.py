"""Rows of ``openwork eval-context``, as JSON and as a plot."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from openwork.evaluation.long_context import Outcome


@dataclass(frozen=True)
class Row:
    """A method at one setting and length.

    Attributes:
        method, setting: see :class:`~openwork.cli.context_methods.Contender`.
        length: tokens of prompt and text.
        cost: density of the attention, or bytes of the cache for each token of the prompt.
        dense_cost: of the dense model.
        ppl: perplexity of what follows the prompts, and the dense model's.
        kl, agreement: see :mod:`openwork.evaluation.long_context`.
        found, asked: passkeys.
        seconds: of a prompt, or of a step with the cache; the least of the texts.
    """

    method: str
    setting: str
    length: int
    cost: float
    dense_cost: float
    ppl: float
    dense_ppl: float
    kl: float
    agreement: float
    found: int
    asked: int
    seconds: float


def row(
    method: str,
    setting: str,
    length: int,
    dense: Sequence[Outcome],
    scored: Sequence[Outcome],
    asked: Sequence[Outcome],
) -> Row:
    """The means over samples of text, and the passkeys that were found."""
    # A cache's bytes for each token; a density is one already.
    tokens = length if dense[0].cost > 1 else 1
    return Row(
        method,
        setting,
        length,
        cost=fmean(o.cost for o in scored) / tokens,
        dense_cost=fmean(o.cost for o in dense) / tokens,
        ppl=_exp(fmean(o.score.nll for o in scored)),
        dense_ppl=_exp(fmean(o.score.nll for o in dense)),
        kl=fmean(o.score.kl for o in scored),
        agreement=fmean(o.score.agreement for o in scored),
        found=sum(o.score.found for o in asked),
        asked=len(asked),
        seconds=min(o.seconds for o in scored),
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def to_json(rows: Sequence[Row]) -> bytes:
    """A list of rows; a perplexity too large for a float is null, since JSON has no infinity."""
    values = [{k: None if v == math.inf else v for k, v in asdict(row).items()} for row in rows]
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()


def from_json(data: bytes) -> list[Row]:
    """The rows that :func:`to_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        return [Row(**_floats(values)) for values in json.loads(data)]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"rows of eval-context expected, got {error}") from error


def _floats(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.inf if value is None else value for key, value in values.items()}


def draw(rows: Sequence[Row], title: str) -> bytes:
    """Perplexity, KL from the dense model and passkeys found against cost, for each length."""
    # Without a display, and without pyplot, whose state is global.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({row.length for row in rows})
    methods = [m for m in dict.fromkeys(row.method for row in rows) if m != "dense"]
    figure = Figure(figsize=(3.6 * len(lengths) + 2, 8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(lengths), squeeze=False, sharex="col", height_ratios=(3, 3, 2))
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for column, length in enumerate(lengths):
        ppl, kl, keys = panels[:, column]
        for i, method in enumerate(methods):
            own = [r for r in rows if (r.method, r.length) == (method, length)]
            own.sort(key=lambda r: r.cost)
            x = [r.cost / r.dense_cost for r in own]
            style = {"marker": "o", "ms": 4, "lw": 1.2, "color": colours[i % len(colours)]}
            ppl.plot(x, [r.ppl / r.dense_ppl for r in own], label=method, **style)
            kl.plot(x, [max(r.kl, 1e-5) for r in own], **style)
            keys.plot(x, [r.found / r.asked if r.asked else math.nan for r in own], **style)
        ppl.set(title=f"{length} tokens", xscale="log", yscale="log")
        kl.set(yscale="log")
        density = all(row.dense_cost == 1 for row in rows)
        keys.set(xlabel="density" if density else "bytes, of dense", ylim=(-0.05, 1.05))
        for panel in (ppl, kl, keys):
            panel.grid(alpha=0.3, which="both")
    names = ("perplexity, of dense", "KL from dense, nats a token", "passkeys found")
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name)
    figure.suptitle(title)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi="figure")
    return buffer.getvalue()
