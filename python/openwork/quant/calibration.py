"""Calibration: stream sample text through a model, one layer at a time.

For each layer in order, with ``X`` the hidden states that reach it::

    1. run the dense layer on X; every linear's statistic sees that linear's inputs
    2. compress each linear from its weight and its statistic, and put the result in its place
    3. X <- compressed layer(X)

so a layer is compressed for the inputs the compressed layers before it really produce. In memory at
any time: the model, ``X`` for all samples, and the statistics of one layer.

An algorithm is a short class (:class:`Algorithm`): it names the statistic it wants of a linear and
turns ``(weight, statistic)`` into tensors. A statistic (:class:`Statistic`) hooks itself to the
linear, so inputs, outputs or gradients are all within its reach.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openwork.errors import FormatError
from openwork.tensorfile import read_tensors, write_tensors

if TYPE_CHECKING:
    from openwork.models import Llama

# Tokens that pass a layer at once: enough for the products to run at full speed, few enough that
# the widest activation of a layer stays small next to the hidden states of all samples.
_BATCH_TOKENS = 2048

_COLUMNS = (
    TextColumn("{task.description:<22}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
)


def check_dense(op: str, model: Llama) -> None:
    """Refuse a model with linears of the layers that are not dense.

    Raises:
        ValueError: names ``op``, the linear, and what it is.
    """
    for name, parent, attribute in model.linears():
        linear = getattr(parent, attribute)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{op}: {name} must be dense, got {type(linear).__name__}")


class Statistic(Protocol):
    """What one algorithm accumulates about one linear while samples pass."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def attach(self, linear: nn.Linear) -> RemovableHandle:
        """Hook into ``linear`` so that every later call is accounted for."""


S = TypeVar("S", bound=Statistic)


class Algorithm(Protocol[S]):
    """A compression algorithm that :func:`calibrate` can run."""

    def options(self) -> Mapping[str, Any]:
        """All options that affect the result, as JSON values; part of the resume fingerprint."""

    def statistic(self, linear: nn.Linear) -> S:
        """A new, empty statistic for ``linear``."""

    def compress(self, linear: nn.Linear, statistic: S) -> dict[str, Tensor]:
        """The compressed form of ``linear`` as named tensors, complete enough for ``install``.

        Raises:
            ValueError: the linear or its statistic cannot be compressed, for instance because it is
                not finite.
        """

    def install(
        self, name: str, parent: nn.Module, attribute: str, tensors: Mapping[str, Tensor]
    ) -> None:
        """Replace ``getattr(parent, attribute)`` by the compressed form.

        Raises:
            ValueError: the tensors do not fit the linear (they may come from a file).
        """


class InputSecondMoment:
    """Running mean of ``x x^T`` over all tokens ``x [k]`` that enter a linear; float32.

    Example:
        >>> moment = InputSecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> moment.mean()
        tensor([[1., 1.],
                [1., 2.]])
    """

    # Only blocks on and above the diagonal are computed: 0.58 of the work at k = 1536.
    _BLOCK = 256

    def __init__(self, k: int) -> None:
        self.count = 0
        self._upper = torch.zeros(k, k)

    @property
    def nbytes(self) -> int:
        return self._upper.nbytes

    def attach(self, linear: nn.Linear) -> RemovableHandle:
        def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.update(inputs[0])

        return linear.register_forward_pre_hook(observe)

    def update(self, x: Tensor) -> None:
        """Account for ``x [..., k]``."""
        k = len(self._upper)
        tokens = x.detach().reshape(-1, k).float()
        total = self.count + len(tokens)
        if total == 0:
            return
        for begin in range(0, k, self._BLOCK):
            end = begin + self._BLOCK
            self._upper[begin:end, begin:].addmm_(
                tokens[:, begin:end].t(),
                tokens[:, begin:],
                beta=self.count / total,
                alpha=1 / total,
            )
        self.count = total

    def mean(self) -> Tensor:
        """``E[x x^T]`` as ``[k, k]`` float32, exactly symmetric."""
        return self._upper.triu() + self._upper.triu(1).t()


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibrate` held in memory and did.

    Attributes:
        layers: layers in the model.
        resumed: how many of them came from ``resume_dir``.
        hidden_bytes: the hidden states of all samples.
        statistics_bytes: the largest sum of all statistics alive at one time.
    """

    layers: int
    resumed: int
    hidden_bytes: int
    statistics_bytes: int


@torch.no_grad()
def calibrate(
    model: Llama,
    tokens: Tensor,
    algorithm: Algorithm[S],
    *,
    progress: bool = True,
    resume_dir: str | Path | None = None,
) -> CalibrationReport:
    """Compress the linears of ``model`` in place, layer by layer, on sample text.

    Args:
        model: the dense model; its linears are replaced as the algorithm says.
        tokens: ``[samples, length]`` int64, ids the model knows.
        algorithm: what to collect and what to make of it.
        progress: show a progress bar.
        resume_dir: folder for the results so far. A run that was interrupted continues there and
            ends as an uninterrupted one would. It takes the space of the compressed weights (a byte
            a weight for quantized ones) and of the hidden states. None: not resumable.

    Returns:
        What was held in memory.

    Raises:
        ValueError: tokens of another shape, dtype or range, a linear that cannot be compressed, or
            a ``resume_dir`` that belongs to other options, tokens or weights.
        FormatError: a damaged file in ``resume_dir``.
        OSError: ``resume_dir`` cannot be written.
    """
    _check_tokens(tokens, model.embed.num_embeddings)
    linears = _linears_of_layers(model)
    store = None if resume_dir is None else _Store(Path(resume_dir), model, tokens, algorithm)
    done = 0
    hidden = None
    if store is not None:
        done, hidden = store.load_hidden([*tokens.shape, model.embed.embedding_dim], model.dtype)
        for index in range(done):
            store.install_layer(index, linears[index])
    if hidden is None:
        hidden = model.embed(tokens)
    rope = model.rope(0, tokens.shape[1])
    statistics_bytes = 0
    with Progress(*_COLUMNS, disable=not progress) as bar:
        task = bar.add_task("", total=len(linears), completed=done)
        for index in range(done, len(linears)):
            layer = model.layers[index]
            bar.update(task, description=f"layer {index + 1}: collecting")
            statistics = _collect(layer, hidden, rope, linears[index], algorithm)
            statistics_bytes = max(statistics_bytes, sum(s.nbytes for s in statistics.values()))
            results = {}
            for name, parent, attribute in linears[index]:
                bar.update(task, description=name)
                linear = getattr(parent, attribute)
                try:
                    # Popped, so that a linear's statistic is freed as soon as it is used.
                    results[name] = algorithm.compress(linear, statistics.pop(name))
                except ValueError as error:
                    raise ValueError(f"calibrate: {name}: {error}") from error
                algorithm.install(name, parent, attribute, results[name])
            bar.update(task, description=f"layer {index + 1}: outputs")
            for batch in _batches(hidden):
                batch.copy_(layer(batch, *rope))
            if store is not None:
                store.save(index, results, hidden)
            bar.advance(task)
    return CalibrationReport(
        layers=len(linears),
        resumed=done,
        hidden_bytes=hidden.nbytes,
        statistics_bytes=statistics_bytes,
    )


def _collect(
    layer: nn.Module,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    linears: list[tuple[str, nn.Module, str]],
    algorithm: Algorithm[S],
) -> dict[str, S]:
    """Run ``layer`` on all samples and return the statistic of each of its linears."""
    statistics = {}
    with ExitStack() as hooks:
        for name, parent, attribute in linears:
            linear = getattr(parent, attribute)
            statistics[name] = algorithm.statistic(linear)
            hooks.callback(statistics[name].attach(linear).remove)
        for batch in _batches(hidden):
            layer(batch, *rope)
    return statistics


def _batches(hidden: Tensor) -> tuple[Tensor, ...]:
    """Views of ``hidden [samples, length, d]`` of about ``_BATCH_TOKENS`` tokens each."""
    return torch.split(hidden, max(1, _BATCH_TOKENS // hidden.shape[1]))


def _linears_of_layers(model: Llama) -> list[list[tuple[str, nn.Module, str]]]:
    """``model.linears()``, one list per layer."""
    layers: list[list[tuple[str, nn.Module, str]]] = [[] for _ in model.layers]
    for name, parent, attribute in model.linears():
        layers[int(name.split(".")[1])].append((name, parent, attribute))
    return layers


def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            "calibrate: tokens must be a non-empty [samples, length] int64 tensor, "
            f"got {list(tokens.shape)} {tokens.dtype}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"calibrate: tokens must be in 0 .. {vocab_size - 1}, got {low} .. {high}; "
            "were they made with another tokenizer?"
        )


class _Store:
    """The results so far, in a folder.

    ``layer-0003.safetensors`` holds the compressed linears of a layer, and ``hidden.safetensors``
    the hidden states after ``layers_done`` layers, the one number that says how far the run got: a
    layer file is complete before it counts. All carry the fingerprint of the run they belong to.
    """

    def __init__(self, folder: Path, model: Llama, tokens: Tensor, algorithm: Algorithm[S]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._install = algorithm.install
        self._fingerprint = _fingerprint(model, tokens, algorithm.options())
        self._layers = len(model.layers)

    def _layer_path(self, index: int) -> Path:
        return self._folder / f"layer-{index:04d}.safetensors"

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, metadata = read_tensors(path)
        if metadata.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"calibrate: resume_dir must hold results of the same options, tokens and weights, "
                f"got others in {path}; choose another folder or delete this one"
            )
        return tensors, metadata

    def load_hidden(self, shape: list[int], dtype: torch.dtype) -> tuple[int, Tensor | None]:
        """Layers done and the hidden states after them; (0, None) in a new folder."""
        path = self._folder / "hidden.safetensors"
        if not path.exists():
            return 0, None
        tensors, metadata = self._read(path)
        done, hidden = metadata.get("layers_done", ""), tensors.get("hidden")
        if not done.isdecimal() or not 0 < int(done) <= self._layers:
            raise FormatError(f"{path}: layers_done in 1 .. {self._layers} expected, got {done!r}")
        if hidden is None or list(hidden.shape) != shape or hidden.dtype != dtype:
            raise FormatError(f"{path}: hidden states {shape} {dtype} expected, got others or none")
        return int(done), hidden.clone()  # a copy: the states are updated in place, the file is not

    def install_layer(self, index: int, linears: list[tuple[str, nn.Module, str]]) -> None:
        """Put the stored results of a layer into the model."""
        path = self._layer_path(index)
        tensors, _ = self._read(path)
        for name, parent, attribute in linears:
            prefix = f"{name}/"
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            try:
                self._install(name, parent, attribute, own)
            except (ValueError, KeyError) as error:
                raise FormatError(f"{path}: {name} as it was written expected: {error}") from error

    def save(self, index: int, results: Mapping[str, Mapping[str, Tensor]], hidden: Tensor) -> None:
        """Record that layer ``index`` is done and what comes out of it."""
        tensors = {
            f"{name}/{key}": tensor
            for name, result in results.items()
            for key, tensor in result.items()
        }
        metadata = {"fingerprint": self._fingerprint}
        write_tensors(self._layer_path(index), tensors, metadata)
        write_tensors(
            self._folder / "hidden.safetensors",
            {"hidden": hidden},
            metadata | {"layers_done": str(index + 1)},
        )


def _fingerprint(model: Llama, tokens: Tensor, options: Mapping[str, Any]) -> str:
    """SHA-256 over everything the result of a calibration depends on."""
    digest = hashlib.sha256(json.dumps(dict(options), sort_keys=True).encode())
    digest.update(repr(model.config).encode())
    for name, tensor in [("tokens", tokens), *model.state_dict().items()]:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
