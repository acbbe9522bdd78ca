"""Result files: writing, reading, and the tables made of them.

    {"machine": {...}, "rows": [{"op", "params": {...}, "tier", "median_s", "iqr_s", "gb_s",
     "gflop_s", "roof_share", "bound", "speedup": {name: ratio}, "competitors": {name: {...}},
     "checked": true}]}

``speedup[name]`` is the competitor's median time over ours. A row exists only if its result was
checked against the reference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROW_KEYS = (
    "op", "params", "tier", "median_s", "iqr_s", "gb_s", "gflop_s", "roof_share", "speedup",
    "checked",
)  # fmt: skip


class ResultError(ValueError):
    """A result file that cannot be read as one."""


def write(path: Path, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write a result file; readers never see half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """``(machine, rows)`` of a result file.

    Raises:
        ResultError: not a result file, a row without one of :data:`ROW_KEYS`, or unchecked.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"bench: {path} expected a result file, got {error}") from error
    if not isinstance(content, dict) or {"machine", "rows"} - content.keys():
        raise ResultError(f"bench: {path} expected the keys machine and rows")
    for index, row in enumerate(content["rows"]):
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ResultError(f"bench: {path} row {index} lacks {', '.join(missing)}")
        if row["checked"] is not True:
            raise ResultError(f"bench: {path} row {index} was not checked")
    return content["machine"], content["rows"]


def row_id(op: str, params: Mapping[str, Any]) -> str:
    """``"lowbit_linear m=1 n=4096 ..."``: what patterns select and messages name."""
    return " ".join([op, *(f"{key}={value}" for key, value in params.items())])


def matches(pattern: str, name: str) -> bool:
    """Whether every word of ``pattern``, with shell wildcards, matches a word of a row's name."""
    words = name.split(" ")
    return all(any(fnmatchcase(word, part) for word in words) for part in pattern.split())


def duration(seconds: float) -> str:
    """Three digits with a unit: ``183 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _columns(rows: Iterable[Row], key: str) -> list[str]:
    """Keys of ``row[key]`` over all rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def markdown(rows: Sequence[Row]) -> str:
    """A markdown table per operator; parameters that never change stand above it, once."""
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        names = _columns(chosen, "params")
        fixed = {
            name: chosen[0]["params"].get(name)
            for name in names
            if len({str(row["params"].get(name)) for row in chosen}) == 1 and len(chosen) > 1
        }
        varying = [name for name in names if name not in fixed]
        rivals = _columns(chosen, "speedup")
        head = [*varying, "time", "GB/s", "GFLOP/s", "of roof", *(f"vs {name}" for name in rivals)]
        lines = [
            "**" + row_id(op, fixed) + "**",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
        ]
        for row in chosen:
            cells = [str(row["params"].get(name, "")) for name in varying]
            cells += [
                duration(row["median_s"]),
                f"{row['gb_s']:.1f}",
                f"{row['gflop_s']:.1f}",
                f"{row['roof_share']:.0%}",
            ]
            cells += [
                f"{row['speedup'][name]:.2f}x" if name in row["speedup"] else "" for name in rivals
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def machine_line(machine: Mapping[str, Any]) -> str:
    """One sentence on the machine, for under a table."""
    peaks = machine.get("peaks", {})
    roofs = ", ".join(
        f"{name.removesuffix('_gb_s').removesuffix('_gop_s')} {value['best']:.0f} "
        f"{'GB/s' if name.endswith('_gb_s') else 'GFLOP/s'}"
        for name, value in peaks.items()
        if isinstance(value, dict)
    )
    versions = ", ".join(f"{name} {text}" for name, text in machine.get("versions", {}).items())
    gpu = f"{machine['gpu']} beside " if machine.get("gpu") else ""
    return (
        f"{gpu}{machine.get('cpu')}, {machine.get('cores')} cores, tier {machine.get('tier')}, "
        f"{peaks.get('threads')} threads; measured roofs: {roofs}; {versions}; "
        f"ggml of {machine.get('ggml')}; "
        f"commit {machine.get('git') or 'unknown'}"
    )


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[str, Row, Row, float, bool]]:
    """Rows present in both, with ``before / after`` (above 1 is faster now).

    The flag says whether the difference exceeds the noise: half the two interquartile ranges.
    """
    old = {row_id(row["op"], row["params"]) + row["tier"]: row for row in before}
    pairs = []
    for row in after:
        twin = old.get(row_id(row["op"], row["params"]) + row["tier"])
        if twin is None:
            continue
        ratio = twin["median_s"] / row["median_s"]
        noise = (twin["iqr_s"] + row["iqr_s"]) / 2
        beyond = abs(twin["median_s"] - row["median_s"]) > noise
        pairs.append((row_id(row["op"], row["params"]), twin, row, ratio, beyond))
    return pairs
