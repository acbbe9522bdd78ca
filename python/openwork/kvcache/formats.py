"""How keys and values are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from openwork.kv_format import KVFormat
from openwork.kv_pages import KVPages

Rotation = Literal["stored", "read", "place"]


@dataclass(frozen=True)
class Format:
    """The format of a layer's keys and values.

    Attributes:
        keys, values: of the tokens in pages; None for the model's dtype.
        rotate: "stored": keys are rotated before they are stored; "read": when they are read, by
            their position in the text, so that what is stored varies less within a channel;
            "place": when they are read, by their place in the cache, so that no distance is longer
            than the cache (StreamingLLM). For "place", all heads must hold equally many.
        exact_first: first tokens of the text to keep in the model's dtype besides.
    """

    keys: KVFormat | None = None
    values: KVFormat | None = None
    rotate: Rotation = "stored"
    exact_first: int = 0

    def __post_init__(self) -> None:
        if self.exact_first < 0 or (self.exact_first and self.rotate == "place"):
            raise ValueError(
                "Format: exact_first must be at least 0, and 0 with rotation by place, got "
                f"{self.exact_first}"
            )

    def pages(
        self,
        rows: int,
        head_dim: int,
        max_len: int,
        page_size: int,
        dtype: torch.dtype,
        *,
        drafts: int,
        bounds: bool,
    ) -> KVPages:
        """Empty pages for a layer whose rows are sequences of one head."""
        plain = KVFormat(8 * dtype.itemsize)
        return KVPages.allocate(
            rows, 1, head_dim, max_len, keys=self.keys or plain, values=self.values or plain,
            dtype=dtype, page_size=page_size, drafts=drafts, bounds=bounds,
            positions=self.rotate == "read",
        )  # fmt: skip


def each_format(op: str, format: Format | Sequence[Format], layers: int) -> list[Format]:
    """One format for each layer.

    Args:
        op: who asks, for messages.
        format: one for all layers, or one for each.
        layers: how many.

    Raises:
        ValueError: another number of formats, or something else.
    """
    if isinstance(format, Format):
        return [format] * layers
    formats = list(format) if isinstance(format, Sequence) else [format]
    kinds = {type(x).__name__ for x in formats}
    if len(formats) != layers or kinds != {"Format"}:
        raise ValueError(
            f"{op}: a Format, such as kivi(4), or one for each of {layers} layers expected, got "
            f"{len(formats)} {' and '.join(sorted(kinds)) or 'of them'}"
        )
    return formats


def kivi(
    bits: int = 2, *, group_size: int = 32, residual: int = 128, rotate: Rotation = "stored"
) -> Format:
    """Keys on a grid for each channel, values on one for each token (KIVI).

    Keys of a channel share a scale and a minimum over ``group_size`` tokens, and are rounded when
    ``residual`` of them have come; values of a token share them over ``group_size`` channels, and
    are rounded one token at a time behind the last ``residual``.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: 32, 64 or 128.
        residual: tokens that stay exact, a multiple of the group size.
        rotate: see :class:`Format`; the paper's is "stored".

    Raises:
        ValueError: numbers that do not fit each other.

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024.
    """
    if residual < group_size or residual % group_size:
        raise ValueError(
            f"kivi: residual must be a multiple of group_size = {group_size}, got {residual}"
        )
    return Format(
        KVFormat(bits, "channel", group_size, step=residual),
        KVFormat(bits, "token", group_size, window=residual),
        rotate=rotate,
    )
