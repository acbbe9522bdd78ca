"""Models on disk: round trips, what other libraries see, and damaged files."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.checkpoints import QWEN, random_model
from models.damage import EXTREME, FUZZ, JSON_PIECES, Damage, damaged, damages, safetensors_header
from torch import Tensor

from openwork import checkpoint
from openwork.errors import FormatError
from openwork.models import Llama
from openwork.models.hf import load_hf
from openwork.models.tokenizer import Tokenizer
from openwork.nn import LowbitLinear
from openwork.ops import unpack_lowbit
from openwork.quant import quantize_model, rtn

# Rows of 144 and 96: groups of 64 and 128 leave a short last one.
SHAPE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 144, "head_dim": 24}


def _model(**changes: Any) -> Llama:
    return random_model(**SHAPE | changes)


def _quantized(*, head_bits: int | None = None, changes: Any = None, **grid: Any) -> Llama:
    model = _model(**changes or {})
    grid = {"bits": 4, "group_size": 16} | grid
    quantize_model(model, "rtn", **grid, head_bits=head_bits, progress=False)
    return model


def _tokens() -> Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def _assert_same(a: Llama, b: Llama) -> None:
    for name, parent, attribute in [*a.linears(), ("head", a, "head")]:
        ours, theirs = getattr(parent, attribute), b.get_submodule(name)
        assert type(ours) is type(theirs)
        if isinstance(ours, LowbitLinear):
            assert ours.weight.layout == theirs.weight.layout
            assert ours.weight.group_size == theirs.weight.group_size
            for x, y in zip(unpack_lowbit(ours.weight), unpack_lowbit(theirs.weight), strict=True):
                assert (x is None) == (y is None)
                assert x is None or (x.dtype == y.dtype and torch.equal(x, y))
    assert torch.equal(a(_tokens()), b(_tokens()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
def test_round_trip(tmp_path: Path, bits: int, symmetric: bool, group_size: int | None) -> None:
    model = _quantized(bits=bits, symmetric=symmetric, group_size=group_size, head_bits=8)
    checkpoint.save(model, tmp_path / "m")
    _assert_same(model, checkpoint.load(tmp_path / "m"))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_keeps_the_dtype_of_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    model = _quantized(scale_dtype=scale_dtype)
    checkpoint.save(model, tmp_path / "m")
    _assert_same(model, checkpoint.load(tmp_path / "m"))


@pytest.mark.parametrize("changes", [QWEN, {"tied_head": True}, {"layers": 1}, {"kv_heads": 6}])
@pytest.mark.parametrize("head_bits", [None, 4])
def test_round_trip_of_other_models(
    tmp_path: Path, changes: dict[str, Any], head_bits: int | None
) -> None:
    model = _quantized(changes=changes, head_bits=head_bits)
    checkpoint.save(model, tmp_path / "m")
    loaded = checkpoint.load(tmp_path / "m")
    _assert_same(model, loaded)
    # A quantized head is no longer the embedding.
    assert loaded.config.tied_head == (changes.get("tied_head", False) and head_bits is None)


def test_a_group_that_no_file_can_hold_stays_short(tmp_path: Path) -> None:
    # gcd(32, 24 * 3) = 8 is no group size; only this library reads the result.
    model = _quantized(changes={"hidden_size": 72, "head_dim": 12}, group_size=32)
    checkpoint.save(model, tmp_path / "m")
    _assert_same(model, checkpoint.load(tmp_path / "m"))


def test_compute_mode_and_dtype_are_chosen_at_load(tmp_path: Path) -> None:
    checkpoint.save(_quantized(), tmp_path / "m")
    model = checkpoint.load(tmp_path / "m", dtype=torch.bfloat16, compute="float")
    assert model(_tokens()).dtype == torch.bfloat16
    assert model.layers[0].attn.o.compute == "float"


def test_a_partly_dense_model(tmp_path: Path) -> None:
    model = _quantized()
    torch.manual_seed(1)
    dense = _model()
    model.layers[0].attn.qkv = dense.layers[0].attn.qkv
    model.layers[1].mlp.down = dense.layers[1].mlp.down
    checkpoint.save(model, tmp_path / "m")
    _assert_same(model, checkpoint.load(tmp_path / "m"))


def test_a_dense_model_is_plain_hugging_face(tmp_path: Path) -> None:
    model = _model(**QWEN)
    checkpoint.save(model, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    assert torch.equal(load_hf(tmp_path / "m")(_tokens()), model(_tokens()))


def test_what_the_file_holds(tmp_path: Path) -> None:
    checkpoint.save(_quantized(bits=3, group_size=64, head_bits=8), tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    described = {name: (list(t.shape), t.dtype) for name, t in tensors.items()}
    up, head = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    # 144 columns are 9 groups of 16, the largest groups that divide both 64 and 144.
    assert described[f"{up}_packed"] == ([96, 14], torch.int32)
    assert described[f"{up}_scale"] == ([96, 9], torch.float16)
    assert described[f"{up}_zero_point"] == ([9, 9], torch.int32)
    assert tensors[f"{up}_shape"].tolist() == [96, 144]
    assert described[f"{head}_packed"] == ([96, 36], torch.int32)
    assert described["model.embed_tokens.weight"] == ([96, 144], torch.float32)
    config = json.loads((tmp_path / "m/config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [3, 3, 8]
    assert [g["weights"]["group_size"] for g in groups.values()] == [16, 32, 16]
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj",
        "model.layers.0.mlp.down_proj", "lm_head",
    ]  # fmt: skip
    found = [
        [index for index, group in enumerate(groups.values()) for t in group["targets"]
         if (re.match(t[3:], name) if t.startswith("re:") else t == name)]
        for name in names
    ]  # fmt: skip
    assert found == [[0], [0], [1], [2]]


def _library_scheme(config: dict[str, Any], index: int) -> Any:
    """A scheme of a quantization_config, as compressed-tensors itself parses it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    parsed = quantization.QuantizationConfig.model_validate(config)
    return list(parsed.config_groups.values())[index]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, None])
def test_compressed_tensors_reads_and_writes_the_same(
    tmp_path: Path, bits: int, symmetric: bool, group_size: int | None
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    compressor = compressors.PackedQuantizationCompressor
    model = _quantized(
        bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=torch.float32
    )
    checkpoint.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    tensors = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    prefix = "model.layers.1.self_attn.k_proj."
    stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    scheme = _library_scheme(config, 0)
    assert scheme.weights.group_size == (group_size and min(group_size, 16))
    decompressed = compressor.decompress(stored, scheme)
    # Rows of qkv: 144 of q, then 48 of k.
    ours = rtn(
        _model().layers[1].attn.qkv.weight, bits=bits, symmetric=symmetric, group_size=group_size,
        scale_dtype=torch.float32,
    ).dequantize()[144:192]  # fmt: skip
    assert torch.equal(decompressed["weight"], ours)
    # Compressing what it read gives our tensors back, bit for bit.
    again = compressor.compress(decompressed, scheme)
    assert set(again) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.hf
@pytest.mark.parametrize("tied_head", [False, True])
def test_transformers_loads_a_symmetric_model(tmp_path: Path, tied_head: bool) -> None:
    # Asymmetric ones it refuses (5.23): it expects zero points that are not packed.
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    changes = {"tied_head": tied_head}
    model = _quantized(symmetric=True, group_size=128, head_bits=8, changes=changes)
    checkpoint.save(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, local_files_only=True
    )
    ours = checkpoint.load(tmp_path / "m", compute="float")
    with torch.no_grad():
        # Their weights are exactly ours; only sums are in another order.
        torch.testing.assert_close(ours(_tokens()), theirs(_tokens()).logits, rtol=1e-4, atol=1e-4)


def _tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")))


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    model = _quantized()
    model.tokenizer = _tokenizer()
    checkpoint.save(model, tmp_path / "m")
    loaded = checkpoint.load(tmp_path / "m").tokenizer
    assert loaded is not None
    assert loaded.inner.to_str() == model.tokenizer.inner.to_str()


def test_tokenizer_files_are_copied_from_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (source / name).write_text(name)
    model = _quantized()
    model.tokenizer = _tokenizer()
    checkpoint.save(model, tmp_path / "m", source=source)
    assert (tmp_path / "m/tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "m/chat_template.jinja").read_text() == "chat_template.jinja"
    assert (tmp_path / "m/model.safetensors").read_bytes() != b"model.safetensors"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    checkpoint.save(_quantized(), target)  # empty is fine
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="save: directory must be new or empty"):
        checkpoint.save(_quantized(bits=8), target)
    assert (target / "model.safetensors").read_bytes() == before
    (target / "stale").write_text("")
    checkpoint.save(_quantized(bits=8), target, overwrite=True)
    assert _names(target) == ["config.json", "model.safetensors"]
    assert (target / "model.safetensors").read_bytes() != before
    assert _names(tmp_path) == ["m"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="got a file"):
        checkpoint.save(_quantized(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def _full_disk(*_: Any, **__: Any) -> None:
    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target = tmp_path / "m"
    model = _quantized()
    if overwrite:
        checkpoint.save(model, target)
        before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(safetensors.torch, "save_file", _full_disk)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        checkpoint.save(model, target, overwrite=overwrite)
    assert _names(tmp_path) == (["m"] if overwrite else [])
    if overwrite:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_write_the_system_stops_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(_quantized(), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(tmp_path) == []


def test_a_failed_last_step_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    checkpoint.save(_quantized(), target)
    rename = os.rename

    def fail(source: Path, destination: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError("stop")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="stop"):
        checkpoint.save(_quantized(bits=8), target, overwrite=True)
    assert _names(tmp_path) == ["m"]
    checkpoint.load(target)


def test_a_target_inside_a_file_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        checkpoint.save(_quantized(), tmp_path / "file" / "m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    checkpoint.save(_quantized(group_size=64, head_bits=8), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


_Q = "model.layers.1.self_attn.q_proj.weight"
_HEAD = "lm_head.weight"


def _set(name: str, index: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = value

    return change


def _to(name: str, new: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = new(tensors[name]).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{_Q}_packed"), f"{_Q} [144, 144] expected, got no such tensor"),
        (lambda t: t.pop(f"{_Q}_scale"), f"{_Q} [144, 144] (and what is fused with it)"),
        (lambda t: t.pop(f"{_Q}_zero_point"), "by one scheme of quantization_config expected"),
        (lambda t: t.pop(f"{_Q}_shape"), f"{_Q}_shape = [144, 144] expected"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight [144] expected"),
        (_to(f"{_Q}_packed", lambda x: x[:, :-1]), "by one scheme of quantization_config expected"),
        (_to(f"{_Q}_packed", lambda x: x.float()), f"{_Q}_packed of int32 expected"),
        (_to(f"{_Q}_zero_point", lambda x: x.long()), f"{_Q}_zero_point of int32 expected"),
        (_to(f"{_Q}_scale", lambda x: x[:, :-1]), "by one scheme of quantization_config expected"),
        (_to(f"{_Q}_scale", lambda x: x.int()), f"{_Q}_scale in one of F64, F32, F16, BF16"),
        (_to(f"{_Q}_scale", lambda x: x.double()), "scales must be float16, bfloat16 or float32"),
        (_set(f"{_Q}_scale", (3, 4), float("nan")), "scales must be finite and above 0"),
        (_set(f"{_HEAD}_scale", (0, 0), float("inf")), "scales must be finite and above 0"),
        (_set(f"{_HEAD}_scale", (0, 0), 0.0), "scales must be finite and above 0"),
        (_set(f"{_HEAD}_scale", (0, 0), -1.0), "scales must be finite and above 0"),
        (_set(f"{_Q}_shape", (0,), 143), f"{_Q}_shape = [144, 144] expected"),
        (_to(f"{_Q}_shape", lambda x: x[:1]), f"{_Q}_shape = [144, 144] expected"),
        (lambda t: t.update({f"{_Q}_g_idx": torch.zeros(144)}), f"no {_Q}_g_idx expected"),
    ],
)
def test_contradictory_tensors_are_named(
    copy: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    path = copy / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(FormatError, match=re.escape(message)):
        checkpoint.load(copy)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["quant_method"], "gptq", "quant_method 'compressed-tensors' expected, got 'gptq'"),
        (["format"], "float-quantized", "format 'pack-quantized' expected"),
        (["config_groups"], {}, "got 0 that fit"),
        (["config_groups"], [], "config_groups of type dict expected"),
        (["config_groups", "group_0"], "W4A16", "group_0 of type dict expected"),
        (["config_groups", "group_0", "weights", "num_bits"], 5, "num_bits in (2, 3, 4, 8)"),
        (["config_groups", "group_0", "weights", "num_bits"], 8, "got 0 that fit"),
        (["config_groups", "group_0", "weights", "group_size"], 48, "got 4 and 48"),
        (["config_groups", "group_0", "weights", "strategy"], "tensor", "'group' or 'channel'"),
        (["config_groups", "group_0", "weights", "type"], "float", "type 'int' and strategy"),
        (
            ["config_groups", "group_0", "input_activations"],
            {"num_bits": 8},
            "no input_activations",
        ),
        (["kv_cache_scheme"], {"num_bits": 8}, "no kv_cache_scheme expected"),
        (["transform_config"], {"a": 1}, "no transform_config expected"),
    ],
)
def test_unsupported_schemes_are_named(
    copy: Path, keys: list[str], value: object, message: str
) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    section = config["quantization_config"]
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=re.escape(message)):
        checkpoint.load(copy)


def test_a_dense_directory_is_not_a_quantized_one(tmp_path: Path) -> None:
    checkpoint.save(_model(), tmp_path / "m")
    with pytest.raises(FormatError, match="quant_method expected, got none"):
        checkpoint.load(tmp_path / "m")


def test_missing_files_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        checkpoint.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoint.load(copy)


@FUZZ
@given(damage=damages(EXTREME + JSON_PIECES), part=st.sampled_from(["config", "header", "all"]))
def test_damaged_files_are_named_or_harmless(saved: Path, damage: Damage, part: str) -> None:
    path = saved / ("config.json" if part == "config" else "model.safetensors")
    region = safetensors_header(path) if part == "header" else None
    with damaged(path, damage, region):
        try:
            checkpoint.load(saved)
        except FormatError as error:
            assert str(saved) in str(error)
