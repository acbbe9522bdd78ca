"""``openwork eval-context`` on a tiny model: rows, a plot, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import TEXT, Run

SMALL = ("--length", 256, "--texts", 1, "--passkeys", 1)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(TEXT * 8)
    return path


@pytest.mark.parametrize(
    ("family", "select", "methods"),
    [
        ("attention", "A-shape", {"A-shape"}),
        ("tokens", "SnapKV", {"SnapKV"}),
        ("formats", "KIVI", {"KIVI", "KIVI before rotation"}),
    ],
)
def test_rows_and_plot(
    run: Run, gguf_file: Path, prose: Path, tmp_path: Path, family: str, select: str,
    methods: set[str],
) -> None:  # fmt: skip
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    shown = run("eval-context", gguf_file, "--family", family, "--text", prose, *SMALL,
                "--select", select, "--output", out, "--plot", plot)  # fmt: skip
    rows = json.loads(out.read_text())
    assert {row["method"] for row in rows} == methods | {"dense"}
    dense, *others = rows
    assert dense["kl"] == pytest.approx(0, abs=1e-6) and dense["ppl"] == dense["dense_ppl"]
    for row in others:
        assert row["kl"] > 0 and row["asked"] == 1
        # The exact tokens of a quantized cache are more than so short a prompt.
        assert row["cost"] < row["dense_cost"] or family == "formats"
        assert row["method"].split()[0] in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    more = run("eval-context", gguf_file, "--family", family, "--text", prose, *SMALL[2:],
               "--length", 300, "--select", select, "--output", out)  # fmt: skip
    assert "300 tokens" in more
    assert {row["length"] for row in json.loads(out.read_text())} == {256, 300}
    printed = run("eval-context", gguf_file, "--family", family, "--text", prose, *SMALL,
                  "--select", select, "--json")  # fmt: skip
    assert [row["method"] for row in json.loads(printed)] == [row["method"] for row in rows]


def test_refuses_prompts_past_the_context(refuse: Run, gguf_file: Path) -> None:
    line = refuse("eval-context", gguf_file, "--length", 4096, code=2)
    assert "--length must be at most 2048" in line
