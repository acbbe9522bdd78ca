"""Options and arguments of ``openwork compress``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from openwork.cli.options import Dtype
from openwork.cli.pruning import Allocation, PruneMethod, Storage


class Method(str, Enum):
    """The algorithms of :func:`openwork.quant.quantize_model`."""

    gptq = "gptq"
    rtn = "rtn"


Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)]
MethodOption = Annotated[Method, typer.Option(help="GPTQ looks at sample text; RTN only rounds.")]
Bits = Annotated[
    int | None,
    typer.Option(
        help="Bits of a weight: 2, 3, 4 or 8.", show_default="4; not quantized with --prune"
    ),
]
GroupSize = Annotated[
    int, typer.Option(help="Weights that share a scale: 16, 32, 64, 128, or 0 for a row.")
]
Symmetric = Annotated[
    bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")
]
PruneWith = Annotated[
    PruneMethod | None,
    typer.Option(
        "--prune",
        help="Remove weights in place of quantizing; sparsegpt does both at once with --bits. "
        "flap and llm_pruner remove whole heads and channels. The head stays as it is.",
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(help="Which weights stay: N:M, or V:N:M for V rows alike, such as 2:4."),
]
Sparsity = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Share of weights to remove, in place of --pattern."),
]
AllocationOption = Annotated[
    Allocation | None,
    typer.Option(
        help="Of --sparsity to linears: the same to each (uniform), what falls below one threshold "
        "on magnitudes (global; each keeps a tenth), or searched by running the model (evopress).",
        show_default="uniform",
    ),
]
StorageOption = Annotated[
    Storage | None,
    typer.Option(
        help="Of pruned weights: without zeros (sparse), with them, or what is faster here.",
        show_default="auto",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Sample text, UTF-8.", show_default="Wikipedia articles"),
]
Samples = Annotated[int, typer.Option(min=1, help="Pieces of the sample text to use.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a piece.")]
HeadBits = Annotated[
    int,
    typer.Option(
        help="Bits of the output head, rounded; 0 leaves it dense. With 8, an embedding tied "
        "to it is quantized too."
    ),
]
DenseDtype = Annotated[
    Dtype, typer.Option(help="Type in which weights that stay dense are written.")
]
Resume = Annotated[
    Path | None,
    typer.Option(help="Folder for intermediate results, to continue from if interrupted."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")]
