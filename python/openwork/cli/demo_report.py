"""What the demo shows: a table, a plot of quality against size, and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from openwork.cli import llama_cpp
from openwork.evaluation import EvalResult
from openwork.throughput import Speed

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the plot: models that share a method share a colour.
_COLOURS = {"dense": "0.4", "gptq": "tab:blue", "rtn": "tab:orange"}


@dataclass(frozen=True)
class Row:
    """One model: all bytes of its weights, the embedding included, and what was measured."""

    name: str
    weight_bytes: int
    quality: EvalResult
    speed: Speed


def table(rows: Sequence[Row], competitors: Mapping[str, Speed], title: str) -> Table:
    """All models, each with its speed as a multiple of the first one's."""
    out = Table(title=title, box=box.SIMPLE)
    out.add_column("model", no_wrap=True)
    for head in ("MB", "ppl", "KL", "top-1", "prefill tok/s", "decode tok/s"):
        out.add_column(head, justify="right", no_wrap=True)
    first = rows[0].speed
    for row in rows:
        q = row.quality
        out.add_row(
            row.name,
            f"{row.weight_bytes / 1e6:.0f}",
            f"{q.ppl:.4g}",
            "" if q.kl is None else f"{q.kl:.3f}",
            "" if q.agreement is None else f"{q.agreement:.1%}",
            *_speed(row.speed, first),
        )
    for name, speed in competitors.items():
        out.add_row(name, "", "", "", "", *_speed(speed, first))
    out.caption = (
        "MB: all weights in memory, the embedding included. KL (nats a token) and top-1 (same "
        f"likeliest token): against {rows[0].name}. {llama_cpp.NAME} runs the same model file, in "
        f"each phase the faster of its own format and, where the package can write it, "
        f"{llama_cpp.FASTEST}."
    )
    return out


def _speed(speed: Speed, first: Speed) -> tuple[str, str]:
    return (
        f"{speed.prefill:.0f} {speed.prefill / first.prefill:4.1f}x",
        f"{speed.decode:.0f} {speed.decode / first.decode:4.1f}x",
    )


def to_json(rows: Sequence[Row], competitors: Mapping[str, Speed]) -> bytes:
    """``{"models": [...], "competitors": {name: {"prefill_tps", "decode_tps"}}}``.

    A perplexity too large for a float is null, since JSON has no infinity.
    """
    value = {
        "models": [
            {
                "name": row.name,
                "weight_bytes": row.weight_bytes,
                "ppl": row.quality.ppl if math.isfinite(row.quality.ppl) else None,
                "kl": row.quality.kl,
                "agreement": row.quality.agreement,
                "prefill_tps": row.speed.prefill,
                "decode_tps": row.speed.decode,
            }
            for row in rows
        ],
        "competitors": {
            name: {"prefill_tps": speed.prefill, "decode_tps": speed.decode}
            for name, speed in competitors.items()
        },
    }
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def draw(rows: Sequence[Row], title: str) -> bytes:
    """:func:`plot` as a PNG."""
    buffer = io.BytesIO()
    plot(rows, title).savefig(buffer, dpi="figure")
    return buffer.getvalue()


def plot(rows: Sequence[Row], title: str) -> Figure:
    """KL from the dense model over the bytes of the weights, lower left is better."""
    # Without a display, and without pyplot, whose state is global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="weights, MB", ylabel="KL from dense fp32, nats a token")
    # A logarithmic axis has no 0; the dense model itself lies on the lower edge.
    positive = [row.quality.kl for row in rows if row.quality.kl]
    floor = min(positive, default=1e-3) / 2
    points = {row.name: (row.weight_bytes / 1e6, max(row.quality.kl or 0.0, floor)) for row in rows}
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", color=_COLOURS.get(name.partition("-")[0], "0.4"))
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xlim(0, 1.25 * max(x for x, _ in points.values()))  # room for the names
    axes.grid(alpha=0.3)
    axes.set_title(f"{title}: quality against size")
    _name_points(figure, axes, points)
    return figure


def _name_points(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name right of its point, or higher where that would cover a point or a name."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the layout, from which pixels follow
    figure.set_layout_engine("none")
    pixels = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    for (name, point), (x, y) in sorted(
        zip(points.items(), pixels, strict=True), key=lambda item: float(item[1][1])
    ):
        # In pixels, at 8 points and 120 to the inch: a line is 15 high, a letter below 9 wide.
        box = Bbox.from_bounds(x + 16, y - 7.5, 9 * len(name), 15)
        while box.count_overlaps(taken):
            box = box.translated(0, 1)
        taken.append(box)
        axes.annotate(
            name,
            point,
            xytext=(box.x0, (box.y0 + box.y1) / 2),
            textcoords="figure pixels",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "relpos": (0, 0.5), "shrinkA": 1},
        )
