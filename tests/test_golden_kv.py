"""The bytes of pages of keys and values, pinned: see golden/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwork import KVFormat, KVPages, ops

FOLDER = Path(__file__).with_name("golden")
D, VALUE_D, PAGE_SIZE, TOKENS = 20, 36, 64, 100  # no multiple of a panel, a page that is not full
NUQ = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
FORMATS = {
    "kv16": (KVFormat(16), KVFormat(16)),
    "kv8": (KVFormat(8, "channel", 32), KVFormat(8, "token", 32)),
    "kv4": (KVFormat(4, "channel", 64), KVFormat(4, "token", 36)),
    "kv3": (KVFormat(3, "channel", 32, codebook=NUQ), KVFormat(3, "token", 32)),
    "kv2": (KVFormat(2, "token", 32), KVFormat(2, "channel", 32, outliers=2)),
}
# The pinned tails have room for 128 tokens; how long they are is no part of the layout.
DRAFTS = {"kv8": 64, "kv3": 64, "kv2": 64}
Arrays = dict[str, NDArray[np.generic]]


def _empty(name: str) -> KVPages:
    keys, values = FORMATS[name]
    return KVPages.allocate(
        1, 1, D, 192, keys=keys, values=values, value_d=VALUE_D, dtype=torch.float16,
        page_size=PAGE_SIZE, bounds=True, drafts=DRAFTS.get(name, 0),
    )  # fmt: skip


def _source(seed: int, d: int) -> Tensor:
    """Small integers, and of each channel a range of its own."""
    rng = np.random.default_rng(seed)
    span = rng.integers(1, 30, d)
    return torch.from_numpy(rng.integers(-span, span + 1, (1, TOKENS, 1, d))).half()


def _arrays(pages: KVPages) -> Arrays:
    """Every tensor of the cache: of the pools, the pages in use."""
    used = int(pages.allocated_pages)
    named = {"block_table": pages.block_table, "key_min": pages.key_min, "key_max": pages.key_max}
    for part, side in (("key", pages.keys), ("value", pages.values)):
        named |= {f"{part}_{name}": tensor for name, tensor in vars(side).items()}
    return {
        f"pages_{name}": (tensor[:used] if tensor.shape[0] == 3 else tensor).numpy()
        for name, tensor in named.items()
        if tensor is not None
    }


@pytest.fixture(params=list(FORMATS))
def golden(request: pytest.FixtureRequest) -> tuple[str, Arrays]:
    """A format's name and its file's arrays."""
    name: str = request.param
    path = FOLDER / f"{name}@1.npz"
    if not path.exists() and request.config.getoption("--write-golden"):
        keys, values = _source(1, D), _source(2, VALUE_D)
        pages = _empty(name)
        ops.kv_append(pages, keys, values)
        np.savez_compressed(path, keys=keys.numpy(), values=values.numpy(), **_arrays(pages))  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as arrays:
        return name, dict(arrays)


def test_appending_gives_the_pinned_bytes(golden: tuple[str, Arrays], isa: str) -> None:
    name, arrays = golden
    pages = _empty(name)
    ops.kv_append(pages, *(torch.from_numpy(arrays[x]) for x in ("keys", "values")))
    got = _arrays(pages)
    assert sorted(got) == sorted(x for x in arrays if x.startswith("pages_"))
    for which, array in got.items():
        assert array.tobytes() == arrays[which].tobytes(), which


def _codes(raw: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """``[n, k]`` codes of one page: the picture of csrc/README.md, one bit field at a time."""
    panels, blocks, _, _, _, _ = raw.shape
    block_k = 32 if bits == 3 else 16
    codes = np.zeros((panels * 32, blocks * block_k), np.int64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            lane = raw[n // 32, k // block_k, n % 32 // 16, :, n % 16, k % 4].astype(np.int64)
            j = k % block_k // 4
            if bits == 8:
                codes[n, k] = lane[j]
            elif bits == 4:
                codes[n, k] = lane[j // 2] >> 4 * (j % 2) & 15
            elif bits == 2:
                codes[n, k] = lane[0] >> 2 * j & 3
            elif j % 3 == 2:
                codes[n, k] = (lane[j // 3] >> 6 & 3) | (lane[2] >> (6 + j // 3) & 1) << 2
            else:
                codes[n, k] = lane[j // 3] >> 3 * (j % 3) & 7
    return codes


def test_reading_the_pinned_bytes_by_the_book(golden: tuple[str, Arrays], isa: str) -> None:
    """``kv_read`` against the layout as it is written down, without any kernel."""
    name, arrays = golden
    if name == "kv16":
        pytest.skip("pages of floats have no codes")
    pages = _empty(name)
    ops.kv_append(pages, *(torch.from_numpy(arrays[x]) for x in ("keys", "values")))
    sides = zip(("key", "value"), FORMATS[name], (D, VALUE_D), ops.kv_read(pages), strict=True)
    for part, fmt, d, got in sides:
        held = int(arrays[f"pages_{part}_committed"].item())
        for page in range(-(-held // PAGE_SIZE)):
            raw = {x: arrays[f"pages_{part}_{x}"][page] for x in ("codes", "scales", "mins")}
            codes = _codes(raw["codes"], fmt.bits)
            codes = (codes if part == "key" else codes.T)[:PAGE_SIZE, :d]
            grids = [raw[x].astype(np.float64) for x in ("scales", "mins")]
            if fmt.axis == "channel":
                scales, mins = (np.repeat(x, fmt.group_size, 0) for x in grids)
            else:
                scales, mins = (np.repeat(x, fmt.group_size, 0)[:d].T for x in grids)
            levels = codes if fmt.codebook is None else np.array(fmt.codebook)[codes]
            want = levels * scales + mins
            if fmt.outliers:
                index = arrays[f"pages_{part}_outlier_index"][page].astype(np.int64)
                np.put_along_axis(want, index, arrays[f"pages_{part}_outlier_values"][page], 1)
            count = min(held - page * PAGE_SIZE, PAGE_SIZE)
            tokens = got[0, 0, page * PAGE_SIZE :][:count].numpy()
            assert np.array_equal(tokens, want[:count].astype(np.float16))
