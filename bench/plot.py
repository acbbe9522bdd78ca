"""Pictures of a result file: the roofline, the share of the roof against m, and where sparse
beats dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Row

# A line of the second picture: rows that differ in m only.
SERIES = (
    "op", "n", "k", "bits", "group_size", "compute", "symmetric", "dtype", "phase", "weights",
    "density", "block", "format",
)  # fmt: skip


def _series(row: Row) -> tuple[Any, ...]:
    values = {"op": row["op"], **row["params"]}
    return tuple(values.get(name) for name in SERIES)


def _label(series: tuple[Any, ...], shown: Sequence[str]) -> str:
    return " ".join(
        f"{name}={value}" if name != "op" else str(value)
        for name, value in zip(SERIES, series, strict=True)
        if name in shown and value is not None
    )


def draw(machine: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Write both pictures into one PNG.

    Left: operations per second over operations per byte, both logarithmic, under the measured
    roofs. Right: share of the roof over m, one line per format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_series(row), []).append(row)
    # Names that tell the lines apart; the rest would only lengthen the legend.
    shown = [
        name
        for index, name in enumerate(SERIES)
        if name == "bits" or len({series[index] for series in groups}) > 1
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6))
    peaks = machine["peaks"]
    read = peaks["read_gb_s"]["best"]
    intensity = np.geomspace(0.25, 4096, 200)
    for unit in ("fp32", "bf16", "int8"):
        if f"{unit}_gop_s" in peaks:
            peak = peaks[f"{unit}_gop_s"]["best"]
            left.plot(intensity, np.minimum(intensity * read, peak), color="0.6", lw=1)
            left.annotate(f"{unit} {peak:.0f}", (intensity[-1], peak), ha="right", va="bottom")
    for series, members in groups.items():
        members = sorted(members, key=lambda row: row["params"].get("m", 1))
        label = _label(series, shown)
        left.plot(
            [row["gflop_s"] / row["gb_s"] for row in members if row["gb_s"]],
            [row["gflop_s"] for row in members if row["gb_s"]],
            "o", ms=4, label=label,
        )  # fmt: skip
        if all("m" in row["params"] for row in members):
            right.plot(
                [row["params"]["m"] for row in members],
                [row["roof_share"] for row in members],
                "o-", ms=4, lw=1, label=label,
            )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    left.set_title(f"roofline, {peaks['threads']} threads, reading {read:.0f} GB/s")
    right.set(xscale="log", ylim=(0, 1.1), xlabel="m", ylabel="share of the roof")
    right.axhline(1, color="0.6", lw=1)
    left.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_crossover(rows: Sequence[Row], dense: str, path: Path) -> None:
    """Write the time of sparse over that of ``dense`` against the density: below 1, sparse wins.

    One line for each m of each operator and format; a dashed one is the density itself, the time
    of a kernel that did the stored work at the dense one's rate.

    Raises:
        ValueError: no row has a density and was compared with ``dense``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        params = row["params"]
        if "density" in params and dense in row["speedup"]:
            name = (row["op"], params.get("format"), params["m"])
            lines.setdefault(name, []).append((params["density"], 1 / row["speedup"][dense]))
    if not lines:
        raise ValueError(f"bench: no row has a density and was compared with {dense}")
    figure, axes = pyplot.subplots(figsize=(8, 6))
    for (op, kind, m), points in lines.items():
        densities, ratios = zip(*sorted(points), strict=True)
        axes.plot(densities, ratios, "o-", ms=4, lw=1, label=f"{op} {kind} m={m}")
    axes.plot([0, 1], [0, 1], "--", color="0.6", lw=1)
    axes.axhline(1, color="0.6", lw=1)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="density", ylabel=f"time over that of {dense}")
    axes.legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
