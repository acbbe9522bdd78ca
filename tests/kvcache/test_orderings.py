"""What the literature is firm about, on the demo's model and text."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

import openwork
from openwork.attention import AShape
from openwork.errors import DownloadError
from openwork.evaluation import passkeys
from openwork.evaluation.long_context import Sample, samples, with_caches, with_policies
from openwork.kv_format import KVFormat
from openwork.kvcache import EMS, Cache, Format, Recency, SnapKV, kivi
from openwork.models import Llama
from openwork.models.demo import fetch_model, fetch_text

pytestmark = [pytest.mark.demo, pytest.mark.slow]
LENGTH = 1024


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.set_num_threads(2)
    try:
        return openwork.load(fetch_model(progress=False))
    except (DownloadError, OSError) as error:
        pytest.skip(f"the model cannot be had: {error}")


@pytest.fixture(scope="module")
def texts(model: Llama) -> list[Sample]:
    assert model.tokenizer is not None
    text = fetch_text(progress=False).evaluation[: 40 * LENGTH]
    return samples(torch.tensor(model.tokenizer.encode(text)), 2, LENGTH - 64, 64)


def test_sinks_matter(model: Llama, texts: list[Sample]) -> None:
    policies = {"without": AShape(0, 256), "with": AShape(4, 252)}
    found = dict(with_policies(model, texts[0], policies))
    assert found["with"].score.kl < 0.2 * found["without"].score.kl


def test_keys_per_channel_beat_keys_per_token(model: Llama, texts: list[Sample]) -> None:
    values = KVFormat(2, "token", 32, window=128)
    formats = {"channel": kivi(2), "token": Format(values, values)}
    makers = {
        name: lambda format=format: Cache(model, LENGTH, format=format)
        for name, format in formats.items()
    }
    kl: dict[str, list[float]] = {}
    for text in texts:
        for name, outcome in with_caches(model, text, makers):
            kl.setdefault(name, []).append(outcome.score.kl)
    assert fmean(kl["channel"]) < 0.7 * fmean(kl["token"])


def test_attention_finds_what_recency_forgets(model: Llama) -> None:
    """A passkey early in the prompt, an eighth of which is kept."""
    budget = LENGTH // 8
    policies = {
        "recency": Recency(4, budget - 4), "snapkv": SnapKV(budget), "ems": EMS(budget)
    }  # fmt: skip
    makers = {
        name: lambda policy=policy: Cache(model, LENGTH + 8, policy=policy)
        for name, policy in policies.items()
    }
    assert model.tokenizer is not None
    prose = fetch_text(progress=False).evaluation[: 40 * LENGTH]
    for passkey in passkeys(model.tokenizer, prose, LENGTH, [0.2, 0.5]):
        found = dict(with_caches(model, Sample.of(passkey), makers))
        assert {name for name, outcome in found.items() if outcome.score.found} == {
            "dense", "snapkv", "ems"
        }  # fmt: skip
