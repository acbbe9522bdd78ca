"""The compressed cache of one layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from openwork import ops
from openwork.kvcache.budgets import kept_tokens
from openwork.kvcache.collected import Collected, Tokens
from openwork.kvcache.compression import columns_of, held_scores, prompt_of
from openwork.kvcache.first_tokens import FirstTokens
from openwork.kvcache.formats import Format
from openwork.kvcache.policy import Held, LayerPolicy, Prompt, State
from openwork.kvcache.rows import Rows, all_heads, append_rows, attend_all, kept_rows, query_rows
from openwork.kvcache.selection import Selection
from openwork.ops.paged_attention import MAX_QUERIES

# Attention of a whole prompt: q [b, t, h, d], keys [b, g, t, d] and values alike to [b, t, h, d].
PromptAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
Columns = Callable[[int], Tensor]


class _Step(NamedTuple):
    """Tokens that quantization and the policy wait to see.

    Attributes:
        q: ``[b, t, h, d]``.
        lse: ``[b, t, h]`` float32, of all that they attended to.
    """

    q: Tensor
    lse: Tensor


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
        rope: cos and sin of every position, ``[max_len, head_dim / 2]`` float32 each, or of every
            place there will be, for formats that rotate when reading.

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
        if format.rotate == "place" and policy.holds:
            raise ValueError(
                "LayerCache: a policy that holds no tokens itself expected with rotation by place, "
                f"got {type(policy).__name__.strip('_')}"
            )
        self._scale = 1 / math.sqrt(head_dim)
        self.seen = 0
        self.collecting: Literal["whole", "bounded"] | None = None
        self._prompt: Collected | None = None
        self._waiting: _Step | None = None
        self._settled = 0  # last tokens before those that wait which can be taken back
        self._first: FirstTokens | None = None
        self._selection = Selection(policy.pages, self.pages)

    @property
    def lengths(self) -> Tensor:
        """``[b, g]`` int64: tokens held, those kept exactly among them."""
        b, _, g, _ = self._shape
        if self._prompt is not None:
            starts = self._prompt.starts
            starts = torch.zeros(b, dtype=torch.int64) if starts is None else starts
            return (self._prompt.length - starts).unsqueeze(-1).expand(b, g)
        lengths = self.pages.lengths.view(b, g).long()
        return lengths if self._first is None else lengths + self._first.lengths.unsqueeze(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of pages in use and tails, of tokens kept exactly, and of what the policy holds."""
        apart = sum(x.nbytes for x in (self._first, self._prompt) if x is not None)
        return self.pages.bytes() + apart + self.policy.nbytes

    @property
    def revocable(self) -> int:
        """The last tokens that :meth:`rollback` can take back."""
        if self._prompt is not None:
            return min(int(self.lengths.min()), self._prompt.tokens.q.shape[1])
        return self._settled + (0 if self._waiting is None else self._waiting.q.shape[1])

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor, prompt: PromptAttention) -> Tensor:
        """:meth:`attend`, as :class:`~openwork.models.kv_cache.Attend` asks it."""
        _, h, g, _ = self._shape
        t = qkv.shape[1]
        q, keys, values = qkv[:, :, :h], qkv[:, :, h : h + g], qkv[:, :, h + g :]
        self.settle()
        if self.format.rotate == "place" and self._cos is not None and self._sin is not None:
            places = self.lengths.unique()
            if len(places) > 1:
                raise ValueError(
                    "rotation by place: as many tokens in every head expected, got "
                    f"{places[0]} to {places[-1]}"
                )
            place = int(places[0])
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
            ValueError: padding with a format that rotates when reading, or in bounded memory.
        """
        if scale is not None:
            self._scale = scale
        self.settle()
        t = q.shape[1]
        if self._prompt is not None or self.seen == 0:
            stored = rotated if self.format.rotate == "stored" else keys
            _, _, rotated, values = self._collect(Tokens(q, stored, rotated, values), starts).tokens
            o = prompt(q, rotated.transpose(1, 2), values.transpose(1, 2))
            if self.drafts == 0:
                self.settle()
            return o
        if t <= MAX_QUERIES:
            state = self._step(q, keys, rotated, values)
        else:
            state = self._continue(q, rotated, values)
            self._append(keys, rotated, values)
        self._waiting = _Step(q, state.lse)
        if t > self.drafts:
            self.settle()
        return state.o

    def _collect(self, chunk: Tokens, starts: Tensor | None) -> Collected:
        """The prompt so far with one more chunk."""
        self.seen += chunk.q.shape[1]
        if self._prompt is None:
            if starts is not None and self.format.rotate != "stored":
                raise ValueError(
                    f'padding: a format of rotate = "stored" expected, got "{self.format.rotate}"'
                )
            if starts is not None and self.collecting == "bounded":
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
            parts = [tokens]
            if starts is not None:
                parts = [
                    Tokens(*(x[s : s + 1, start:] for x in tokens))
                    for s, start in enumerate(starts.tolist())
                ]
            self._take([(*part[1:], columns_of(part, self._scale)) for part in parts])
            self._settled = min(self._settled, tokens.q.shape[1])
        if self._waiting is not None:
            step, self._waiting = self._waiting, None
            if self.drafts:
                ops.kv_commit(self.pages)
            self._settled += step.q.shape[1]
            if self._trim(step) or self.policy.stateful:
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
        if self._waiting is not None:
            left = self._waiting.q.shape[1] - n
            self._settled += min(left, 0)
            self._waiting = _Step(*(x[:, :left] for x in self._waiting)) if left > 0 else None
        else:
            self._settled -= n
        drop = self.pages.lengths[:, 0].clamp(max=n)
        more = n - drop.view(self.batch, -1).amin(1)
        if self._first is not None and bool(more.any()):
            self._first = self._first.without(more)
        ops.kv_rollback(self.pages, drop)
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
        if self._waiting is not None:
            self._waiting = _Step(*(x[order] for x in self._waiting))
        if self._first is not None:
            self._first = self._first.reordered(order)
        self._selection.forget()

    def take(self, keys: Tensor, rotated: Tensor, values: Tensor, columns: Columns) -> None:
        """Take up a prompt, or what the policy keeps of it.

        Args:
            keys: ``[b, n, g, d]``, as they were before rotation.
            rotated: alike, after it.
            values: ``[b, n, g, d]``.
            columns: see :class:`~openwork.kvcache.Prompt`.
        """
        stored = rotated if self.format.rotate == "stored" else keys
        self.seen = max(self.seen, keys.shape[1])
        self._take([(stored, rotated, values, columns)])

    def _take(self, parts: Sequence[tuple[Tensor, Tensor, Tensor, Columns]]) -> None:
        """Take up a prompt of all sequences, or of one after another.

        Args:
            parts: keys, as they are stored, and as in :meth:`take` the rest.
        """
        rows: list[Rows] = []
        first_tokens: list[tuple[Tensor, Tensor]] = []
        self._settled = 0 if self.policy.stateful else self.seen
        for keys, rotated, values, columns in parts:
            n = keys.shape[1]
            first = min(self.format.exact_first, n)
            first_tokens += zip(rotated[:, :first], values[:, :first], strict=True)
            keys, rotated, values = (x[:, first:].transpose(1, 2) for x in (keys, rotated, values))
            prompt = Prompt(
                keys,
                rotated,
                values,
                lambda last, columns=columns, first=first: columns(last)[..., first:],  # type: ignore[misc]
            )
            kept = self.policy.compress(prompt)
            rows.append(kept_rows(prompt, kept))
            self._settled = min(self._settled, n) if kept is None else 0
        if self.format.exact_first:
            self._first = FirstTokens(first_tokens)
        append_rows(self.pages, rows, self.format.exact_first)

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

    def _step(self, q: Tensor, keys: Tensor, rotated: Tensor, values: Tensor) -> State:
        """A few tokens: into the pages first, then one read of the pages for all of them."""
        g = self._shape[2]
        self._append(keys, rotated, values)
        rows = query_rows(q, g)
        o, lse = ops.paged_attention(
            rows,
            self.pages,
            selected=self._selection.of(rows, self.seen),
            scale=self._scale,
            return_lse=True,
            cos=self._cos,
            sin=self._sin,
        )
        return self._merged(q, State(all_heads(o, g), all_heads(lse, g)))

    def _continue(self, q: Tensor, rotated: Tensor, values: Tensor) -> State:
        """Many tokens after others: to what is held, and causally to each other."""
        past = attend_all(q, *self._read(), self.pages.lengths[:, 0], self._scale)
        own = State(*ops.block_attention(q, rotated, values, scale=self._scale, return_lse=True))
        return self._merged(q, State(*ops.merge_states(*own, *past)))

    def _merged(self, q: Tensor, state: State) -> State:
        """With what is held elsewhere than in pages."""
        more = [self.policy.elsewhere(q, self._scale)]
        if self._first is not None:
            more.append(self._first.attend(q, self._scale))
        for other in more:
            if other is not None:
                state = State(*ops.merge_states(*state, *other))
        return state

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

    def _trim(self, step: _Step) -> bool:
        """Let the policy drop tokens after a step; whether it did."""
        b, _, g, d = self._shape
        lengths = self.pages.lengths.view(b, g).long()

        def read() -> tuple[Tensor, Tensor]:
            keys, values = self._read()
            return keys.view(b, g, -1, d), values.view(b, g, -1, d)

        def columns() -> Tensor:
            return held_scores(*step, read()[0], lengths, self._scale)

        mask = self.policy.trim(Held(lengths, step.q.shape[1], columns, read))
        if mask is None:
            return False
        kept = kept_tokens(mask.flatten(0, 1))
        ops.kv_compact(self.pages, kept.where(kept < mask.shape[-1], -1).unsqueeze(1).int())
        return True
