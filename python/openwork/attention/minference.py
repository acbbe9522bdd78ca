"""MInference: a pattern for each head, searched on real text and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from openwork import ops
from openwork.attention.block_topk import block_topk_index
from openwork.attention.estimated import Estimated
from openwork.attention.policy import Dense
from openwork.attention.probe import each_layer
from openwork.attention.shapes import a_shape_index, select_heads
from openwork.attention.vertical_slash import vertical_slash_index
from openwork.block_index import BlockIndex
from openwork.errors import FormatError
from openwork.models import Llama

Kind = Literal["a_shape", "vertical_slash", "block_topk"]


@dataclass(frozen=True)
class HeadPattern:
    """What a head visits.

    Attributes:
        kind: "a_shape": the first ``first`` keys and the nearest ``second``; "vertical_slash":
            ``first`` columns and ``second`` diagonals; "block_topk": ``first`` blocks.
        first, second: see kind.
    """

    kind: Kind
    first: int
    second: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("a_shape", "vertical_slash", "block_topk"):
            raise ValueError(
                "HeadPattern: kind must be a_shape, vertical_slash or block_topk, got "
                f"{self.kind!r}"
            )
        if self.first < 0 or self.second < 0:
            raise ValueError(
                f"HeadPattern: numbers of at least 0 expected, got {self.first} and {self.second}"
            )


# Of about equal density at 4096 tokens: with blocks of 64, a slash costs one to two blocks a row.
CANDIDATES = (
    HeadPattern("a_shape", 64, 1024),
    HeadPattern("vertical_slash", 30, 800),
    HeadPattern("vertical_slash", 100, 700),
    HeadPattern("vertical_slash", 500, 400),
    HeadPattern("vertical_slash", 1000, 100),
    HeadPattern("block_topk", 16),
)


@dataclass(frozen=True)
class MInference(Estimated):
    """A pattern for each head of each layer (MInference).

    Attributes:
        heads: for each layer the pattern of each query head.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", 2024.
    """

    heads: tuple[tuple[HeadPattern, ...], ...]

    def index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> BlockIndex:
        heads = self.heads[layer] if layer < len(self.heads) else ()
        if len(heads) != q.shape[2]:
            raise ValueError(
                f"MInference: patterns of {q.shape[2]} heads expected in layer {layer}, got "
                f"{len(heads)}"
            )
        # One estimate of each kind serves all of its heads; in those of others it marks nothing.
        kinds = list(dict.fromkeys(head.kind for head in heads))
        indexes = [
            _index(
                kind,
                [head.first if head.kind == kind else 0 for head in heads],
                [head.second if head.kind == kind else 0 for head in heads],
                q,
                k,
                scale,
            )
            for kind in kinds
        ]
        return select_heads(indexes, [kinds.index(head.kind) for head in heads])

    def save(self, path: str | Path) -> None:
        """Write the patterns as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        heads = [[asdict(head) for head in layer] for layer in self.heads]
        Path(path).write_text(json.dumps({"heads": heads}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> MInference:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: the file is missing or unreadable.
            FormatError: it holds something else.
        """
        try:
            heads = json.loads(Path(path).read_text())["heads"]
            return cls(tuple(tuple(HeadPattern(**head) for head in layer) for layer in heads))
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{path}: patterns of heads expected, got {error}") from error


def _index(
    kind: Kind,
    first: Sequence[int],
    second: Sequence[int],
    q: Tensor,
    k: Tensor,
    scale: float | None,
) -> BlockIndex:
    """What heads of one kind visit, from their numbers (:class:`HeadPattern`)."""
    if kind == "a_shape":
        lengths = [q.shape[1]] * q.shape[0], [k.shape[1]] * k.shape[0]
        return a_shape_index(*lengths, sinks=first, window=second)
    if kind == "vertical_slash":
        return vertical_slash_index(q, k, first, second, scale=scale)
    return block_topk_index(q, k, first, scale=scale)


@torch.inference_mode()
def search_patterns(
    model: Llama,
    tokens: Tensor,
    *,
    density: float = 0.35,
    candidates: Sequence[HeadPattern] = CANDIDATES,
) -> MInference:
    """Find the pattern that changes each head's output least, on a text.

    Args:
        model: the model.
        tokens: ``[n]`` int64, a text as long as the prompts to come.
        density: of the patterns to choose from; a head for which all are denser gets the sparsest.
        candidates: to choose from.

    Returns:
        The policy.

    Raises:
        ValueError: no candidates, or a density outside 0 .. 1.
    """
    if not candidates or not 0 < density <= 1:
        raise ValueError(
            "search_patterns: candidates and a density above 0, at most 1, expected, got "
            f"{len(candidates)} and {density}"
        )
    found: list[tuple[HeadPattern, ...]] = []
    dense = Dense()

    def choose(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        n, heads = q.shape[1], q.shape[2]
        exact = dense(layer, q, k, v).o.float()
        ranks = []
        for pattern in candidates:
            numbers = [pattern.first] * heads, [pattern.second] * heads
            index = _index(pattern.kind, *numbers, q, k, None)
            o = cast(Tensor, ops.block_attention(q, k, v, index)).float()
            error = (o - exact).square().sum((0, 1, 3)).tolist()
            costs = [_head(index, x).density([n], [n]) for x in range(heads)]
            ranks.append([(max(c, density), e) for c, e in zip(costs, error, strict=True)])
        found.append(
            tuple(
                candidates[min(range(len(candidates)), key=lambda i: ranks[i][x])]
                for x in range(heads)
            )
        )

    each_layer(model, tokens[None], choose)
    return MInference(tuple(found))


def _head(index: BlockIndex, head: int) -> BlockIndex:
    """One head of an index."""

    def part(indptr: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        begin, end = int(indptr[head, 0]), int(indptr[head, -1])
        return indptr[head : head + 1] - begin, items[begin:end]

    columns: tuple[Tensor, Tensor] | tuple[()] = ()
    if index.column_indptr is not None and index.columns is not None:
        columns = part(index.column_indptr, index.columns)
    return BlockIndex(*part(index.indptr, index.indices), index.block_m, index.block_n, *columns)
