"""Passkey retrieval: a number hidden in prose, asked for at the end.

::

    prose ...
    The pass key is 71432. Remember it. 71432 is the pass key.
    ... prose
    What is the pass key? The pass key is

The model finds it if the likeliest tokens are the number's, each after the one before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openwork.models import KVCache, Llama, Tokenizer
from openwork.models.kv_cache import LayeredCache

# A paragraph of its own: in the middle of one, SmolLM2 finds it one time out of four.
_STATEMENT = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
_QUESTION = "\n\nWhat is the pass key? The pass key is {key}"
_DIGITS = 5


@dataclass(frozen=True)
class Passkey:
    """A prompt and what should follow.

    Attributes:
        prompt: ``[length]`` int64.
        answer: ``[tokens]`` int64, the number.
        depth: where in the prompt it is stated, 0 to 1.
    """

    prompt: Tensor
    answer: Tensor
    depth: float


def passkeys(
    tokenizer: Tokenizer, prose: str, length: int, depths: Sequence[float], *, seed: int = 0
) -> Iterator[Passkey]:
    """Prompts of ``length`` tokens, one for each depth, each with a number and prose of its own.

    Args:
        tokenizer: of the model; it must make a token of each digit.
        prose: text without numbers to confuse them with; the prompts take it from the start on.
        length: tokens of a prompt.
        depths: where to state the number, 0 (first) to 1 (last).
        seed: of the numbers.

    Raises:
        ValueError: less prose than the prompts take, a length too short for the statement, or a
            depth outside 0 .. 1.
    """
    numbers = random.Random(seed)
    filler = tokenizer.encode(prose)
    begin = 0
    for depth in depths:
        key = "".join(numbers.choices("0123456789", k=_DIGITS))
        statement = tokenizer.encode(_STATEMENT.format(key=key))
        asked = tokenizer.encode(_QUESTION.format(key=key))
        question, answer = asked[:-_DIGITS], asked[-_DIGITS:]
        room = length - len(statement) - len(question)
        if room < 0 or not 0 <= depth <= 1:
            raise ValueError(
                f"passkeys: a length of at least {length - room} and depths in 0 .. 1 expected, "
                f"got {length} and {depth}"
            )
        text = filler[begin : begin + room]
        if len(text) < room:
            raise ValueError(
                f"passkeys: {begin + room} tokens of prose expected, got {len(filler)}"
            )
        begin += room
        at = round(depth * room)
        prompt = torch.tensor(text[:at] + statement + text[at:] + question)
        yield Passkey(prompt, torch.tensor(answer), depth)


@torch.inference_mode()
def finds(model: Llama, passkey: Passkey, cache: KVCache | LayeredCache) -> bool:
    """Whether the model answers with the number.

    Args:
        model: the model.
        passkey: the prompt and its answer.
        cache: empty, or what it holds after all but the last token of the prompt.
    """
    tokens = torch.cat((passkey.prompt, passkey.answer[:-1]))
    last = len(passkey.prompt) - 1
    if cache.length == 0:
        model(tokens[None, :last], cache, last_only=True)
    logits = model(tokens[None, last:], cache)[0]
    return torch.equal(logits.argmax(-1), passkey.answer)
