"""Options and arguments that several commands share, and loading what they name."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from openwork import models
from openwork.errors import FormatError
from openwork.models import Llama, Tokenizer


class Dtype(str, Enum):
    """Types of activations, and of weights that are not quantized."""

    float32 = "float32"
    bfloat16 = "bfloat16"

    @property
    def torch(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


def in_dtype(float32_bytes: int, dtype: Dtype) -> int:
    """Bytes in ``dtype`` of what takes so many in float32."""
    return float32_bytes * dtype.torch.itemsize // torch.float32.itemsize


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a Hugging Face directory, or a directory that compress wrote.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads to compute with.", show_default="one for each core"),
]
RunDtype = Annotated[
    Dtype, typer.Option(help="Type of activations and of weights that are not quantized.")
]


def set_threads(threads: int | None) -> None:
    """Compute with that many threads; None leaves torch's default."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_model(path: Path, dtype: Dtype) -> tuple[Llama, Tokenizer]:
    """A model that has a tokenizer.

    Raises:
        OSError, FormatError: see :func:`openwork.models.load`; also for a missing tokenizer.
    """
    model = models.load(path, dtype=dtype.torch)
    if model.tokenizer is None:
        raise FormatError(
            f"{path}: a tokenizer expected (in the GGUF file, or tokenizer.json beside the "
            "weights), got none that is known here"
        )
    return model, model.tokenizer
