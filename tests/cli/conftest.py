"""Tiny models on disk, and a runner for the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from models.checkpoints import (
    add_tokenizer,
    random_model,
    write_directory,
    write_gguf,
    write_tokenizer,
)
from typer.testing import CliRunner

from openwork.cli import app

Run = Callable[..., str]
TEXT = "Once upon the time there were 1 and 12 things that the others thought about. " * 40


@pytest.fixture
def run() -> Run:
    """Runs the command and returns what it printed as its result."""

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


@pytest.fixture
def refuse() -> Run:
    """Runs the command, which must fail, and returns the one line it says why."""

    def refuse(*arguments: object, code: int = 1) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("openwork: ")]
        assert len(lines) == 1
        assert lines[0] == done.stderr.splitlines()[-1]
        return lines[0]

    return refuse


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(random_model(), tmp_path / "tiny.gguf", metadata=add_tokenizer)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = write_directory(random_model(), tmp_path / "dense")
    write_tokenizer(path / "tokenizer.json")
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
