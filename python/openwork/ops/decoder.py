"""A stack of decoder layers over a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import check_tables
from .checks import (
    check,
    check_cache,
    check_defined,
    check_float,
    check_operand,
    check_position,
)
from .compute import check_compute_id
from .lowbit import check_lowbit

_decoder_layers = torch.ops.openwork.decoder_layers.default

_TENSORS, _INTS = 18, 20
_LINEARS = ("qkv", "o", "gate_up", "down")


def decoder_layers(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    position: int,
    weights: Sequence[Tensor],
    linears: Sequence[int],
    heads: int,
    eps: float,
) -> Tensor:
    """Run ``x`` through decoder layers with low-bit linears, and its tokens into their caches.

    For each layer, with the operators of this package::

        q  = rope_append(lowbit_linear(rms_norm(x, attn_norm), qkv), cos, sin, keys, values)
        x += lowbit_linear(decode_attention(q, keys, values, position + t), o)
        x += lowbit_linear(silu_mul(lowbit_linear(rms_norm(x, mlp_norm), gate_up)), down)

    The result is theirs to the last bit. Calling them one after another costs several times what
    they compute for one token; this is one call, made for few tokens (decoding, a draft).

    Args:
        x: ``[b, t, d]`` float32, bfloat16 or float16.
        cos: ``[t, head_dim / 2]`` float32, contiguous; ``sin`` alike.
        keys: of each layer, ``[b, kv_heads, max_len, head_dim]``, dtype of x, last stride 1.
            **Modified.**
        values: as keys. **Modified.**
        position: tokens the caches hold, ``0 .. max_len - t``.
        weights: of each layer 18 tensors: ``attn_norm [d]``, ``mlp_norm [d]``, and for each of the
            linears qkv ``[(heads + 2 kv_heads) head_dim, d]``, o ``[d, heads head_dim]``, gate_up
            ``[2 ffn, d]``, down ``[d, ffn]``: packed, scales and zeros of a
            :class:`~openwork.PackedWeight` and a bias. An empty tensor stands for None.
        linears: of each linear 5 numbers: layout id, n, k, group_size, and compute as
            ``lowbit_linear`` takes them.
        heads: query heads.
        eps: of both norms.

    Returns:
        ``[b, t, d]``, dtype of x: the residual stream after the last layer. No gradient.

    Raises:
        ValueError: a wrong number, dtype or shape of tensors, or a position out of range.
    """
    y: Tensor = _decoder_layers(x, cos, sin, keys, values, position, weights, linears, heads, eps)
    return y


def _or_none(op: str, name: str, tensor: Tensor) -> Tensor | None:
    check_defined(op, name, tensor)
    return tensor if tensor.numel() else None


@torch.library.register_fake("openwork::decoder_layers")
def _decoder_layers_fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    position: int,
    weights: list[Tensor],
    linears: list[int],
    heads: int,
    eps: float,
) -> Tensor:
    op = "decoder_layers"
    check_float(op, "x", x)
    check(x.dim() == 3 and x.shape[2] >= 1, f"{op}: x must be [b, t, d], got {list(x.shape)}")
    layers = len(keys)
    check(layers >= 1, f"{op}: keys must hold one tensor a layer, got none")
    for name, items, each in (
        ("values", values, 1), ("weights", weights, _TENSORS), ("linears", linears, _INTS)
    ):  # fmt: skip
        check(
            len(items) == layers * each,
            f"{op}: {name} must hold {layers * each} ({each} a layer), got {len(items)}",
        )
    check_defined(op, "keys", keys[0])
    check(
        keys[0].dim() == 4
        and keys[0].shape[1] >= 1
        and keys[0].shape[3] >= 2
        and keys[0].shape[3] % 2 == 0,
        f"{op}: keys must be [b, kv_heads, max_len, head_dim] with head_dim even, got "
        f"{list(keys[0].shape)}",
    )
    (b, t, d), (kv_heads, _, head_dim) = x.shape, keys[0].shape[1:]
    check(
        1 <= heads < 2**31 and heads % kv_heads == 0,
        f"{op}: heads must be a multiple of kv_heads = {kv_heads}, got {heads}",
    )
    ffn = linears[17]
    check(1 <= ffn < 2**31, f"{op}: down must have k in 1 .. 2^31 - 1, got {ffn}")
    check_tables(op, cos, sin, t, head_dim)
    width = heads * head_dim
    shapes = ((width + 2 * kv_heads * head_dim, d), (d, width), (2 * ffn, d), (d, ffn))
    for i in range(layers):
        where = f"{op}: layer {i}"
        got, max_len = check_cache(where, keys[i], values[i], b, head_dim, head_dim, x.dtype)
        check_position(where, max_len, t, position)
        check(
            got == kv_heads,
            f"{where}: keys must have {kv_heads} heads, as the first layer's, got {got}",
        )
        tensors = weights[i * _TENSORS : (i + 1) * _TENSORS]
        ints = linears[i * _INTS : (i + 1) * _INTS]
        for name, norm in zip(("attn_norm", "mlp_norm"), tensors, strict=False):
            check_operand(where, name, norm, x.dtype, [d])
        for j, (name, shape) in enumerate(zip(_LINEARS, shapes, strict=True)):
            _check_linear(
                f"{where}: {name}",
                tensors[2 + 4 * j : 6 + 4 * j],
                ints[5 * j : 5 * j + 5],
                shape,
                x.dtype,
            )
    return x.new_empty((b, t, d))


def _check_linear(
    op: str, tensors: list[Tensor], ints: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    packed, scales, zeros, bias = tensors
    layout, got_n, got_k, group_size, compute = ints
    n, k = shape
    check(
        (got_n, got_k) == (n, k),
        f"{op}: weight must have n = {n} and k = {k}, got {got_n} and {got_k}",
    )
    check_lowbit(op, packed, scales, _or_none(op, "zeros", zeros), layout, n, k, group_size)
    check_compute_id(op, compute)
    if _or_none(op, "bias", bias) is not None:
        check_operand(op, "bias", bias, dtype, [n])
