"""Tokens that matter less in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openwork import ops
from openwork.kv_format import KVFormat
from openwork.kv_pages import KVPages
from openwork.kvcache.formats import Format
from openwork.kvcache.policy import Kept, LayerPolicy, Policy, Prompt, State
from openwork.kvcache.rows import Rows, all_heads, append_rows, attend_all, kept_rows, query_rows
from openwork.ops.paged_attention import MAX_QUERIES

_PAGE = 128  # whole groups of any size
_TWO_BITS = Format(KVFormat(2, "channel", 32), KVFormat(2, "token", 32))


@dataclass(frozen=True)
class MixedPrecision:
    """Another policy's choice of a prompt in the cache's format, and the rest of it in fewer bits.

    Nothing is dropped: what ``policy`` would not keep is quantized further, and attended to like
    everything else. What comes after the prompt is held in the cache's format.

    Attributes:
        policy: chooses what matters: :class:`~openwork.kvcache.Saliency`, or any other that looks
            at prompts alone.
        rest: the format of the other tokens; 2 bits if it is not given.

    Sources: He et al., "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token
    Identification", 2024; Yang et al., "No Token Left Behind: Reliable KV Cache Compression via
    Importance-Aware Mixed Precision Quantization", 2024.

    Example:
        >>> from openwork.kvcache import Cache, MixedPrecision, Saliency, kivi
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=64, ffn_size=48, layers=1,
        ...                           heads=2, kv_heads=1, head_dim=32, context_length=1024))
        >>> policy = MixedPrecision(Saliency(budget=400))
        >>> cache = Cache(model, 1024, format=kivi(4), policy=policy)
        >>> with torch.inference_mode():
        ...     logits = model(torch.arange(1000)[None] % 64, cache)
        >>> cache.held.tolist()  # in 4 bits; the other 600 have 2
        [[[400]]]
    """

    policy: Policy
    rest: Format = _TWO_BITS

    def __post_init__(self) -> None:
        if self.rest.rotate != "stored" or self.rest.exact_first:
            raise ValueError(
                'MixedPrecision: rest of rotate = "stored" and exact_first = 0 expected, got '
                f'"{self.rest.rotate}" and {self.rest.exact_first}'
            )

    def layer(self, index: int) -> LayerPolicy:
        inner = self.policy.layer(index)
        if inner.stateful:
            raise ValueError(
                "MixedPrecision: a policy that keeps no account of tokens expected, got "
                f"{type(self.policy).__name__}"
            )
        return _MixedLayer(inner, self.rest)


class _MixedLayer(LayerPolicy):
    """Holds the rest of the prompts in pages of its own."""

    stateful = holds = True

    def __init__(self, inner: LayerPolicy, rest: Format) -> None:
        self.pages = inner.pages
        self._inner, self._format = inner, rest
        self._coming: list[Rows] = []  # of sequences that have no pages yet
        self._rest: KVPages | None = None

    @property
    def nbytes(self) -> int:
        rest = self._store()
        return 0 if rest is None else rest.bytes()

    def compress(self, prompt: Prompt) -> Kept | None:
        kept = self._inner.compress(prompt)
        if kept is not None and (kept.keys is not None or kept.values is not None):
            raise ValueError("MixedPrecision: a policy that merges no tokens expected, got one")
        mask = torch.ones(prompt.keys.shape[:3], dtype=torch.bool) if kept is None else kept.mask
        rest = Prompt(prompt.rotated, prompt.rotated, prompt.values, prompt.columns)
        self._coming.append(kept_rows(rest, Kept(~mask)))
        return kept

    def elsewhere(self, q: Tensor, scale: float) -> State | None:
        rest = self._store()
        if rest is None:
            return None
        g = len(rest.lengths) // q.shape[0]
        if q.shape[1] > MAX_QUERIES:
            keys, values = (x.squeeze(1) for x in ops.kv_read(rest))
            return attend_all(q, keys, values, rest.lengths[:, 0], scale)
        # Every query sees every token, so they are heads of one.
        rows = query_rows(q, g)
        o, lse = ops.paged_attention(
            rows.flatten(1, 2).unsqueeze(1), rest, scale=scale, return_lse=True
        )
        return State(
            all_heads(o.view(*rows.shape[:3], -1), g), all_heads(lse.view(rows.shape[:3]), g)
        )

    def reorder(self, order: Tensor) -> None:
        rest = self._store()
        if rest is not None:
            g = len(rest.lengths) // len(order)
            rest.reorder((order.unsqueeze(-1) * g + torch.arange(g)).flatten())

    def _store(self) -> KVPages | None:
        """The pages, once all sequences are known; None for no tokens."""
        most = max((part.places.shape[1] for part in self._coming), default=0)
        if most:
            keys = self._coming[0].keys
            count = sum(len(part.keys) for part in self._coming)
            self._rest = self._format.pages(
                count, keys.shape[-1], most, _PAGE, keys.dtype, drafts=0, bounds=False
            )
            append_rows(self._rest, self._coming, 0)
        self._coming = []
        return self._rest
