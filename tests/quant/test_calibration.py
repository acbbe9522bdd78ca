"""The calibration engine: order, memory, statistics, and resuming."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openwork.errors import FormatError
from openwork.models import DenseLinear, Llama, LlamaConfig
from openwork.quant import InputSecondMoment, calibrate
from openwork.quant import calibration as engine

CONFIG = LlamaConfig(
    "llama", vocab_size=64, hidden_size=32, ffn_size=48, layers=4, heads=4, kv_heads=2, head_dim=8,
    context_length=64,
)  # fmt: skip


def _model(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(CONFIG).eval().requires_grad_(False)


def _tokens(samples: int = 5, length: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (samples, length), generator=generator)


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
    for index in range(CONFIG.layers):
        expected = _moments_of_layer(dense, index, hidden, rope)
        stale = _moments_of_layer(dense, index, dense_hidden, rope)
        seen = algorithm.moments[4 * index : 4 * index + 4]
        for (name, moment), ours in zip(expected.items(), seen, strict=True):
            torch.testing.assert_close(ours, moment)
            # The test would see it if dense outputs were used instead.
            assert index == 0 or not torch.allclose(moment, stale[name], rtol=1e-3)
        hidden = compressed.layers[index](hidden, *rope)
        dense_hidden = dense.layers[index](dense_hidden, *rope)
    assert len(algorithm.moments) == 4 * CONFIG.layers
    assert (report.layers, report.resumed) == (CONFIG.layers, 0)


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
    assert counts == [1, 2, 3, 4, 4, 3, 2, 1] * CONFIG.layers
    assert len(alive) == 0
    widths = [CONFIG.hidden_size, CONFIG.heads * CONFIG.head_dim, CONFIG.hidden_size]
    assert report.statistics_bytes == sum(4 * k * k for k in [*widths, CONFIG.ffn_size])
    assert report.hidden_bytes == tokens.numel() * CONFIG.hidden_size * 4


def test_statistics_come_off_when_a_layer_fails() -> None:
    model = _model()

    class Failing(InputSecondMoment):
        def update(self, x: Tensor) -> None:
            raise RuntimeError("stop")

    algorithm = Coarse()
    algorithm.statistic = lambda linear: Failing(linear.in_features)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="stop"):
        calibrate(model, _tokens(), algorithm, progress=False)
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
        tokens[-1, -1] = (tokens[-1, -1] + 1) % CONFIG.vocab_size
    elif change == "weights":
        model.layers[3].mlp.down.weight[0, 0] += 1
    else:
        object.__setattr__(model.config, "norm_eps", 2e-5)
    try:
        with pytest.raises(ValueError, match="same options, tokens and weights"):
            calibrate(model, tokens, algorithm, progress=False, resume_dir=tmp_path)
    finally:
        object.__setattr__(model.config, "norm_eps", 1e-5)


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


@given(
    name=st.sampled_from(["hidden.safetensors", "layer-0002.safetensors"]),
    where=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    truncate=st.booleans(),
)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_files_are_named_or_harmless(
    finished: Path, name: str, where: float, value: int, truncate: bool
) -> None:
    path = finished / name
    original = path.read_bytes()
    damaged = bytearray(original)
    # Half of the positions in the header, which is where structure can break.
    header = 8 + int.from_bytes(original[:8], "little")
    position = int(where * 2 * header) if where < 0.5 else int(where * len(original))
    if truncate:
        del damaged[position:]
    else:
        damaged[position] = value
    path.write_bytes(damaged)
    message = None
    try:
        calibrate(_model(), _tokens(), Coarse(), progress=False, resume_dir=finished)
    except FormatError as error:
        message = str(error)
    except ValueError as error:  # the fingerprint itself was hit
        message = str(error)
        assert "same options, tokens and weights" in message
    finally:
        path.write_bytes(original)
    assert message is None or name in message


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
