"""A tiny random model, and writers of the files it can be loaded from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from openwork.models import Llama, LlamaConfig
from openwork.models.config import config_to_hf
from openwork.models.weights import parameters

# Every number differs from the others, so that a swapped one shows. Rows are whole blocks of 32.
TINY = LlamaConfig(
    family="llama",
    vocab_size=320,
    hidden_size=64,
    ffn_size=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=16,
    context_length=2048,
    rope_theta=5000.0,
    norm_eps=1e-5,
    bos_id=1,
    eos_ids=(2,),
)
QWEN: dict[str, Any] = {"family": "qwen2", "qkv_bias": True}


def random_model(seed: int = 0, **changes: Any) -> Llama:
    """A model with weights of a size that keeps the logits alive, norms and biases included."""
    config = replace(TINY, **changes)
    model = Llama(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if name.endswith("norm") else 0.0
        parameter.normal_(around, 0.3 if parameter.dim() == 1 else 0.12, generator=generator)
    return model


def checkpoint_tensors(model: Llama) -> dict[str, Tensor]:
    """The model's weights under Hugging Face's names, fused ones taken apart."""
    tensors = {}
    state = model.state_dict()
    for name, parts in parameters(model.config):
        rows = [part.shape[0] for part in parts]
        for part, tensor in zip(parts, torch.split(state[name], rows), strict=True):
            tensors[part.name] = tensor.clone()
    return tensors


def write_directory(model: Llama, directory: Path, *, shards: int = 1) -> Path:
    """``config.json`` and safetensors, with an index where there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    tensors = checkpoint_tensors(model)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        shard = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k: halves of a head interleaved (convert_hf_to_gguf.py)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    model: Llama,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A GGUF file as llama.cpp's converter writes it; ``kind`` is the type of the matrices."""
    c = model.config
    architecture = "qwen2" if c.family == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.ffn_size)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_bos_token_id(c.bos_id)
    writer.add_eos_token_id(c.eos_ids[0])
    metadata(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.layers)
    for name, tensor in checkpoint_tensors(model).items():
        data = tensor.numpy()
        if architecture == "llama":
            for projection, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
                if projection in name:
                    data = permute(data, heads)
        stored = kind if data.ndim == 2 else GGMLQuantizationType.F32
        data = np.ascontiguousarray(data)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quants.quantize(data, stored),
            raw_dtype=stored,
        )
    if isinstance(c.rope_scaling, tuple):
        writer.add_tensor("rope_freqs.weight", np.array(c.rope_scaling, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What byte-level BPE tokenizers use for the 256 bytes.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *_BYTES, "th", "the", "Ġthe", "Ġ1"]
MERGES = ["t h", "th e", "Ġ the", "Ġ 1"]


def add_tokenizer(writer: gguf.GGUFWriter, *, pre: str = "smollm") -> None:
    """A small byte-level BPE vocabulary."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3))
    writer.add_token_merges(MERGES)


def write_tokenizer(path: Path) -> Path:
    """The same vocabulary as ``tokenizer.json``."""
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(VOCABULARY[:3])
    inner.save(str(path))
    return path


def assert_same_weights(model: Llama, expected: Llama) -> None:
    state, want = model.state_dict(), expected.state_dict()
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor), name
