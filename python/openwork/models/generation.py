"""Sampling tokens from a model one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from openwork.models.kv_cache import KVCache, LayeredCache
from openwork.models.llama import Llama


@torch.inference_mode()
def generate(
    model: Llama,
    tokens: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Collection[int] | None = None,
    cache: KVCache | LayeredCache | None = None,
) -> Iterator[int]:
    """Continue ``tokens``, yielding each new token as soon as it is known.

    Args:
        model: the model.
        tokens: the prompt, at least one token.
        max_new_tokens: stop after this many.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: sample among the ``top_k`` likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability.
        seed: of the random numbers; None for a fresh one.
        stop: tokens that end the text, and are not yielded; None for the model's own.
        cache: the tokens before the prompt, and room for the prompt and ``max_new_tokens``; None
            for a new one. The last token yielded is not in it: it has not been run.

    Yields:
        Token ids.

    Raises:
        ValueError: an empty prompt, an option out of range, a cache too small, or a prompt that
            with ``max_new_tokens`` passes the model's context.

    Example:
        >>> import torch
        >>> from openwork.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=2,
        ...                           heads=4, kv_heads=2, head_dim=8, context_length=128))
        >>> len(list(generate(model, [1, 2, 3], 5)))
        5
    """
    prompt = torch.as_tensor(tokens, dtype=torch.int64).reshape(1, -1)
    _check(prompt.shape[1], max_new_tokens, temperature, top_k, top_p)
    cache = model.new_cache(prompt.shape[1] + max_new_tokens) if cache is None else cache
    stop = model.config.eos_ids if stop is None else stop
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = model(prompt, cache, last_only=True)[0, 0]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            weights = sampling_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            token = int(torch.multinomial(weights, 1, generator=random))
        if token in stop:
            return
        yield token
        prompt = torch.tensor([[token]])


def _check(
    prompt_length: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    for name, valid, rule, value in (
        ("tokens", prompt_length > 0, "have at least one token", prompt_length),
        ("max_new_tokens", max_new_tokens > 0, "be at least 1", max_new_tokens),
        ("temperature", 0 <= temperature < float("inf"), "be 0 or more, finite", temperature),
        ("top_k", top_k >= 0, "be 0 or more", top_k),
        ("top_p", 0 < top_p <= 1, "be above 0 and at most 1", top_p),
    ):
        if not valid:
            raise ValueError(f"generate: {name} must {rule}, got {value}")


def sampling_weights(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities to sample from: ``softmax(logits / temperature)``, unlikely tokens cut to 0.

    ``top_k`` is applied first. ``top_p`` keeps the shortest prefix of the tokens in falling order
    whose probabilities sum to ``top_p`` or more, so always one at least; of equal logits at a cut
    the lower ids stay.

    Args:
        logits: ``[vocab]``.
        temperature: above 0.
        top_k: tokens to keep, 0 for all.
        top_p: probability to keep.

    Returns:
        ``[vocab]`` float32, not normalized after the cut.

    Example:
        >>> sampling_weights(torch.tensor([0.0, 2.0, 1.0]), temperature=1.0, top_k=2, top_p=0.7)
        tensor([0.0000, 0.7311, 0.0000])
    """
    # The likeliest token at 0, so that a small temperature sends the others to -inf, and nothing
    # to +inf.
    scaled = (logits.float() - logits.max()) / temperature
    order = logits.sort(descending=True, stable=True).indices
    if top_k:
        scaled[order[top_k:]] = -torch.inf
    weights = scaled.softmax(-1)
    if top_p < 1:
        falling = weights[order]
        before = falling.cumsum(-1) - falling
        weights[order[before >= top_p]] = 0
    return weights
