"""Numbers hidden in prose, and whether a model finds them."""

from __future__ import annotations

import pytest
import torch
from models.checkpoints import random_model, write_tokenizer

from openwork.evaluation import finds, passkeys
from openwork.models import Tokenizer
from openwork.models.tokenizer import tokenizer_from_file


@pytest.fixture
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_from_file(write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def test_passkeys(tokenizer: Tokenizer) -> None:
    prose = "There was nothing to see. " * 60
    found = list(passkeys(tokenizer, prose, 300, [0.0, 0.5, 1.0]))
    assert [len(p.prompt) for p in found] == [300] * 3
    for passkey in found:
        text = tokenizer.decode(passkey.prompt.tolist())
        key = tokenizer.decode(passkey.answer.tolist())
        assert len(key.strip()) == 5 and text.count(key) == 2
        assert text.endswith("What is the pass key? The pass key is ")
    assert tokenizer.decode(found[0].prompt[:10].tolist()).startswith("\n\nThe pass")
    with pytest.raises(ValueError, match=r"depths in 0 .. 1 expected, got 300 and 2"):
        list(passkeys(tokenizer, prose, 300, [2.0]))
    with pytest.raises(ValueError, match="tokens of prose expected, got"):
        list(passkeys(tokenizer, prose, 300, [0.5] * 20))
    with pytest.raises(ValueError, match="a length of at least"):
        list(passkeys(tokenizer, prose, 20, [0.5]))


def test_finds_what_the_model_says(tokenizer: Tokenizer) -> None:
    model = random_model()
    passkey = next(passkeys(tokenizer, "Nothing to see. " * 60, 200, [0.5]))
    assert not finds(model, passkey, model.new_cache(210))
    said = []
    prompt = passkey.prompt
    for _ in range(5):
        said.append(model(prompt[None])[0, -1].argmax())
        prompt = torch.cat((prompt, said[-1:][0].view(1)))
    lucky = type(passkey)(passkey.prompt, torch.stack(said), 0.5)
    assert finds(model, lucky, model.new_cache(210))
