"""llama.cpp on the demo's model file, by the ``xllamacpp`` package where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from openwork.throughput import DECODE, PREFILL, Engine

NAME, PACKAGE = "llama.cpp", "xllamacpp"


def missing() -> str | None:
    """Why llama.cpp cannot run here, or None."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    return f"{NAME} is not measured: package {PACKAGE} is not installed"


def engine(path: Path) -> Engine:
    """llama.cpp with ``path`` loaded, on as many threads as torch uses.

    Its server is asked directly, without a network. Decoding starts from one token and makes the
    rest itself, taking the likeliest: as many passes through the model as with tokens given.
    """
    llama = importlib.import_module(PACKAGE)
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx = PREFILL + DECODE
    params.n_batch = params.n_ubatch = PREFILL
    params.n_parallel = 1
    params.verbosity = -1
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = torch.get_num_threads()
    server = llama.Server(params)

    def complete(tokens: list[int], count: int) -> None:
        answer = server.handle_completions(
            {
                "prompt": tokens,
                "n_predict": count,
                "temperature": 0.0,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        made = answer.get("timings", {}).get("predicted_n")
        if made != count:
            raise RuntimeError(f"{NAME}: {count} tokens expected, got {made}: {answer}")

    def prefill(tokens: Tensor) -> None:
        complete(tokens.tolist(), 1)

    def decode(tokens: Tensor) -> None:
        complete(tokens[:1].tolist(), len(tokens))

    return Engine(prefill, decode)
