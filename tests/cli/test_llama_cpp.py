"""llama.cpp as the demo and the benchmarks run it: which build, and that it computes the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.checkpoints import VOCABULARY, add_tokenizer, random_model, write_gguf

from openwork import models
from openwork.cli import llama_cpp
from openwork.throughput import DECODE, PREFILL

needs_package = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """As llama.cpp wants it: an embedding of every token, heads that fill the hidden size."""
    model = random_model(vocab_size=len(VOCABULARY), heads=4)
    return write_gguf(model, tmp_path / "tiny.gguf", metadata=add_tokenizer)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    expected = "package llama-cpp-python or xllamacpp is not installed"
    assert llama_cpp.missing() == llama_cpp.describe() == llama_cpp.build() == expected


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ({"xllamacpp"}, "llama.cpp (AVX2 wheel)"),
        ({"xllamacpp", "llama_cpp"}, "llama.cpp (native)"),
    ],
)
def test_a_build_for_this_machine_is_preferred(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], name: str
) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda module: module in installed or None)
    assert llama_cpp.missing() is None
    assert llama_cpp.build() == name


@needs_package
def test_it_computes_the_model(gguf_file: Path) -> None:
    model = models.load(gguf_file)
    tokens = torch.randint(model.config.vocab_size, (24,))
    session = llama_cpp.Session(gguf_file, threads=1, max_tokens=32)
    try:
        with torch.inference_mode():
            ours = model(tokens[None])[0, -1].log_softmax(-1)
        for run in (session.prefill, session.decode, session.prefill):
            theirs = torch.from_numpy(run(tokens.numpy())).log_softmax(-1)
            # It rounds keys and values to float16: 2^-11 of numbers up to 9, twice a layer.
            torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
    finally:
        session.close()


@needs_package
def test_it_requantizes(gguf_file: Path, tmp_path: Path) -> None:
    if not llama_cpp.can_requantize():
        pytest.skip("the package has no quantizer")
    target = tmp_path / "new.gguf"
    llama_cpp.requantize(gguf_file, target, llama_cpp.FASTEST, threads=1)
    before, after = (models.load(path).layers[0].mlp.down.weight for path in (gguf_file, target))
    # Q4_0: blocks of 32 in steps of an eighth of their largest; the other end is cut at 7 steps.
    error = (after - before).unflatten(1, (-1, 32)).abs().amax(2)
    step = before.unflatten(1, (-1, 32)).abs().amax(2) / 8
    assert bool((error > 0).all())
    assert bool((error <= step * (1 + 8 / 2**11)).all())  # the step is stored in float16
    with pytest.raises(RuntimeError, match=r"llama\.cpp: cannot write none\.gguf as Q4_0"):
        llama_cpp.requantize(tmp_path / "none.gguf", target, "Q4_0", threads=1)


@needs_package
def test_it_shares_the_threads_of_torch(gguf_file: Path, threads: int) -> None:
    """Threads of its own would slow torch's down, see openwork.cli.llama_cpp."""
    engine = llama_cpp.engine(gguf_file)
    tokens = torch.zeros(PREFILL, dtype=torch.int64)
    torch.ones(1 << 20).sum()  # starts torch's
    before = set(Path("/proc/self/task").iterdir())
    engine.prefill(tokens)
    engine.decode(tokens[:DECODE])
    assert set(Path("/proc/self/task").iterdir()) == before


@needs_package
def test_a_file_it_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"llama\.cpp: cannot load broken\.gguf"):
        llama_cpp.Session(tmp_path / "broken.gguf", threads=1, max_tokens=8)
