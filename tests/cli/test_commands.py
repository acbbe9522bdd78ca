"""What the commands do when all is well, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.checkpoints import random_model, write_directory, write_tokenizer

import openwork
from openwork import models
from openwork.nn import LowbitLinear, NmLinear
from openwork.prune import speed

from .conftest import Run


def test_info_prints_the_same_as_a_table_and_as_json(run: Run) -> None:
    about = json.loads(run("info", "--json"))
    assert about["version"] == openwork.__version__
    assert about["isa"] == openwork.isa()
    table = run("info")
    for kernel in about["kernels"]:
        assert kernel in table


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "openwork", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["version"] == openwork.__version__


@pytest.mark.parametrize("model", ["gguf_file", "directory"])
@pytest.mark.parametrize(
    ("options", "symmetric"),
    [(("--method", "rtn", "--bits", 4, "--group-size", 32), False),
     (("--method", "rtn", "--bits", 2, "--group-size", 0, "--symmetric", "--head-bits", 0), True),
     (("--bits", 3, "--group-size", 16, "--samples", 4, "--length", 24), False)],
)  # fmt: skip
def test_compress_writes_what_eval_and_generate_run(
    run: Run,
    request: pytest.FixtureRequest,
    text_file: Path,
    tmp_path: Path,
    model: str,
    options: tuple[object, ...],
    symmetric: bool,
) -> None:
    source, out = request.getfixturevalue(model), tmp_path / "new" / "out"
    report = run("compress", source, out, *options, "--calibration", text_file)
    assert "most memory used" in report
    assert "gate_up" in report

    loaded = models.load(out)
    qkv = loaded.layers[0].attn.qkv
    assert isinstance(qkv, LowbitLinear)
    assert (qkv.weight.zeros is None) == symmetric
    assert isinstance(loaded.head, LowbitLinear) == ("--head-bits" not in options)
    shown = run("eval", out, "--reference", source, "--text", text_file, "--window", 64,
                "--stride", 32, "--json")  # fmt: skip
    result = json.loads(shown)
    assert result["kl"] > 0
    assert 0 <= result["agreement"] <= 1
    assert run("generate", out, "--prompt", "the", "--max-new-tokens", 3).startswith("the")


@pytest.mark.parametrize(
    "options",
    [("--prune", "magnitude", "--sparsity", 0.5), ("--prune", "wanda", "--pattern", "4:8"),
     ("--prune", "sparsegpt", "--pattern", "16:2:4"),
     ("--prune", "sparsegpt", "--pattern", "2:4", "--bits", 4, "--group-size", 32),
     ("--prune", "magnitude", "--sparsity", 0.5, "--allocation", "global"),
     ("--prune", "wanda", "--sparsity", 0.5, "--allocation", "evopress")],
)  # fmt: skip
def test_compress_prunes(
    run: Run, directory: Path, text_file: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    out = tmp_path / "out"
    samples = 16 if "evopress" in options else 4
    data = ("--calibration", text_file, "--samples", samples, "--length", 24)
    stored = ("--storage", "dense", "--dtype", "float32")
    report = run("compress", directory, out, *options, *data, *stored)
    assert "weights removed from the layers │ 50.0%" in report
    assert "gate_up" in report
    assert "recommended" not in report
    loaded = models.load(out)
    down = loaded.layers[1].mlp.down
    if "--bits" in options:
        assert isinstance(down, LowbitLinear)
    else:
        zeros = (down.weight == 0).float().mean()
        dealt = "--allocation" in options
        assert float(zeros) == pytest.approx(0.5, abs=0.2 if dealt else 0.05)
    shown = run("eval", out, "--reference", directory, "--text", text_file, "--json")
    assert json.loads(shown)["kl"] > 0


@pytest.mark.parametrize("storage", ["sparse", "auto"])
def test_compress_leaves_zeros_out(
    run: Run,
    directory: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(speed, "_seconds", lambda *_: (1e-6, 2e-6))  # sparse is slower
    options = ("--prune", "magnitude", "--pattern", "2:4")
    run("compress", directory, tmp_path / "zeros", *options, "--storage", "dense")
    report = run("compress", directory, tmp_path / "out", *options, "--storage", storage)
    assert "dense; sparse is slower at both" in report
    assert "3 of 3 shapes are faster dense" in report
    smaller, larger = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "zeros")
    )
    sparse = storage == "sparse"
    assert (smaller < larger) == sparse
    assert isinstance(models.load(tmp_path / "out").layers[1].mlp.down, NmLinear) == sparse
    shown = run("generate", tmp_path / "out", "--prompt", "the", "--max-new-tokens", 3)
    assert shown == run("generate", tmp_path / "zeros", "--prompt", "the", "--max-new-tokens", 3)
    shown = run(
        "eval", tmp_path / "out", "--reference", tmp_path / "zeros", "--text", text_file, "--json"
    )
    assert json.loads(shown)["kl"] < 1e-6


@pytest.mark.parametrize("method", ["flap", "llm_pruner"])
def test_compress_shrinks_a_model(run: Run, text_file: Path, tmp_path: Path, method: str) -> None:
    source = write_directory(random_model(heads=6, kv_heads=3, layers=6), tmp_path / "dense")
    write_tokenizer(source / "tokenizer.json")
    options = ("--prune", method, "--sparsity", 0.2, "--samples", 4, "--length", 24)
    run("compress", source, tmp_path / "out", *options, "--calibration", text_file)
    assert models.load(tmp_path / "out").config.layer_shapes
    small, large = (
        (folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", source)
    )
    assert small < 0.5 * large  # bfloat16, and less of it
    shown = run("generate", tmp_path / "out", "--prompt", "the", "--max-new-tokens", 3)
    assert shown.startswith("the")


def test_compress_resumes_to_the_same_result(
    run: Run, gguf_file: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--calibration", text_file, "--samples", 2, "--length", 16, "--dtype", "float32")
    run("compress", gguf_file, tmp_path / "a", *options)
    for out in ("b", "c"):
        run("compress", gguf_file, tmp_path / out, *options, "--resume", tmp_path / "state")
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b == c


def test_overwrite_replaces_the_directory(run: Run, gguf_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").write_text("")
    run("compress", gguf_file, out, "--method", "rtn", "--overwrite")
    assert not (out / "stale").exists()
    assert (out / "config.json").exists()


def test_eval_counts_the_windows_asked_for(run: Run, gguf_file: Path, text_file: Path) -> None:
    options = ("--text", text_file, "--window", 32, "--stride", 16)
    three = json.loads(run("eval", gguf_file, *options, "--max-windows", 3, "--json"))
    assert set(three) == {"ppl", "kl", "agreement", "tokens"}
    assert three["tokens"] == 32 + 2 * 16 - 1  # the first token has no prediction
    assert three["kl"] is None
    whole = json.loads(run("eval", gguf_file, *options, "--max-windows", 0, "--json"))
    assert whole["tokens"] > 1000


def test_eval_of_a_model_against_itself(run: Run, gguf_file: Path, text_file: Path) -> None:
    shown = run("eval", gguf_file, "--reference", gguf_file, "--text", text_file)
    assert "100.00%" in shown
    assert "perplexity" in shown


def test_generate_repeats_with_a_seed(run: Run, gguf_file: Path) -> None:
    options = ("--prompt", "the", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9)
    first = run("generate", gguf_file, *options, "--seed", 1, "--max-new-tokens", 20)
    assert first == run("generate", gguf_file, *options, "--seed", 1, "--max-new-tokens", 20)
    assert first != run("generate", gguf_file, *options, "--seed", 2, "--max-new-tokens", 20)


def test_chat_prints_the_answer_only(run: Run, gguf_file: Path) -> None:
    tokenizer = models.load(gguf_file).tokenizer
    assert tokenizer is not None
    shown = run("generate", gguf_file, "--prompt", "the time", "--chat", "--max-new-tokens", 4)
    tokens = tokenizer.chat([("user", "the time")])
    answer = models.generate(models.load(gguf_file), tokens, 4)
    assert shown == "".join(tokenizer.stream(answer)) + "\n"


def test_threads_and_dtype(run: Run, gguf_file: Path, text_file: Path) -> None:
    before = torch.get_num_threads()
    try:
        options = ("--text", text_file, "--threads", 1, "--dtype", "bfloat16", "--json")
        assert json.loads(run("eval", gguf_file, *options))["ppl"] > 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_bench_hands_its_arguments_over(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "csrc" / "ops").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    main = tmp_path / "bench" / "__main__.py"
    main.write_text("import sys; print(sys.argv[1:])")
    inside = tmp_path / "bench" / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    run("bench", "run", "--select", "m=1", "--help")
    assert "['run', '--select', 'm=1', '--help']" in capfd.readouterr().out
