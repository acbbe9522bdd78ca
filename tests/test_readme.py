"""The examples of the README run, in order, on a tiny model; its files and commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from models.checkpoints import add_tokenizer, random_model, write_gguf

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "csrc/README.md", "third_party/README.md")


@pytest.mark.slow
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(random_model(), tmp_path / "model.gguf", metadata=add_tokenizer)
    (tmp_path / "sample.txt").write_text("the things that the others thought about. " * 1300)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 12
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model-4bit" / "config.json").exists()
    model = names["model"]
    zeros = (model.layers[0].attn.o.weight == 0).float().mean()
    assert 0.4 < zeros < 0.6


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{document} links to {target}"
