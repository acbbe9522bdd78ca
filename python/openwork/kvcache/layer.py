"""The compressed cache of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from openwork import ops
from openwork.kvcache.collected import Collected, Tokens
from openwork.kvcache.compression import (
    append_kept,
    check_plain,
    columns_of,
    compress_padded,
    held_scores,
    kept_tokens,
    prompt_of,
)
from openwork.kvcache.formats import Format
from openwork.kvcache.policy import Held, Kept, LayerPolicy, Prompt, State
from openwork.kvcache.selection import Selection

# Queries that one operator reads the pages for.
_DECODE = 8


# Attention of a whole prompt: q [b, t, h, d], keys [b, g, t, d] and values alike to [b, t, h, d].
PromptAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerCache:
    """Keys and values of one layer.

    Args:
        batch: sequences.
        heads: query heads.
        kv_heads: key heads.
        head_dim: width of a head.
        max_len: tokens that a head can hold.
        format: how they are stored.
        policy: which of them are kept and read.
        page_size: tokens of a page: 32, 64 or 128.
        dtype: of queries, keys and values.
        drafts: tokens of a step that :meth:`rollback` takes back without a trace.
        rope: cos and sin of every position, ``[max_len, head_dim / 2]`` float32 each, for formats
            that rotate when reading.

    Attributes:
        pages: the tokens held. Row ``s * kv_heads + g`` is a sequence of one head there, since
            heads hold different numbers of tokens.
        collecting: a prompt comes in chunks: "whole", to be taken up as one by the :meth:`settle`
            after this is None again, or "bounded", compressed before each further chunk.
        seen: tokens that came, the position of the next one.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_len: int,
        *,
        format: Format,
        policy: LayerPolicy,
        page_size: int,
        dtype: torch.dtype,
        drafts: int = 0,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.pages = format.pages(
            batch * kv_heads, head_dim, max_len, page_size, dtype,
            drafts=drafts, bounds=policy.pages is not None,
        )  # fmt: skip
        self.batch = batch
        self._shape = batch, heads, kv_heads, head_dim
        self.format, self.policy, self.drafts = format, policy, drafts
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None
        if format.rotate != "stored":
            if rope is None:
                raise ValueError("LayerCache: rope for a format that rotates expected, got None")
            self._cos, self._sin = rope
        self._scale = 1 / math.sqrt(head_dim)
        self.seen = 0
        self.collecting: Literal["whole", "bounded"] | None = None
        self._prompt: Collected | None = None
        # Queries of a step that quantization and the policy wait to see.
        self._step_q: Tensor | None = None
        self._settled = 0  # last tokens of those behind that which can be taken back
        self._exact: tuple[Tensor, Tensor] | None = None
        self._selection = Selection(policy.pages, self.pages)

    @property
    def lengths(self) -> Tensor:
        """``[b, g]`` int64: tokens held, those kept exactly among them."""
        b, _, g, _ = self._shape
        if self._prompt is not None:
            starts = self._prompt.starts
            starts = torch.zeros(b, dtype=torch.int64) if starts is None else starts
            return (self._prompt.length - starts).unsqueeze(-1).expand(b, g)
        exact = 0 if self._exact is None else self._exact[0].shape[1]
        return self.pages.lengths.view(b, g).long() + exact

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, the tails, and the tokens kept exactly."""
        exact = sum(x.nbytes for x in self._exact or ())
        return self.pages.bytes() + exact + (0 if self._prompt is None else self._prompt.nbytes)

    @property
    def revocable(self) -> int:
        """The last tokens that :meth:`rollback` can take back."""
        if self._prompt is not None:
            return min(int(self.lengths.min()), self._prompt.tokens.q.shape[1])
        return self._settled + (0 if self._step_q is None else self._step_q.shape[1])

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, prompt: PromptAttention) -> Tensor:
        """:meth:`attend`, as :class:`~openwork.models.kv_cache.Attend` asks it."""
        _, h, g, _ = self._shape
        t = qkv.shape[1]
        q, keys, values = qkv[:, :, :h], qkv[:, :, h : h + g], qkv[:, :, h + g :]
        self.settle()
        if self.format.rotate == "place" and self._cos is not None and self._sin is not None:
            place = int(self.lengths.max())
            cos, sin = self._cos[place : place + t], self._sin[place : place + t]
        q, rotated = ops.rope(q, cos, sin), ops.rope(keys, cos, sin)
        return self.attend(q, keys, rotated, values, prompt).flatten(2)

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        rotated: Tensor,
        values: Tensor,
        prompt: PromptAttention,
        scale: float | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Attend to what is held and to the new tokens, and take those up.

        Args:
            q: ``[b, t, h, d]``, rotated.
            keys: ``[b, t, g, d]``, of the same tokens, before rotation; ``rotated`` after it.
            values: alike.
            prompt: attends in a prompt, for the first tokens of all.
            scale: of the scores; None: ``1 / sqrt(d)``.
            starts: ``[b]`` int64 of a prompt: how many of each sequence's first tokens are padding,
                which is not taken up; None: none.

        Returns:
            ``[b, t, h, d]``.

        Raises:
            ValueError: padding with a format or a policy that has no room for different lengths.
        """
        if scale is not None:
            self._scale = scale
        self.settle()
        t = q.shape[1]
        if self._prompt is not None or self.seen == 0:
            _, _, rotated, values = self._collect(Tokens(q, keys, rotated, values), starts).tokens
            o = prompt(q, rotated.transpose(1, 2), values.transpose(1, 2))
            if self.drafts == 0:
                self.settle()
            return o
        if t <= _DECODE:
            o = self._step(q, keys, rotated, values)
        else:
            o = self._continue(q, rotated, values)
            self._append(keys, rotated, values)
        self._step_q = q
        if t > self.drafts:
            self.settle()
        return o

    def _collect(self, chunk: Tokens, starts: Tensor | None) -> Collected:
        """The prompt so far with one more chunk."""
        self.seen += chunk.q.shape[1]
        if self._prompt is None:
            if starts is not None:
                check_plain("padding", self.format, self.policy)
                if self.collecting == "bounded":
                    raise ValueError("padding: prefilling in memory that is not bounded expected")
            self._prompt = Collected(chunk, starts)
            return self._prompt
        if self.collecting == "bounded":
            prompt = prompt_of(self._prompt.tokens, self._scale)
            kept = self.policy.compress(prompt)
            if kept is not None:
                self._prompt.shrink(kept)
        self._prompt.add(chunk)
        return self._prompt

    def settle(self) -> None:
        """Take up what waits: a prompt, unless more of it comes, or the last step."""
        if self._prompt is not None and self.collecting is None:
            tokens, starts = self._prompt.tokens, self._prompt.starts
            self._prompt = None
            if starts is None:
                self.take(*tokens[1:], columns_of(tokens, self._scale))
                self._settled = min(self._settled, tokens.q.shape[1])
            else:
                prompt, kept = compress_padded(self.policy, tokens, starts, self._scale)
                lengths = (prompt.length - starts).unsqueeze(-1)
                dropped = bool((kept.mask.sum(-1) < lengths).any())
                self._settled = 0 if dropped else int(lengths.min())
                append_kept(self.pages, prompt, kept, 0)
        if self._step_q is not None:
            q, self._step_q = self._step_q, None
            if self.drafts:
                ops.kv_commit(self.pages)
            self._settled += q.shape[1]
            if self._trim(q) or self.policy.stateful:
                self._settled = 0

    def rollback(self, n: int) -> None:
        """Forget the last tokens, at most :attr:`revocable`."""
        if n == 0:
            return
        self.seen -= n
        if self._prompt is not None:
            self._prompt.drop(n)
            self._prompt = self._prompt if self.seen else None
            return
        if self._step_q is not None:
            left = self._step_q.shape[1] - n
            self._settled += min(left, 0)
            self._step_q = self._step_q[:, :left] if left > 0 else None
        else:
            self._settled -= n
        if self._exact is not None:
            kept = min(self._exact[0].shape[1], self.seen)
            n -= self._exact[0].shape[1] - kept
            self._exact = (self._exact[0][:, :kept], self._exact[1][:, :kept]) if kept else None
        ops.kv_rollback(self.pages, torch.full_like(self.pages.lengths[:, 0], n))
        if n >= self.pages.page_size:  # fewer are about to be written again
            self.pages.trim()
        self._selection.forget()

    def reorder(self, order: Tensor) -> None:
        """Let sequence ``i`` go on as ``order[i]`` was; pages that several go on from are shared.

        Args:
            order: ``[b]`` int64.
        """
        b, _, g, _ = self._shape
        if torch.equal(order, torch.arange(b)):
            return
        self.pages.reorder((order.unsqueeze(-1) * g + torch.arange(g)).flatten())
        if self._prompt is not None:
            self._prompt.reorder(order)
        elif self.seen:  # policies have seen nothing of a prompt that waits
            self.policy.reorder(order)
        if self._step_q is not None:
            self._step_q = self._step_q[order]
        if self._exact is not None:
            self._exact = self._exact[0][order], self._exact[1][order]
        self._selection.forget()

    def take(
        self,
        keys: Tensor,
        rotated: Tensor,
        values: Tensor,
        columns: Callable[[int], Tensor],
    ) -> None:
        """Take up a prompt, or what the policy keeps of it.

        Args:
            keys: ``[b, n, g, d]``, as they were before rotation.
            rotated: alike, after it.
            values: ``[b, n, g, d]``.
            columns: see :class:`~openwork.kvcache.Prompt`.
        """
        n = keys.shape[1]
        first = min(self.format.exact_first, n)
        if first:
            self._exact = rotated[:, :first].clone(), values[:, :first].clone()
        stored = rotated if self.format.rotate == "stored" else keys
        prompt = Prompt(
            stored[:, first:].transpose(1, 2),
            values[:, first:].transpose(1, 2),
            lambda last: columns(last)[..., first:],
        )
        kept = self.policy.compress(prompt) if n > first else None
        self.seen = max(self.seen, n)  # a prompt in bounded memory has lost some
        self._settled = n if kept is None and not self.policy.stateful else 0
        if kept is None:
            kept = Kept(torch.ones(prompt.keys.shape[:3], dtype=torch.bool))
        append_kept(self.pages, prompt, kept, first)

    def _append(self, keys: Tensor, rotated: Tensor, values: Tensor) -> None:
        t = keys.shape[1]
        stored = rotated if self.format.rotate == "stored" else keys
        positions = None
        if self.pages.positions is not None:
            positions = torch.arange(self.seen, self.seen + t, dtype=torch.int32)
            positions = positions.repeat(len(self.pages.positions), 1)
        ops.kv_append(
            self.pages,
            *(x.transpose(1, 2).reshape(-1, t, 1, x.shape[-1]) for x in (stored, values)),
            positions=positions,
            commit=t > self.drafts,
        )
        self.seen += t

    def _step(self, q: Tensor, keys: Tensor, rotated: Tensor, values: Tensor) -> Tensor:
        """A few tokens: into the pages first, then one read of the pages for all of them."""
        b, h, g, d = self._shape
        t = q.shape[1]
        self._append(keys, rotated, values)
        rows = q.view(b, t, g, h // g, d).transpose(1, 2).reshape(b * g, t, h // g, d)
        o, lse = ops.paged_attention(
            rows,
            self.pages,
            selected=self._selection.of(rows, self.seen),
            scale=self._scale,
            return_lse=True,
            cos=self._cos,
            sin=self._sin,
        )
        return self._merged(q, State(self._heads(o), self._heads(lse)))

    def _continue(self, q: Tensor, rotated: Tensor, values: Tensor) -> Tensor:
        """Many tokens after others: to what is held, and causally to each other."""
        b, h, g, d = self._shape
        t = q.shape[1]
        keys, held_values = self._read()
        lengths = self.pages.lengths[:, 0]
        held = torch.arange(keys.shape[1]) < lengths.unsqueeze(-1)
        rows = q.view(b, t, g, h // g, d).transpose(1, 2).reshape(1, b * g * t, h // g, d)
        past = ops.block_attention(
            rows,
            keys[held].view(1, -1, 1, d),
            held_values[held].view(1, -1, 1, d),
            causal=False,
            scale=self._scale,
            return_lse=True,
            cu_seqlens_q=torch.arange(0, b * g * t + 1, t, dtype=torch.int32),
            cu_seqlens_k=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        )
        own = State(*ops.block_attention(q, rotated, values, scale=self._scale, return_lse=True))
        earlier = State(*(self._heads(x.view(b * g, t, *x.shape[2:])) for x in past))
        return self._merged(q, State(*ops.merge_states(*own, *earlier)))

    def _heads(self, x: Tensor) -> Tensor:
        """``[b g, t, h / g, ...] -> [b, t, h, ...]``."""
        b, h, g, _ = self._shape
        x = x.view(b, g, *x.shape[1:]).transpose(1, 2)
        return x.reshape(b, x.shape[1], h, *x.shape[4:])

    def _merged(self, q: Tensor, state: State) -> Tensor:
        """The output, with what is held elsewhere than in pages."""
        more = [self.policy.elsewhere(q, self._scale)]
        if self._exact is not None:
            options: dict[str, Any] = {"causal": False, "scale": self._scale, "return_lse": True}
            more.append(State(*ops.block_attention(q, *self._exact, **options)))
        for other in more:
            if other is not None:
                state = State(*ops.merge_states(*state, *other))
        return state.o

    def _read(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of every row: ``[b g, n, d]``; zeros past a row's length."""
        keys, values = (x.squeeze(1) for x in ops.kv_read(self.pages))
        if self._cos is not None and self._sin is not None:
            rows, n = keys.shape[:2]
            places = torch.arange(n).expand(rows, n)
            if self.pages.positions is not None:
                places = self.pages.positions[:, 0, :n].long()
            cos, sin = self._cos[places], self._sin[places]
            x1, x2 = keys.float().chunk(2, -1)
            keys = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(keys.dtype)
        return keys, values

    def _trim(self, q: Tensor) -> bool:
        """Let the policy drop tokens after a step; whether it did."""
        b, _, g, d = self._shape
        lengths = self.pages.lengths.view(b, g).long()

        def columns() -> Tensor:
            return held_scores(q, self._read()[0].view(b, g, -1, d), lengths, self._scale)

        def read() -> tuple[Tensor, Tensor]:
            keys, values = ops.kv_read(self.pages)
            return keys.view(b, g, -1, d), values.view(b, g, -1, d)

        mask = self.policy.trim(Held(lengths, q.shape[1], columns, read))
        if mask is None:
            return False
        kept = kept_tokens(mask.flatten(0, 1))
        ops.kv_compact(self.pages, kept.where(kept < mask.shape[-1], -1).unsqueeze(1).int())
        return True
