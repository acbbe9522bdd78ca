"""Whatever goes wrong: one line that names the thing, an exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from models.checkpoints import random_model, write_directory, write_gguf
from typer.testing import CliRunner

from openwork import cli
from openwork.cli import app
from openwork.cli.errors import describe

from .conftest import Run, write_tokenizer

USAGE = 2


@pytest.mark.parametrize("command", [("eval",), ("generate", "--prompt", "x"), ("compress", "out")])
def test_missing_model(refuse: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    path = tmp_path / "no [model].gguf"
    rest = [str(tmp_path / part) if part == "out" else part for part in rest]
    assert refuse(name, path, *rest) == f"openwork: {path}: No such file or directory"
    assert list(tmp_path.iterdir()) == []


def test_truncated_gguf(refuse: Run, gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:5000])
    assert str(gguf_file) in refuse("eval", gguf_file)


def test_damaged_safetensors(refuse: Run, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"x" * 100)
    assert "a complete safetensors file expected" in refuse("eval", directory)


def test_unknown_architecture(refuse: Run, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "rwkv"}
    (directory / "config.json").write_text(json.dumps(config))
    line = refuse("compress", directory, directory.parent / "out")
    assert "config.json" in line
    assert "rwkv" in line


def test_empty_directory(refuse: Run, tmp_path: Path) -> None:
    assert str(tmp_path / "config.json") in refuse("eval", tmp_path)


def test_missing_tokenizer(refuse: Run, tmp_path: Path) -> None:
    path = write_gguf(random_model(), tmp_path / "mute.gguf")
    assert f"{path}: a tokenizer expected" in refuse("generate", path, "--prompt", "x")


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), (b"\xff\xfe\x00", "UTF-8 text expected"), (b"", "2 tokens or more")],
)
def test_bad_text(
    refuse: Run, gguf_file: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    text = tmp_path / "words.txt"
    if content is not None:
        text.write_bytes(content)
    line = refuse("eval", gguf_file, "--text", text)
    assert str(text) in line
    assert says in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--window", 4096), "--window must be at most 2048"),
        (("--window", 64, "--stride", 64), "--stride must be below --window = 64"),
        (("--window", 1), "--window"),
        (("--dtype", "int8"), "--dtype"),
        (("--windows", 1), "--windows"),
    ],
)
def test_bad_eval_options(
    refuse: Run, gguf_file: Path, options: tuple[object, ...], says: str
) -> None:
    assert says in refuse("eval", gguf_file, *options, code=USAGE)


def test_reference_of_another_vocabulary(
    refuse: Run, gguf_file: Path, text_file: Path, tmp_path: Path
) -> None:
    other = write_gguf(random_model(vocab_size=300), tmp_path / "other.gguf")
    line = refuse("eval", gguf_file, "--reference", other, "--text", text_file)
    assert "must have the vocabulary of the model, 320, got 300" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", ""), "--prompt must be some text"),
        (("--prompt", "the", "--max-new-tokens", 3000), "context of 2048 tokens"),
        (("--prompt", "the", "--max-new-tokens", 0), "--max-new-tokens"),
        (("--prompt", "the", "--temperature", -1), "--temperature"),
        (("--prompt", "the", "--temperature", "nan"), "--temperature"),
        (("--prompt", "the", "--top-p", 0), "--top-p"),
        ((), "--prompt"),
    ],
)
def test_bad_generate_options(
    refuse: Run, gguf_file: Path, options: tuple[object, ...], says: str
) -> None:
    assert says in refuse("generate", gguf_file, *options, code=USAGE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--bits", 5), "--bits must be 2, 3, 4 or 8, got 5"),
        (("--group-size", 48), "--group-size must be 0, 16, 32, 64 or 128, got 48"),
        (("--head-bits", 1), "--head-bits must be 0, 2, 3, 4 or 8, got 1"),
        (("--method", "awq"), "awq"),
        (("--samples", 0), "--samples"),
    ],
)
def test_bad_compress_options(
    refuse: Run, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    assert says in refuse("compress", tmp_path, tmp_path / "out", *options, code=USAGE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--pattern", "2:4"), "--pattern, --sparsity, --allocation and --storage need --prune"),
        (("--storage", "sparse"), "--allocation and --storage need --prune"),
        (("--allocation", "global"), "--allocation and --storage need --prune"),
        (
            ("--prune", "wanda", "--pattern", "2:4", "--allocation", "global"),
            "--allocation is for --sparsity of single weights, not --pattern",
        ),
        (
            ("--prune", "flap", "--sparsity", 0.2, "--allocation", "evopress"),
            "--allocation is for --sparsity of single weights, not --prune flap",
        ),
        (("--prune", "flap", "--sparsity", 0.2, "--storage", "dense"), "flap leaves no zeros"),
        (("--prune", "wanda"), "--prune needs --pattern or --sparsity"),
        (("--prune", "wanda", "--pattern", "2:4", "--sparsity", 0.5), "one of them"),
        (("--prune", "flap", "--pattern", "2:4"), "--prune flap needs --sparsity"),
        (("--prune", "wanda", "--pattern", "2:4", "--bits", 4), "wanda does not quantize"),
        (("--prune", "wanda", "--pattern", "4:2"), "--pattern: NM: 1 <= n < m <= 32"),
        (
            ("--prune", "sparsegpt", "--pattern", "2:4", "--bits", 4, "--storage", "sparse"),
            "only 4 and 8 with --symmetric",
        ),
        (
            (
                "--prune",
                "sparsegpt",
                "--sparsity",
                0.5,
                "--bits",
                4,
                "--symmetric",
                "--storage",
                "sparse",
            ),
            "--storage sparse: of --bits",
        ),
        (("--prune", "magic", "--sparsity", 0.5), "magic"),
        (("--prune", "wanda", "--sparsity", 1.5), "--sparsity"),
    ],
)
def test_bad_pruning_options(
    refuse: Run, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    assert says in refuse("compress", tmp_path, tmp_path / "out", *options, code=USAGE)


def test_output_that_is_there(refuse: Run, gguf_file: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "precious").write_text("x")
    file.write_text("x")
    assert "or pass --overwrite" in refuse("compress", gguf_file, folder)
    assert f"{file}: a directory expected" in refuse("compress", gguf_file, file, "--overwrite")
    below = refuse("compress", gguf_file, file / "out")
    assert below == f"openwork: {file / 'out'}: Not a directory"
    assert (folder / "precious").read_text() == file.read_text() == "x"


def test_too_little_calibration_text(refuse: Run, gguf_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("the")
    line = refuse("compress", gguf_file, tmp_path / "out", "--calibration", text)
    assert f"{text}: 128 samples of 512 tokens" in line
    assert not (tmp_path / "out").exists()


def test_compressing_twice(run: Run, refuse: Run, gguf_file: Path, tmp_path: Path) -> None:
    run("compress", gguf_file, tmp_path / "once", "--method", "rtn")
    line = refuse("compress", tmp_path / "once", tmp_path / "twice", "--method", "rtn")
    assert "must be dense, got LowbitLinear" in line
    assert not (tmp_path / "twice").exists()


def test_resume_folder_of_another_run(
    run: Run, refuse: Run, gguf_file: Path, text_file: Path, tmp_path: Path
) -> None:
    options = ("--calibration", text_file, "--samples", 2, "--length", 16, "--resume")
    run("compress", gguf_file, tmp_path / "a", *options, tmp_path / "state")
    line = refuse("compress", gguf_file, tmp_path / "b", *options, tmp_path / "state", "--bits", 3)
    assert str(tmp_path / "state") in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("limit", [200, 20000])
def test_full_disk(directory: Path, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files, which fails as a full disk does; in config or weights."""
    out = tmp_path / "out"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-B", "-m", "openwork", "compress", directory, out, "--method", "rtn"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("openwork: ")
    assert str(out.parent) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output(refuse: Run, gguf_file: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    line = refuse("compress", gguf_file, closed / "out")
    assert line == f"openwork: {closed / 'out'}: Permission denied"


def test_download_that_cannot_be_kept(
    refuse: Run, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path / "cache"))
    assert str(tmp_path / "cache") in refuse("eval", gguf_file)
    assert str(tmp_path / "cache") in refuse("demo", "--output", tmp_path)


def test_bench_without_the_source_tree(refuse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.bench, "_checkout", lambda: None)
    assert "in a checkout of openwork" in refuse("bench", "run")


def test_bench_passes_its_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc" / "ops").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["bench", "run"]).exit_code == 7


@pytest.mark.parametrize("arguments", [("--nope",), ("evil",), ("eval",)])
def test_bad_command_line(refuse: Run, arguments: tuple[str, ...]) -> None:
    refuse(*arguments, code=USAGE)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--debug", "eval", str(tmp_path / "none.gguf")])
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("openwork: ")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "a"), "a: No space left on device"),
        (OSError(18, "Cross-device link", "a", None, "b"), "a -> b: Cross-device link"),
        (OSError("a: cannot be written"), "a: cannot be written"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "not enough memory"),
        (KeyError("x"), "KeyError: 'x'; openwork --debug shows where"),
    ],
)
def test_describe(error: Exception, text: str) -> None:
    assert describe(error) == (text, 1)


def test_tokenizer_that_is_none(refuse: Run, tmp_path: Path) -> None:
    path = write_directory(random_model(), tmp_path / "dense")
    write_tokenizer(path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: a tokenizer expected" in refuse("eval", path)
