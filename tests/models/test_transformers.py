"""Logits equal Hugging Face's on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openwork.models import load

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

SHAPE: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
    ],
    ids=["llama", "tied", "llama3", "mistral", "qwen2"],
)
def test_same_logits(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    tokens = torch.randint(0, 200, (2, 150))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.abs().max() > 1
    cache = ours.new_cache(150, batch=2)
    pieces = [ours(piece, cache) for piece in tokens.split([100, 1, 49], dim=1)]
    for logits in (ours(tokens), torch.cat(pieces, dim=1)):
        # float32 rounding only: 3 layers of sums of up to 80 terms, and at most 150 keys.
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
