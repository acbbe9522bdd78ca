"""Sample text, cut into the pieces a calibration runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from openwork.models import Tokenizer


def calibration_tokens(
    tokenizer: Tokenizer, text: str, samples: int, length: int, where: str
) -> Tensor:
    """``[samples, length]`` int64: pieces that start at equal distances from each other.

    Raises:
        ValueError: the text has fewer tokens than that.
    """
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(tokens) < samples * length:
        raise ValueError(
            f"{where}: {samples} samples of {length} tokens of text expected, got {len(tokens)} "
            "tokens; ask for fewer with --samples or --length"
        )
    step = len(tokens) // samples
    return torch.stack([tokens[i * step : i * step + length] for i in range(samples)])
