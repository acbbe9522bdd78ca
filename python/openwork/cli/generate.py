"""``openwork generate``: text from a model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from openwork import models
from openwork.cli.options import Dtype, ModelPath, RunDtype, Threads, load_model, set_threads


def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0 for all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the random numbers.", show_default="a new one")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt as a message of a ChatML conversation.")
    ] = False,
    dtype: RunDtype = Dtype.float32,
    threads: Threads = None,
) -> None:
    """Continue a prompt, printing the text as it comes."""
    if not prompt:
        raise typer.BadParameter("--prompt must be some text, got none")
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"--top-p must be above 0 and at most 1, got {top_p}")
    if not math.isfinite(temperature):
        raise typer.BadParameter(f"--temperature must be finite, got {temperature}")
    set_threads(threads)
    llama, tokenizer = load_model(model, dtype)
    tokens = tokenizer.chat([("user", prompt)]) if chat else tokenizer.encode(prompt)
    context = llama.config.context_length
    if len(tokens) + max_new_tokens > context:
        raise typer.BadParameter(
            f"--prompt and --max-new-tokens must fit the model's context of {context} tokens, "
            f"got {len(tokens)} + {max_new_tokens}"
        )
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for token in models.generate(
            llama, tokens, max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        ):  # fmt: skip
            count += 1
            yield token

    if not chat:
        print(prompt, end="", flush=True)
    begin = time.perf_counter()
    for piece in tokenizer.stream(counted()):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - begin
    print()
    Console(stderr=True).print(
        f"{count} tokens after a prompt of {len(tokens)} in {seconds:.2f} s", style="dim"
    )
