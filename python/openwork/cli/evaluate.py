"""``openwork eval``: perplexity of a model, and its distance from another one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openwork import models
from openwork.cli.files import read_text
from openwork.cli.options import Dtype, ModelPath, RunDtype, Threads, load_model, set_threads
from openwork.evaluation import evaluate as score
from openwork.models import Llama, Tokenizer
from openwork.models.demo import fetch_text


def evaluate(
    model: ModelPath,
    reference: Annotated[
        Path | None,
        typer.Option(help="Also compare with this model, usually the dense one."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to score on, UTF-8.", show_default="Wikipedia articles"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens the model sees at a time.")] = 1024,
    stride: Annotated[
        int, typer.Option(min=1, help="Tokens from one window's start to the next's.")
    ] = 512,
    max_windows: Annotated[
        int, typer.Option(min=0, help="Stop after this many windows; 0 for the whole text.")
    ] = 12,
    dtype: RunDtype = Dtype.float32,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a model on a text."""
    if stride >= window:
        raise typer.BadParameter(f"--stride must be below --window = {window}, got {stride}")
    set_threads(threads)
    llama, tokenizer = load_model(model, dtype)
    dense = None if reference is None else models.load(reference, dtype=dtype.torch)
    for path, loaded in ((model, llama), (reference, dense)):
        if loaded is not None:
            _check_window(path, loaded, window)
    tokens = text_tokens(tokenizer, text, window, stride, max_windows)
    result = score(llama, tokens, window=window, stride=stride, reference=dense)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
        return
    table = Table("", str(model), title=f"{result.tokens} tokens of {text or 'Wikipedia'}")
    table.add_row("perplexity", f"{result.ppl:.4g}")
    if result.kl is not None and result.agreement is not None:
        table.add_row(f"KL from {reference}", f"{result.kl:.4g} nats a token")
        table.add_row("same likeliest token", f"{result.agreement:.2%}")
    Console().print(table)


def text_tokens(
    tokenizer: Tokenizer, path: Path | None, window: int, stride: int, max_windows: int
) -> Tensor:
    """``[length]`` int64: as much of the text as ``max_windows`` windows take, 0 for all.

    Args:
        tokenizer: of the model.
        path: of the text; None for the evaluation half of the demo's.
        window, stride, max_windows: see :func:`openwork.evaluate`.

    Raises:
        OSError, FormatError, DownloadError: the text cannot be had.
        ValueError: it is shorter than two tokens.
    """
    content = fetch_text().evaluation if path is None else read_text(path)
    tokens = torch.tensor(tokenizer.encode(content), dtype=torch.int64)
    if len(tokens) < 2:
        raise ValueError(f"{path}: a text of 2 tokens or more expected, got {len(tokens)}")
    return tokens if max_windows == 0 else tokens[: window + (max_windows - 1) * stride]


def _check_window(path: Path | None, model: Llama, window: int) -> None:
    context = model.config.context_length
    if window > context:
        raise typer.BadParameter(f"--window must be at most {context} for {path}, got {window}")
