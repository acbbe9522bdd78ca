"""``openwork demo``: one model, dense and quantized, side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from torch import Tensor

import openwork
from openwork import models, quant
from openwork.cli import llama_cpp
from openwork.cli.calibration import calibration_tokens
from openwork.cli.demo_report import Row, draw, table, to_json
from openwork.cli.files import check_writable, write_file
from openwork.cli.options import Dtype, Threads, load_model, set_threads
from openwork.evaluation import EvalResult, evaluate, predictions
from openwork.models import Llama, Tokenizer
from openwork.models.demo import SYSTEM_PROMPT, fetch_model, fetch_text
from openwork.throughput import Engine, Speed, engine, speeds

HEAD_BITS = 8
WINDOW, STRIDE = 1024, 512
PROMPT = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 80


@dataclass(frozen=True)
class Recipe:
    """A way to quantize the model."""

    method: Literal["gptq", "rtn"]
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.bits}bit-g{self.group_size}"


@dataclass(frozen=True)
class Plan:
    """How much work the demo does.

    Attributes:
        recipes: the first one also writes the text.
        samples, length: of the calibration.
        windows: to score on.
        rounds: turns of each model when timing.
    """

    recipes: tuple[Recipe, ...]
    samples: int
    length: int
    windows: int
    rounds: int


def _twins(bits: int, group_size: int) -> tuple[Recipe, Recipe]:
    """GPTQ, and the rounding it has to beat."""
    return Recipe("gptq", bits, group_size), Recipe("rtn", bits, group_size)


FULL = Plan(
    recipes=(*_twins(4, 128), *_twins(4, 64), *_twins(3, 32), Recipe("rtn", 2, 64)),
    samples=128,
    length=256,
    windows=8,
    rounds=5,
)
QUICK = Plan(recipes=_twins(4, 128), samples=16, length=256, windows=1, rounds=3)


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer formats, less text: shows that all works.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("demo-output"),
    json: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write the numbers to this file.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Quantize a real model, let it speak, and compare size, quality and speed.

    The model (SmolLM2-135M-Instruct, 93 MB) and the text (Wikipedia, 28 MB) are downloaded once.
    """
    plan = QUICK if quick else FULL
    plot = output / "quality-size.png"
    for target in (plot, json):
        if target is not None:
            check_writable(target)
    set_threads(threads)
    notes = Console(stderr=True)
    path = fetch_model()
    text = fetch_text()
    dense, tokenizer = load_model(path, Dtype.float32)

    candidates: dict[str, Llama] = {
        "dense-fp32": dense,
        "dense-bf16": models.load(path, dtype=torch.bfloat16),
    }
    calibration = calibration_tokens(
        tokenizer, text.calibration, plan.samples, plan.length, "the demo's text"
    )
    for recipe in plan.recipes:
        notes.print(f"quantizing: {recipe.name}")
        candidates[recipe.name] = _quantized(dense, recipe, calibration)
    _speak(candidates[plan.recipes[0].name], tokenizer, plan.recipes[0].name)
    tokens = torch.tensor(tokenizer.encode(text.evaluation), dtype=torch.int64)
    tokens = tokens[: WINDOW + (plan.windows - 1) * STRIDE]
    quality = _quality(candidates, tokens, notes)
    ours, theirs = _speed(candidates, path, tokens, plan.rounds, notes)
    rows = [
        Row(name, quant.model_bytes(model), quality[name], ours[name])
        for name, model in candidates.items()
    ]
    title = f"{path.stem}, {torch.get_num_threads()} threads, tier {openwork.isa()}"
    # The table says which build it was; the key in the JSON is the same everywhere.
    Console().print(table(rows, {llama_cpp.build(): s for s in theirs.values()}, title))
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_file(plot, draw(rows, path.stem))
    notes.print(f"wrote {plot}")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_file(json, to_json(rows, theirs))
        notes.print(f"wrote {json}")


def _quantized(dense: Llama, recipe: Recipe, calibration: Tensor) -> Llama:
    """A quantized copy. What is not quantized is shared with the dense model, not copied."""
    shared = {id(p): p for p in dense.parameters()} | {id(dense.tokenizer): dense.tokenizer}
    model = copy.deepcopy(dense, shared)
    quant.quantize_model(
        model,
        recipe.method,
        bits=recipe.bits,
        group_size=recipe.group_size,
        calibration=calibration if recipe.method == "gptq" else None,
        head_bits=HEAD_BITS,
    )
    return model


def _speak(model: Llama, tokenizer: Tokenizer, name: str) -> None:
    print(f"\n{PROMPT}\n{name}: ", end="", flush=True)
    tokens = tokenizer.chat([("system", SYSTEM_PROMPT), ("user", PROMPT)])
    for piece in tokenizer.stream(models.generate(model, tokens, ANSWER_TOKENS)):
        print(piece, end="", flush=True)
    print("\n")


def _quality(
    candidates: Mapping[str, Llama], tokens: Tensor, notes: Console
) -> dict[str, EvalResult]:
    """Every model against the first, the dense one."""
    notes.print(f"scoring on {len(tokens)} tokens")
    dense = next(iter(candidates.values()))
    reference = predictions(dense, tokens, window=WINDOW, stride=STRIDE)
    found = {}
    for name, model in candidates.items():
        notes.print(f"scoring: {name}")
        found[name] = evaluate(model, tokens, window=WINDOW, stride=STRIDE, reference=reference)
    return found


def _speed(
    candidates: Mapping[str, Llama], path: Path, tokens: Tensor, rounds: int, notes: Console
) -> tuple[dict[str, Speed], dict[str, Speed]]:
    """Of our models and of competitors' best formats in each phase, timed in turns."""
    engines = {name: engine(model) for name, model in candidates.items()}
    reason = llama_cpp.missing()
    if reason is None:
        notes.print(f"measuring {llama_cpp.NAME} too: {llama_cpp.describe()}", highlight=False)
        engines |= _llama_engines(path)
    else:
        notes.print(f"{llama_cpp.NAME} is not measured: {reason}", style="yellow")
    found = speeds(engines, tokens, rounds=rounds)
    ours = {name: found.pop(name) for name in candidates}
    for name, speed in found.items():
        notes.print(
            f"{name}: prefill {speed.prefill:.0f}, decode {speed.decode:.0f} tok/s", highlight=False
        )
    if not found:
        return ours, {}
    best = Speed(max(s.prefill for s in found.values()), max(s.decode for s in found.values()))
    return ours, {llama_cpp.NAME: best}


def _llama_engines(path: Path) -> dict[str, Engine]:
    """llama.cpp on the file as it is and, where it can write that, on its fastest 4-bit format."""
    engines = {f"{llama_cpp.NAME} {path.stem}": llama_cpp.engine(path)}
    if llama_cpp.can_requantize():
        with TemporaryDirectory() as folder:  # a file needs no name once it is mapped
            file = Path(folder) / "model.gguf"
            llama_cpp.requantize(path, file, llama_cpp.FASTEST, torch.get_num_threads())
            engines[f"{llama_cpp.NAME} {llama_cpp.FASTEST}"] = llama_cpp.engine(file)
    return engines
