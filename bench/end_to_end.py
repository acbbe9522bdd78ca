"""Tokens per second of a whole model: ours dense, ours quantized, and llama.cpp on the same file.

Two phases, both from an empty cache and on the same given tokens, without sampling:

    prefill    PREFILL tokens in one call
    decode     DECODE tokens one call each

Before it is timed, every engine's last token is compared with that of the dense float32 model
computed in one call without a cache. A row's ``median_s`` is seconds per token. Its roof counts the
weights read (once a token in decode, once a prompt in prefill) and two operations per weight and
token; attention is left out, so shares are slightly low.
"""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from bench.device import Stream
from bench.problem import CheckError
from openwork import throughput
from openwork.cli import llama_cpp
from openwork.cli.llama_cpp import Session, missing
from openwork.throughput import DECODE, PREFILL
from openwork.timing import Contender, Times, interleave

OP = "end_to_end"
PHASES = {"prefill": PREFILL, "decode": DECODE}
GROUP_SIZE, HEAD_BITS = 128, 8

# Largest accepted divergence from the dense model, KL(p_dense || p) in nats of the last token, by
# bits of the weights. Knowing nothing costs log(vocabulary) - entropy, 7 nats and more on text, so
# a wrong engine fails at any width; 4-bit round-to-nearest costs half a nat on average, and single
# tokens several times that.
MAX_DIVERGENCE = {32: 1e-4, 16: 0.1, 8: 0.5, 4: 4.0}

Run = Callable[[NDArray[np.int64]], NDArray[np.float32]]


@dataclass
class Engine:
    """A loaded model: logits [vocabulary] after a prefill and after a decode of tokens.

    ``linear_bytes`` and ``head_bytes`` are the bytes of weights, ``weights`` their number in the
    layers' linears and ``head_weights`` in the head; zero for engines that are only compared with.
    """

    name: str
    bits: int
    phases: dict[str, Run]
    unit: str = ""
    linear_bytes: int = 0
    head_bytes: int = 0
    weights: int = 0
    head_weights: int = 0


def sample_tokens(model: Any, count: int) -> NDArray[np.int64]:
    """``[count]`` token ids of real text, the same on every machine with this Python."""
    if model.tokenizer is None:
        raise ValueError("bench: end_to_end needs a model with a tokenizer, got none")
    tokens = model.tokenizer.encode(inspect.getsource(ArgumentParser))
    if len(tokens) < count:
        raise ValueError(f"bench: end_to_end needs {count} tokens of text, got {len(tokens)}")
    return np.asarray(tokens[:count], np.int64)


def _openwork_engine(name: str, bits: int, unit: str, model: Any) -> Engine:
    cache = model.new_cache(max(PHASES.values()))

    def phase(run: Callable[[Any, torch.Tensor, Any], torch.Tensor]) -> Run:
        return lambda tokens: run(model, torch.from_numpy(tokens), cache).float().numpy()

    linears = [getattr(parent, attribute) for _, parent, attribute in model.linears()]
    return Engine(
        name=name,
        bits=bits,
        phases={"prefill": phase(throughput.prefill), "decode": phase(throughput.decode)},
        unit=unit,
        linear_bytes=sum(linear.weight.nbytes for linear in linears),
        head_bytes=model.head.weight.nbytes,
        weights=sum(linear.in_features * linear.out_features for linear in linears),
        head_weights=model.head.in_features * model.head.out_features,
    )


def openwork_engines(path: Path) -> list[Engine]:
    """Dense in float32 and bfloat16, and quantized to 4 bit under activations of both types."""
    from openwork import models, quant

    engines = [
        _openwork_engine("dense-fp32", 32, "fp32", models.load(path, dtype=torch.float32)),
        _openwork_engine("dense-bf16", 16, "bf16", models.load(path, dtype=torch.bfloat16)),
    ]
    for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
        model = models.load(path, dtype=dtype)
        quant.quantize_model(
            model, "rtn", bits=4, group_size=GROUP_SIZE, head_bits=HEAD_BITS, progress=False
        )
        name = f"rtn-4bit-g{GROUP_SIZE}{suffix}"
        engines.append(_openwork_engine(name, 4, "int8", model))
    return engines


def llama_engines(path: Path, threads: int, stack: ExitStack) -> list[Engine]:
    """llama.cpp on ``path`` itself and on its requantizations, freed with ``stack``."""
    folder = Path(stack.enter_context(TemporaryDirectory()))
    # Without the quantizer only the file itself runs, and counts as one of the 4-bit ones.
    files = {path.stem: (path, 4)}
    if llama_cpp.can_requantize():
        files = {}
        for name, (_, bits) in llama_cpp.FORMATS.items():
            files[name] = (folder / f"{name}.gguf", bits)
            llama_cpp.requantize(path, files[name][0], name, threads)
    engines = []
    for name, (file, bits) in files.items():
        session = Session(file, threads=threads, max_tokens=PREFILL)
        stack.callback(session.close)
        phases: dict[str, Run] = {"prefill": session.prefill, "decode": session.decode}
        engines.append(Engine(f"llama.cpp {name}", bits, phases))
    return engines


def divergence(logits: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """``KL(softmax(reference) || softmax(logits))`` in nats, in float64."""
    log_q, log_p = (
        torch.from_numpy(np.asarray(values, np.float64)).log_softmax(-1)
        for values in (logits, reference)
    )
    return float((log_p.exp() * (log_p - log_q)).sum())


def _check(engine: Engine, tokens: NDArray[np.int64], reference: dict[str, Any]) -> None:
    limit = MAX_DIVERGENCE[engine.bits]
    for phase, count in PHASES.items():
        found = divergence(engine.phases[phase](tokens[:count]), reference[phase])
        if not found <= limit:
            raise CheckError(
                f"{engine.name}: {phase} must be within {limit} nats of the dense model, "
                f"got {found:.3g}"
            )


def _discard(run: Run, tokens: NDArray[np.int64], group: int) -> None:
    """A contender's signature: the one data set there is, and no result."""
    run(tokens)


def _time(
    engines: Sequence[Engine],
    phase: str,
    tokens: NDArray[np.int64],
    rounds: int,
    seconds: float,
    **others: Contender,
) -> dict[str, Times]:
    count = PHASES[phase]
    given = tokens[:count]
    contenders = {
        engine.name: Contender(partial(_discard, engine.phases[phase], given), 1, count)
        for engine in engines
    }
    return interleave({**contenders, **others}, rounds=rounds, seconds=seconds)


def _fastest(engines: Sequence[Engine], phase: str, tokens: NDArray[np.int64]) -> Engine | None:
    """The engine to compare with: of the 4-bit ones in decode, of all in prefill."""
    chosen = [engine for engine in engines if phase == "prefill" or engine.bits == 4]
    if not chosen:
        return None
    times = _time(chosen, phase, tokens, rounds=2, seconds=0.0)
    return min(chosen, key=lambda engine: times[engine.name].median)


def _row(
    engine: Engine,
    phase: str,
    times: dict[str, Times],
    rival: Engine | None,
    params: dict[str, Any],
) -> dict[str, Any]:
    """A row without tier and rates; the caller has the peaks to fill them in."""
    own = times[engine.name]
    rivals = {"dense_fp32": "dense-fp32", "dense_bf16": "dense-bf16"}
    if rival is not None:
        rivals["llama_cpp"] = rival.name
    count = PHASES[phase]
    reads = count if phase == "decode" else 1
    return {
        "op": OP,
        "params": {**params, "phase": phase, "tokens": count, "weights": engine.name},
        "median_s": own.median,
        "iqr_s": own.iqr,
        "tokens_per_s": 1 / own.median,
        "speedup": {
            key: times[name].median / own.median
            for key, name in rivals.items()
            if name != engine.name
        },
        "competitors": {
            key: {"median_s": times[name].median, "iqr_s": times[name].iqr, "variant": name}
            for key, name in rivals.items()
        },
        "checked": True,
        # Per token, as the times are. The head runs for one token of a prompt.
        "bytes": (engine.linear_bytes + engine.head_bytes) * reads / count,
        "ops": 2 * (engine.weights + engine.head_weights * reads / count),
        "unit": engine.unit,
    }


def run(
    path: Path,
    *,
    threads: int,
    rounds: int,
    seconds: float,
    stream: Stream,
    console: Console,
) -> list[dict[str, Any]]:
    """Rows of both phases for every openwork engine; rates are added by the caller."""
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        ours = openwork_engines(path)
        theirs: list[Engine] = []
        reason = missing()
        if reason:
            console.print(f"[yellow]skipped llama.cpp: {reason}")
        else:
            theirs = llama_engines(path, threads, stack)

        from openwork import models

        model = models.load(path, dtype=torch.float32)
        tokens = sample_tokens(model, max(PHASES.values()))
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens)[None])[0]
        reference = {phase: logits[count - 1].numpy() for phase, count in PHASES.items()}
        for engine in (*ours, *theirs):
            _check(engine, tokens, reference)

        rows = []
        params = {"model": path.stem, "threads": threads}
        for phase in PHASES:
            rival = _fastest(theirs, phase, tokens)
            timed = [*ours, *([rival] if rival else [])]
            reads: list[float] = []
            times = _time(timed, phase, tokens, rounds, seconds, read=stream.read_into(reads))
            read = {"read_gb_s": median(reads) / 1e9}
            rows += [_row(engine, phase, times, rival, params) | read for engine in ours]
        return rows
