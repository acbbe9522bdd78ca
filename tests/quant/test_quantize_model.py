"""Quantizing a whole model in place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models.checkpoints import QWEN, random_model
from torch import Tensor, nn

from openwork.models import Llama
from openwork.nn import LowbitLinear
from openwork.ops import unpack_lowbit
from openwork.quant import InputSecondMoment, QuantizedTensor, model_bytes, quantize_model, rtn

# Rows of 72 are 4.5 groups of 16: every linear of the block but one has a short last group.
SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 72, "head_dim": 12, "layers": 3}


def _model(**changes: Any) -> Llama:
    return random_model(**SHAPE | changes)


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 96, (6, 48), generator=torch.Generator().manual_seed(seed))


def _stored(linear: nn.Module) -> QuantizedTensor:
    assert isinstance(linear, LowbitLinear)
    codes, scales, zeros = unpack_lowbit(linear.weight)
    return QuantizedTensor(codes, scales, zeros, linear.weight.bits, linear.weight.group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rtn_replaces_every_linear_by_its_rounded_self(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    dense, model = _model(), _model()
    grid: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    report = quantize_model(model, "rtn", **grid, head_bits=8, progress=False)
    assert [r.name for r in report.linears] == [*(n for n, _, _ in dense.linears()), "head"]
    for entry in report.linears:
        weight = dense.get_submodule(entry.name).weight
        expected = rtn(weight, **grid | ({"bits": 8} if entry.name == "head" else {}))
        stored = _stored(model.get_submodule(entry.name))
        assert torch.equal(stored.codes, expected.codes)
        assert torch.equal(stored.scales, expected.scales)
        assert (stored.zeros is None) == symmetric
        gap = (weight - expected.dequantize()).square().sum() / weight.square().sum()
        assert entry.weight_error == pytest.approx(float(gap), rel=1e-5)
        assert entry.output_error is None
        assert entry.shape == tuple(weight.shape)


def test_float_compute_is_the_dequantized_model() -> None:
    reference, model = _model(**QWEN), _model(**QWEN)
    quantize_model(
        model, "rtn", bits=4, group_size=16, head_bits=8, compute="float", progress=False
    )
    for name, parent, attribute in [*reference.linears(), ("head", reference, "head")]:
        getattr(parent, attribute).weight.copy_(_stored(model.get_submodule(name)).dequantize())
    # Only the order of summation differs.
    torch.testing.assert_close(model(_tokens()), reference(_tokens()), rtol=1e-4, atol=1e-4)


def test_gptq_output_error_is_that_of_its_definition_and_below_rtn() -> None:
    dense, ours = _model(), _model()
    report = quantize_model(
        ours, "gptq", bits=3, group_size=16, calibration=_tokens(), progress=False
    )
    # The inputs of the first layer are those of the dense model.
    moments = {}
    for name, parent, attribute in dense.linears():
        if name.startswith("layers.0."):
            linear = getattr(parent, attribute)
            moments[name] = InputSecondMoment(linear.in_features)
            moments[name].attach(linear)
    dense(_tokens())
    for entry in report.linears:
        if entry.name not in moments:
            continue
        weight = dense.get_submodule(entry.name).weight
        hessian = moments[entry.name].mean()

        def share(q: QuantizedTensor, weight: Tensor = weight, hessian: Tensor = hessian) -> float:
            error = weight - q.dequantize()
            return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())

        stored = _stored(ours.get_submodule(entry.name))
        assert entry.output_error == pytest.approx(share(stored), rel=1e-3)
        assert entry.output_error < share(rtn(weight, bits=3, group_size=16))


@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_tied_embedding_shares_a_head_of_eight_bits(head_bits: int) -> None:
    model = _model(tied_head=True)
    embedding = model.embed.weight.clone()
    report = quantize_model(
        model, "rtn", bits=4, group_size=16, head_bits=head_bits, progress=False
    )
    head = model.get_submodule("head")
    assert isinstance(head, LowbitLinear)
    assert bool(torch.isfinite(model(_tokens())).all())
    packed = sum(entry.bytes_after for entry in report.linears)
    dense = sum(entry.bytes_before for entry in report.linears)
    if head_bits == 8:
        assert model.embed.weight is head.weight
    else:
        assert torch.equal(model.embed.weight, embedding)
        # The head used to cost nothing beside the embedding.
        dense -= report.linears[-1].bytes_before
    assert report.model_bytes_after == report.model_bytes_before - dense + packed
    assert report.model_bytes_after == model_bytes(model)


def test_gptq_runs_in_bfloat16() -> None:
    model = _model().bfloat16()
    tokens = _tokens()
    report = quantize_model(
        model, "gptq", bits=4, group_size=64, calibration=tokens, progress=False
    )
    assert model(tokens).dtype == torch.bfloat16
    assert report.hidden_bytes == tokens.numel() * SHAPE["hidden_size"] * 2


def test_an_interrupted_quantization_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "bits": 4, "group_size": 16, "calibration": _tokens(), "progress": False
    }  # fmt: skip
    expected = _model(**QWEN)
    first = quantize_model(expected, "gptq", **options)
    module = sys.modules["openwork.quant.model"]
    rounds: list[int] = []

    def stop(*args: Any, **kwargs: Any) -> QuantizedTensor:
        rounds.append(1)
        if len(rounds) > 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = module.gptq
    monkeypatch.setattr(module, "gptq", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(_model(**QWEN), "gptq", **options, resume_dir=tmp_path)
    monkeypatch.undo()
    resumed = _model(**QWEN)
    second = quantize_model(resumed, "gptq", **options, resume_dir=tmp_path)
    assert second.linears == first.linears
    assert torch.equal(resumed(_tokens()), expected(_tokens()))
    with pytest.raises(ValueError, match="same options"):
        quantize_model(_model(**QWEN), "gptq", **options | {"bits": 3}, resume_dir=tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("awq", {}, "quantize_model: method must be 'rtn' or 'gptq', got 'awq'"),
        ("gptq", {}, "quantize_model: calibration must be token ids for 'gptq', got None"),
        ("rtn", {"bits": 5}, "quantize_model: bits must be one of 2, 3, 4, 8, got 5"),
        ("rtn", {"head_bits": 6}, "quantize_model: bits must be one of 2, 3, 4, 8, got 6"),
        ("rtn", {"group_size": 48}, "quantize_model: group_size must be one of 16, 32, 64, 128"),
    ],
)
def test_bad_options_change_nothing(method: Any, options: dict[str, Any], message: str) -> None:
    model = _model()
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_model(model, method, **{"bits": 4, "group_size": 16} | options, progress=False)
    assert all(isinstance(getattr(p, a), nn.Linear) for _, p, a in model.linears())


def test_a_quantized_model_is_refused() -> None:
    model = _model()
    quantize_model(model, "rtn", bits=4, group_size=16, progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv must be dense, got LowbitLinear"):
        quantize_model(model, "rtn", bits=4, group_size=16, progress=False)


_MEMORY = """
import resource, torch
from openwork.models import Llama, LlamaConfig
from openwork.quant import quantize_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
def quantized(layers):
    torch.manual_seed(0)
    model = Llama(LlamaConfig("llama", vocab_size=64, hidden_size=256, ffn_size=512, layers=layers,
                              heads=4, kv_heads=2, head_dim=64, context_length=64))
    model.eval().requires_grad_(False)
    tokens = torch.randint(0, 64, (8, 64))
    model(tokens)
    before = peak()
    report = quantize_model(
        model, "gptq", bits=4, group_size=64, calibration=tokens, progress=False)
    return peak() - before, report

quantized(1)  # libraries warm up and allocate their work space
growth, report = quantized(24)
print(growth, report.statistics_bytes, report.hidden_bytes, report.model_bytes_before)
"""


def test_memory_grows_by_one_layer_of_statistics_not_by_all() -> None:
    """Peak resident memory of a fresh process: statistics of 24 layers would be 43 MB."""
    # Large blocks go back to the system when freed. Otherwise what the C library keeps of the dense
    # weights for reuse counts too: 9 to 50 MB from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    growth, statistics, hidden, model = (int(word) for word in result.stdout.split())
    assert statistics == 4 * (3 * 256**2 + 512**2)
    assert model > 24 * 2 * 10**6
    # On top, the work space of one linear: a few copies of a weight and of a Hessian in float64.
    # Measured 8 MB in all.
    assert growth < statistics + hidden + 12 * 2**20 < 24 * statistics
