"""Text to token ids and back, and the ChatML format of a conversation.

The work is done by the ``tokenizers`` package; here it is set up from a ``tokenizer.json`` or from
the vocabulary inside a GGUF file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from openwork.errors import FormatError
from openwork.models.config import Fields

# How the text is cut before byte-level BPE, by tokenizer.ggml.pre. GPT-2's own pattern is built
# into ByteLevel; smollm cuts single digits off first; the others replace the pattern.
_GPT2_PRE = ("default", "gpt-2")
_DIGITS_PRE = ("smollm",)
_REGEX_PRE = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# tokenizer.ggml.token_type of tokens that are cut out of the text before anything else. Control
# tokens are left out when decoding; tokens a user defined, such as runs of blanks, are text.
_CONTROL, _USER_DEFINED = 3, 4

_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"


class Tokenizer:
    """Token ids of text, text of token ids.

    Args:
        inner: the ``tokenizers.Tokenizer`` that does the work, reachable as ``.inner``.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``. Nothing is put in front or behind.

        Special tokens written out in the text, such as ``<|im_end|>``, become those tokens.
        """
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.inner.decode(list(ids), skip_special_tokens=True)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive.

        A piece is held back while its bytes do not yet make whole characters, so the pieces joined
        are the text of the ids; what never became a character comes last, as ``decode`` shows it.
        """
        stream = decoders.DecodeStream(skip_special_tokens=True)
        seen: list[int] = []
        length = 0
        for i in ids:
            seen.append(i)
            piece = stream.step(self.inner, i)
            if piece:
                length += len(piece)
                yield piece
        rest = self.decode(seen)[length:]
        if rest:
            yield rest

    def chat(self, messages: Iterable[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation in ChatML, open for the assistant's answer.

        ::

            <|im_start|>ROLE
            TEXT<|im_end|>
            ...
            <|im_start|>assistant

        Args:
            messages: ``(role, text)`` pairs; roles are ``system``, ``user`` and ``assistant``.

        Raises:
            ValueError: the vocabulary has no ``<|im_start|>`` and ``<|im_end|>``.
        """
        start, end = self.inner.token_to_id(_IM_START), self.inner.token_to_id(_IM_END)
        if start is None or end is None:
            raise ValueError(
                f"chat: a vocabulary with {_IM_START} and {_IM_END} expected, got one without"
            )
        ids = []
        for role, text in messages:
            ids += [start, *self.encode(f"{role}\n{text}"), end, *self.encode("\n")]
        return [*ids, start, *self.encode("assistant\n")]


def tokenizer_from_file(path: str | Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        OSError: the file is missing or unreadable.
        FormatError: it is not a tokenizer.
    """
    data = Path(path).read_bytes()
    try:
        return Tokenizer(tokenizers.Tokenizer.from_buffer(data))
    except ValueError as error:
        raise FormatError(f"{path}: a tokenizer expected, got: {error}") from error


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer | None:
    """Rebuild the byte-level BPE tokenizer stored in a GGUF file.

    Args:
        metadata: of the file.
        where: its name, for messages.

    Returns:
        The tokenizer; None where the file has none or one of another kind (SentencePiece, or a
        ``tokenizer.ggml.pre`` not known here).

    Raises:
        FormatError: the tokens, their types and the merges contradict each other.
    """
    fields = Fields(metadata, where)
    pre = _pre_tokenizer(fields.get("tokenizer.ggml.pre", str, "default"))
    if fields.get("tokenizer.ggml.model", str, "none") != "gpt2" or pre is None:
        return None
    tokens = fields.get("tokenizer.ggml.tokens", list)
    merges = fields.get("tokenizer.ggml.merges", list)
    types = fields.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(isinstance(t, str) for t in (*tokens, *merges)):
        raise FormatError(
            f"{where}: a type for each of the {len(tokens)} tokens expected, got {len(types)}, "
            "or tokens or merges that are not strings"
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    unusable = next((p for p in pairs if len(p) != 2 or not vocab.keys() >= {*p, "".join(p)}), None)
    if len(vocab) != len(tokens) or unusable is not None:
        raise FormatError(
            f"{where}: distinct tokens and merges of pairs of them expected, got "
            f"{len(tokens) - len(vocab)} repeated tokens, first unusable merge {unusable}"
        )
    inner = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=False))
    inner.pre_tokenizer = pre
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return Tokenizer(inner)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    if name in _GPT2_PRE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS_PRE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name in _REGEX_PRE:
        cut = pre_tokenizers.Split(Regex(_REGEX_PRE[name]), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([cut, rest])
    return None
