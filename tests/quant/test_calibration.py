"""The calibration engine: order, memory, statistics, and resuming."""

from __future__ import annotations

import re
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.checkpoints import random_model
from models.damage import EXTREME, FUZZ, JSON_PIECES, Damage, damaged, damages, safetensors_header
from torch import Tensor, nn

from openwork.errors import FormatError
from openwork.models import DenseLinear, Llama
from openwork.quant import InputSecondMoment, calibrate
from openwork.quant import calibration as engine

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "ffn_size": 48, "layers": 4, "heads": 4, "head_dim": 8,
    "context_length": 64,
}  # fmt: skip
LAYERS = SHAPE["layers"]


def _model(**changes: Any) -> Llama:
    return random_model(**SHAPE | changes)


def _tokens(samples: int = 5, length: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE["vocab_size"], (samples, length), generator=generator)


class Coarse:
    """An algorithm that rounds weights to a step, so that each layer changes the next one's inputs.

    Keeps every second moment it was given; raises KeyboardInterrupt in place of one, if asked to.
    """

    def __init__(self, step: float = 0.1, interrupt_at: int | None = None) -> None:
        self.step = step
        self.interrupt_at = interrupt_at
        self.moments: list[Tensor] = []

    def options(self) -> Mapping[str, Any]:
        return {"step": self.step}

    def statistic(self, linear: nn.Linear) -> InputSecondMoment:
        return InputSecondMoment(linear.in_features)

    def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
        if len(self.moments) == self.interrupt_at:
            raise KeyboardInterrupt
        self.moments.append(statistic.mean())
        # Depends on the statistic too, so that a resumed run can only agree if its inputs do.
        weight = torch.round(linear.weight / self.step) * self.step
        return {"weight": weight * (1 + statistic.mean().diagonal().mean() * 0.01)}

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        old = getattr(parent, attribute)
        if tensors["weight"].shape != old.weight.shape:
            raise ValueError(f"weight must have shape {list(old.weight.shape)}")
        new = DenseLinear(old.in_features, old.out_features, bias=False)
        new.weight = nn.Parameter(tensors["weight"].clone(), requires_grad=False)
        setattr(parent, attribute, new)


def _states_equal(a: Llama, b: Llama) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("k", [3, 256, 300, 600])
def test_second_moment_is_the_mean_outer_product(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, t, k, generator=generator) for t in (1, 7, 50, 0, 120)]
    moment = InputSecondMoment(k)
    for batch in batches:
        moment.update(batch)
    x = torch.cat([batch.reshape(-1, k) for batch in batches]).double()
    direct = x.t() @ x / len(x)
    mean = moment.mean()
    assert moment.count == len(x)
    assert torch.equal(mean, mean.t())
    # float32 sums of len(x) products; each update rounds once more.
    bound = (len(x) + len(batches)) * 2.0**-24 * (x.abs().t() @ x.abs() / len(x))
    assert bool(((mean.double() - direct).abs() <= bound).all())


def test_second_moment_of_16_bit_inputs_is_summed_in_float32() -> None:
    x = torch.randn(4, 100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, full = InputSecondMoment(8), InputSecondMoment(8)
    half.update(x)
    full.update(x.float())
    assert torch.equal(half.mean(), full.mean())


def _moments_of_layer(model: Llama, index: int, hidden: Tensor, rope: Any) -> dict[str, Tensor]:
    """Second moments of the inputs of every linear of one layer, straight from hooks."""
    moments: dict[str, InputSecondMoment] = {}
    handles = []
    for name, parent, attribute in model.linears():
        if name.startswith(f"layers.{index}."):
            linear = getattr(parent, attribute)
            moments[name] = InputSecondMoment(linear.in_features)
            handles.append(moments[name].attach(linear))
    model.layers[index](hidden, *rope)
    for handle in handles:
        handle.remove()
    return {name: moment.mean() for name, moment in moments.items()}


def test_each_layer_sees_the_outputs_of_the_compressed_layers_before_it() -> None:
    dense, compressed, algorithm = _model(), _model(), Coarse()
    tokens = _tokens()
    report = calibrate(compressed, tokens, algorithm, progress=False)
    rope = dense.rope(0, tokens.shape[1])
    hidden, dense_hidden = dense.embed(tokens), dense.embed(tokens)
    for index in range(LAYERS):
        expected = _moments_of_layer(dense, index, hidden, rope)
        stale = _moments_of_layer(dense, index, dense_hidden, rope)
        seen = algorithm.moments[4 * index : 4 * index + 4]
        for (name, moment), ours in zip(expected.items(), seen, strict=True):
            torch.testing.assert_close(ours, moment)
            # The test would see it if dense outputs were used instead.
            assert index == 0 or not torch.allclose(moment, stale[name], rtol=1e-3)
        hidden = compressed.layers[index](hidden, *rope)
        dense_hidden = dense.layers[index](dense_hidden, *rope)
    assert len(algorithm.moments) == 4 * LAYERS
    assert (report.layers, report.resumed) == (LAYERS, 0)


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split = Coarse(), Coarse()
    calibrate(_model(), _tokens(), whole, progress=False)
    monkeypatch.setattr(engine, "_BATCH_TOKENS", 2 * 16)  # two samples at a time, then one
    calibrate(_model(), _tokens(), split, progress=False)
    torch.testing.assert_close(split.moments, whole.moments)


def test_one_layer_of_statistics_is_alive_at_a_time() -> None:
    alive: weakref.WeakSet[InputSecondMoment] = weakref.WeakSet()
    counts: list[int] = []

    class Watching(Coarse):
        def statistic(self, linear: nn.Linear) -> InputSecondMoment:
            moment = super().statistic(linear)
            alive.add(moment)
            counts.append(len(alive))
            return moment

        def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
            counts.append(len(alive))
            return super().compress(linear, statistic)

    tokens = _tokens()
    report = calibrate(_model(), tokens, Watching(), progress=False)
    # Four are made, then freed one by one as each linear is done.
    assert counts == [1, 2, 3, 4, 4, 3, 2, 1] * LAYERS
    assert len(alive) == 0
    # The inputs of qkv, o, gate_up and down.
    assert report.statistics_bytes == sum(4 * k * k for k in [32, 32, 32, 48])
    assert report.hidden_bytes == tokens.numel() * 32 * 4


def test_statistics_come_off_when_a_layer_fails() -> None:
    model = _model()

    class Failing(InputSecondMoment):
        def update(self, x: Tensor) -> None:
            raise RuntimeError("stop")

    class Algorithm(Coarse):
        def statistic(self, linear: nn.Linear) -> InputSecondMoment:
            return Failing(linear.in_features)

    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model, _tokens(), Algorithm(), progress=False)
    model(_tokens())  # no hook is left to raise


@pytest.mark.parametrize("linear", [0, 8, 15])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, linear: int) -> None:
    expected = _model()
    calibrate(expected, _tokens(), Coarse(), progress=False)
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            _model(), _tokens(), Coarse(interrupt_at=linear), progress=False, resume_dir=tmp_path
        )
    model = _model()
    report = calibrate(model, _tokens(), Coarse(), progress=False, resume_dir=tmp_path)
    assert report.resumed == linear // 4
    assert _states_equal(model, expected)
    # And once more from the finished folder: nothing is left to do.
    again, algorithm = _model(), Coarse()
    assert calibrate(again, _tokens(), algorithm, progress=False, resume_dir=tmp_path).resumed == 4
    assert _states_equal(again, expected)
    assert algorithm.moments == []
    assert not list(tmp_path.glob(".*"))


def test_a_stop_between_the_two_files_of_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _model()
    calibrate(expected, _tokens(), Coarse(), progress=False)
    write, written = engine.write_tensors, []

    def stop(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        written.append(path.name)
        if written == ["layer-0000.safetensors", "hidden.safetensors", "layer-0001.safetensors"]:
            write(path, tensors, metadata)
            raise KeyboardInterrupt
        write(path, tensors, metadata)

    monkeypatch.setattr(engine, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=tmp_path)
    monkeypatch.undo()
    model = _model()
    report = calibrate(model, _tokens(), Coarse(), progress=False, resume_dir=tmp_path)
    assert report.resumed == 1
    assert _states_equal(model, expected)


@pytest.mark.parametrize("change", ["options", "tokens", "weights", "config"])
def test_results_of_another_run_are_refused(tmp_path: Path, change: str) -> None:
    calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=tmp_path)
    model, tokens, algorithm = _model(), _tokens(), Coarse()
    if change == "options":
        algorithm = Coarse(step=0.2)
    elif change == "tokens":
        tokens[-1, -1] = (tokens[-1, -1] + 1) % SHAPE["vocab_size"]
    elif change == "weights":
        model.layers[3].mlp.down.weight[0, 0] += 1
    else:
        model = _model(norm_eps=2e-5)
    with pytest.raises(ValueError, match="same options, tokens and weights"):
        calibrate(model, tokens, algorithm, progress=False, resume_dir=tmp_path)


def test_an_unwritable_folder_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=tmp_path / "file")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run; tests change its files and put them back."""
    folder = tmp_path_factory.mktemp("finished")
    calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=folder)
    return folder


@FUZZ
@given(
    damage=damages(EXTREME + JSON_PIECES),
    name=st.sampled_from(["hidden.safetensors", "layer-0002.safetensors"]),
    part=st.sampled_from(["header", "all"]),
)
def test_damaged_files_are_named_or_harmless(
    finished: Path, damage: Damage, name: str, part: str
) -> None:
    path = finished / name
    region = safetensors_header(path) if part == "header" else None
    with damaged(path, damage, region):
        try:
            calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=finished)
        except FormatError as error:
            assert name in str(error)
        except ValueError as error:  # the fingerprint itself was hit
            assert name in str(error)
            assert "same options, tokens and weights" in str(error)


def test_a_size_beyond_64_bits_is_named(tmp_path: Path) -> None:
    # Of 0 elements, so that nothing else is wrong with it.
    header = b'{"hidden":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'
    path = tmp_path / "hidden.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match=r"hidden\.safetensors: a complete safetensors file"):
        calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=tmp_path)


def test_a_linear_that_cannot_be_compressed_is_named() -> None:
    class Refusing(Coarse):
        def compress(self, linear: nn.Linear, statistic: InputSecondMoment) -> dict[str, Tensor]:
            if len(self.moments) == 6:
                raise ValueError("weight must be finite")
            return super().compress(linear, statistic)

    with pytest.raises(ValueError, match=r"calibrate: layers\.1\.mlp\.gate_up: weight must be"):
        calibrate(_model(), _tokens(), Refusing(), progress=False)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "calibrate: tokens must be a non-empty [samples"),
        (torch.zeros(0, 4, dtype=torch.int64), "got [0, 4] torch.int64"),
        (torch.zeros(2, 4, dtype=torch.int32), "got [2, 4] torch.int32"),
        (torch.full((2, 4), 64), "calibrate: tokens must be in 0 .. 63, got 64 .. 64"),
        (torch.full((2, 4), -1), "got -1 .. -1"),
        (torch.zeros(1, 65, dtype=torch.int64), "context_length = 64"),
    ],
)
def test_bad_tokens_are_named(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate(_model(), tokens, Coarse(), progress=False)


def test_progress_names_layers(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(_model(), _tokens(), Coarse(), progress=True)
    # The command line moves rich's console to standard error, for good.
    assert "4/4" in "".join(capsys.readouterr())
    calibrate(_model(), _tokens(), Coarse(), progress=False)
    assert "".join(capsys.readouterr()).strip() == ""
