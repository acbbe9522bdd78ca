"""What the literature is firm about, on the demo's model and text."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import pytest
import torch

import openwork
from openwork.attention import AShape
from openwork.errors import DownloadError
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


def mean_kl(
    model: Llama, texts: list[Sample], makers: dict[str, Callable[[], Cache]]
) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in ("dense", *makers)}
    for text in texts:
        for name, outcome in with_caches(model, text, makers):
            found[name].append(outcome.score.kl)
    return {name: fmean(values) for name, values in found.items()}


def test_keys_per_channel_beat_keys_per_token(model: Llama, texts: list[Sample]) -> None:
    values = KVFormat(2, "token", 32, window=128)
    kl = mean_kl(
        model,
        texts,
        {
            "channel": lambda: Cache(model, LENGTH, format=kivi(2)),
            "token": lambda: Cache(model, LENGTH, format=Format(values, values)),
        },
    )
    assert kl["channel"] < 0.7 * kl["token"]


def test_attention_knows_better_than_recency(model: Llama, texts: list[Sample]) -> None:
    """What to keep, where only an eighth is kept."""
    budget = LENGTH // 8
    kl = mean_kl(
        model,
        texts,
        {
            "recency": lambda: Cache(model, LENGTH, policy=Recency(4, budget - 4)),
            "snapkv": lambda: Cache(model, LENGTH, policy=SnapKV(budget)),
            "ems": lambda: Cache(model, LENGTH, policy=EMS(budget)),
        },
    )
    assert max(kl["snapkv"], kl["ems"]) < 0.9 * kl["recency"]
