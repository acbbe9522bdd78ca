"""Tokenizers rebuilt from GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openwork.errors import FormatError
from openwork.models import Llama, Tokenizer, load
from openwork.models.tokenizer import tokenizer_from_file, tokenizer_from_gguf

from .checkpoints import MERGES, VOCABULARY, add_tokenizer, write_gguf, write_tokenizer

METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(VOCABULARY) - 3),
    "tokenizer.ggml.merges": MERGES,
}
IDS = {token: i for i, token in enumerate(VOCABULARY)}


def build(**changes: Any) -> Tokenizer:
    values = METADATA | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    tokenizer = tokenizer_from_gguf(values, "model.gguf")
    assert tokenizer is not None
    return tokenizer


def names(tokenizer: Tokenizer, text: str) -> list[str]:
    return [VOCABULARY[i] for i in tokenizer.encode(text)]


def test_merges_in_order() -> None:
    assert names(build(), "the the th") == ["the", "Ġthe", "Ġ", "th"]


def test_smollm_cuts_digits_off_first() -> None:
    # Digits first, so that a blank never joins one; plain GPT-2 joins them.
    assert names(build(), "the 11") == ["the", "Ġ", "1", "1"]
    assert names(build(pre="gpt-2"), "the 11") == ["the", "Ġ1", "1"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "qwen2", "llama-bpe"])
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_text_survives(pre: str, text: str) -> None:
    tokenizer = build(pre=pre)
    assume("<|" not in text)  # control tokens, which decoding leaves out
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "\ufffd" in text or "".join(tokenizer.stream(ids)) == text


def test_stream_holds_back_incomplete_characters() -> None:
    tokenizer = build()
    ids = tokenizer.encode("aß漢🙂b")
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    assert list(tokenizer.stream(ids)) == ["a", "ß", "漢", "🙂", "b"]
    # Cut inside the last character but one: what is left of it still comes out.
    assert "".join(tokenizer.stream(ids[:-2])) == tokenizer.decode(ids[:-2])


def test_control_tokens() -> None:
    tokenizer = build()
    ids = tokenizer.encode("a<|im_end|>b")
    assert ids == [IDS["a"], 2, IDS["b"]]
    assert tokenizer.decode(ids) == "ab"


def test_user_defined_tokens_are_text() -> None:
    types = [3] * 3 + [1] * (len(VOCABULARY) - 3)
    types[IDS["Ġthe"]] = 4
    ids = build(token_type=types).encode("Ġthe")
    assert ids == [IDS["Ġthe"]]
    assert build(token_type=types).decode(ids) != ""


def test_chat_is_chatml() -> None:
    tokenizer = build()
    ids = tokenizer.chat([("system", "the"), ("user", "a")])
    text = tokenizer.inner.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nthe<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_needs_its_tokens() -> None:
    tokens = ["<a>", "<b>", "<c>", *VOCABULARY[3:]]
    with pytest.raises(ValueError, match=r"with <\|im_start\|> and <\|im_end\|> expected"):
        build(tokens=tokens).chat([("user", "a")])


def test_comes_with_the_model(tmp_path: Path, tiny: Llama) -> None:
    model = load(write_gguf(tiny, tmp_path / "model.gguf", metadata=add_tokenizer))
    assert model.tokenizer is not None
    assert names(model.tokenizer, "the 1") == ["the", "Ġ", "1"]


@pytest.mark.parametrize(
    "change", [{"model": "llama"}, {"model": None}, {"pre": "tekken"}], ids=str
)
def test_other_kinds_are_none(change: dict[str, Any]) -> None:
    values = METADATA | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    assert tokenizer_from_gguf(values, "model.gguf") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens expected, got none"),
        ({"tokens": [*VOCABULARY[:-1], 7]}, "not strings"),
        ({"tokens": [*VOCABULARY[:-1], "a"]}, "1 repeated tokens"),
        ({"merges": ["t h e"]}, r"first unusable merge \('t', 'h', 'e'\)"),
        ({"merges": ["t q"]}, r"first unusable merge \('t', 'q'\)"),
        ({"merges": ["t ħħ"]}, "first unusable merge"),
        ({"token_type": [1]}, "a type for each of the 263 tokens expected, got 1"),
        ({"merges": "t h"}, "merges of type list expected"),
    ],
    ids=str,
)
def test_rejects(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        build(**changes)


def test_tokenizer_json_gives_the_same(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_file(write_tokenizer(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("the 1<|im_end|>") == build(pre="gpt-2").encode("the 1<|im_end|>")
