"""GGUF files: what llama.cpp's converter writes is read back, and damage is told, not suffered."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from openwork.errors import FormatError
from openwork.models import Llama, load
from openwork.models.gguf import GGUFFile, unpermute

from .checkpoints import (
    QWEN,
    add_tokenizer,
    assert_same_weights,
    permute,
    random_model,
    write_gguf,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        QWEN,
        {"rope_scaling": tuple(1.0 + i for i in range(8))},
        {"head_dim": 32},
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, changes: dict[str, object]) -> None:
    model = random_model(**changes)
    loaded = load(write_gguf(model, tmp_path / "model.gguf"))
    assert_same_weights(loaded, model)
    tokens = torch.arange(12)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.config.bos_id, loaded.config.eos_ids) == (1, (2,))
    assert loaded.config.rope_scaling == model.config.rope_scaling
    assert loaded.tokenizer is None
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tied_head


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16"])
def test_reads_block_formats(tmp_path: Path, tiny: Llama, kind: str) -> None:
    stored = GGMLQuantizationType[kind]
    loaded = load(write_gguf(tiny, tmp_path / "model.gguf", kind=stored))

    def stored_value(name: str, weight: torch.Tensor) -> torch.Tensor:
        data = weight.numpy()
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(data, stored), stored))

    # Blocks lie along a row, so reordering rows commutes with quantizing them.
    for name, weight in tiny.state_dict().items():
        expected = weight if weight.dim() == 1 else stored_value(name, weight)
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_bfloat16(tmp_path: Path, tiny: Llama) -> None:
    loaded = load(write_gguf(tiny, tmp_path / "model.gguf"), dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.layers[1].attn.qkv.weight, tiny.layers[1].attn.qkv.weight.bfloat16())


def test_unpermute_undoes_the_converter() -> None:
    rows = torch.randn(3 * 16, 5)
    assert torch.equal(unpermute(torch.from_numpy(permute(rows.numpy(), 3)), 3), rows)
    assert torch.equal(unpermute(torch.arange(8), 1), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]))


def test_metadata_of_every_type(tmp_path: Path, tiny: Llama) -> None:
    values = {
        "u8": (gguf.GGUFValueType.UINT8, 200), "i8": (gguf.GGUFValueType.INT8, -3),
        "u16": (gguf.GGUFValueType.UINT16, 60000), "i16": (gguf.GGUFValueType.INT16, -300),
        "u32": (gguf.GGUFValueType.UINT32, 4000000000), "i32": (gguf.GGUFValueType.INT32, -70000),
        "u64": (gguf.GGUFValueType.UINT64, 2**63), "i64": (gguf.GGUFValueType.INT64, -(2**40)),
        "f32": (gguf.GGUFValueType.FLOAT32, 0.5), "f64": (gguf.GGUFValueType.FLOAT64, 0.1),
        "bool": (gguf.GGUFValueType.BOOL, True), "text": (gguf.GGUFValueType.STRING, "grüß"),
    }  # fmt: skip

    def add(writer: gguf.GGUFWriter) -> None:
        for key, (kind, value) in values.items():
            writer.add_key_value(f"test.{key}", value, kind)
        writer.add_array("test.numbers", [1, 2, 3])
        writer.add_array("test.words", ["a", "", "ß"])

    with GGUFFile(write_gguf(tiny, tmp_path / "model.gguf", metadata=add)) as file:
        for key, (_, value) in values.items():
            assert file.metadata[f"test.{key}"] == value
        assert file.metadata["test.numbers"] == [1, 2, 3]
        assert file.metadata["test.words"] == ["a", "", "ß"]


def test_agrees_with_the_gguf_package(tmp_path: Path, tiny: Llama) -> None:
    path = write_gguf(
        tiny, tmp_path / "model.gguf", kind=GGMLQuantizationType.Q8_0, metadata=add_tokenizer
    )
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        for key, value in file.metadata.items():
            assert theirs.fields[key].contents() == value
        assert len(file.tensors) == len(theirs.tensors)
        for tensor in theirs.tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(file.read(tensor.name).numpy(), expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.add_string("general.architecture", "gemma3"), "of llama, qwen2 expected"),
        (lambda w: w.add_block_count(3), r"model.layers.2.input_layernorm.weight \[64\] expected"),
        (lambda w: w.add_block_count(2**31), "model.layers.2.input_layernorm.weight"),
        (lambda w: w.add_embedding_length(128), r"\[320, 128\] expected, got \[320, 64\]"),
        (lambda w: w.add_head_count(2**31), "q_proj.weight .* expected"),
        (lambda w: w.add_head_count(0), "heads must be at least 1, got 0"),
        (lambda w: w.add_string("llama.block_count", "two"), "block_count of type int expected"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count = head size 16 expected"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "got 'yarn'"),
        (lambda w: w.add_expert_count(8), "no experts expected"),
    ],
    ids=[
        "architecture", "blocks", "many blocks", "width", "heads", "no heads", "type", "rope",
        "scaling", "experts",
    ],
)  # fmt: skip
def test_rejects_metadata(
    tmp_path: Path, tiny: Llama, edit: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    def override(writer: gguf.GGUFWriter) -> None:
        # The writer refuses to set a key twice; start over with the edited values kept.
        edited = type(writer)(tmp_path / "scratch", "llama")
        edit_only(edited)
        writer.kv_data[0].update(edited.kv_data[0])

    def edit_only(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].clear()
        edit(writer)

    path = write_gguf(tiny, tmp_path / "model.gguf", metadata=override)
    with pytest.raises(FormatError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_rejects_missing_tensors(tmp_path: Path, tiny: Llama) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf")
    data = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.* expected, got no such tensor"):
        load(path)


def test_rejects_integers_as_weights(tmp_path: Path, tiny: Llama) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf")
    name = b"output_norm.weight"
    data = bytearray(path.read_bytes())
    # name, u32 dimensions, u64 size, u32 type
    at = data.index(name) + len(name) + 4 + 8
    assert data[at : at + 4] == struct.pack("<I", GGMLQuantizationType.F32)
    data[at : at + 4] = struct.pack("<I", GGMLQuantizationType.I32)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"output_norm.weight in a floating-point.* got I32"):
        load(path)


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_rejects_truncated_files(tmp_path: Path, tiny: Llama, share: float) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf", metadata=add_tokenizer)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FormatError, match=r"model\.gguf: .* expected"):
        load(path)


def _patch(position: int, value: bytes) -> Callable[[bytearray], None]:
    def patch(data: bytearray) -> None:
        data[position : position + len(value)] = value

    return patch


def _patch_length(of: bytes, value: int) -> Callable[[bytearray], None]:
    """Overwrite the 64-bit length in front of a string."""

    def patch(data: bytearray) -> None:
        at = data.index(of) - 8
        data[at : at + 8] = struct.pack("<Q", value)

    return patch


def _patch_array(key: bytes, value: int) -> Callable[[bytearray], None]:
    """Overwrite the 64-bit count of an array: key, u32 type, u32 element type, u64 count."""

    def patch(data: bytearray) -> None:
        at = data.index(key) + len(key) + 8
        data[at : at + 8] = struct.pack("<Q", value)

    return patch


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (_patch(0, b"GGML"), "a GGUF file expected"),
        (_patch(4, struct.pack("<I", 99)), "version 2 or 3 .* expected at byte 8, got 99"),
        (_patch(4, struct.pack(">I", 3)), "little-endian"),
        (_patch(8, struct.pack("<Q", 2**60)), "expected at byte"),
        (_patch(16, struct.pack("<Q", 2**60)), "expected at byte"),
        (_patch_length(b"llama.block_count", 2**62), "a key .4611686018427387904 bytes. expected"),
        (_patch_length(b"blk.0.attn_q.weight", 2**40), "a tensor name"),
        (_patch_array(b"tokenizer.ggml.token_type", 2**61), "token_type .* expected"),
        (_patch_array(b"tokenizer.ggml.tokens", 2**61), "tokenizer.ggml.tokens"),
    ],
    ids=[
        "magic", "version", "endian", "tensors", "entries", "key", "name", "numbers", "strings",
    ],
)  # fmt: skip
def test_declared_sizes_are_checked_before_use(
    tmp_path: Path, tiny: Llama, patch: Callable[[bytearray], None], message: str
) -> None:
    path = write_gguf(tiny, tmp_path / "model.gguf", metadata=add_tokenizer)
    data = bytearray(path.read_bytes())
    patch(data)
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        load(path)


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        load(tmp_path / "nothing.gguf")
