"""Checksums of folders: the SHA-256 of every file, stored beside the files and compared when they are read.

``checksums.json`` is a JSON object with the digest of each file by its path in the folder. A folder without one, such
as a model from a hub, is not checked. Files that it does not name, such as a note that a user adds, are not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from raycloud.errors import ChecksumError

CHECKSUMS = "checksums.json"

_SETTLED = 1_000_000_000
"""Age of a file in nanoseconds from which any further change is sure to get a different modification time."""

_known: dict[tuple[int, int, int, int], str] = {}
"""Digests in this process by device, inode, size and modification time, so that a file is read once per process."""


def digest(path: str | Path) -> str:
    """Compute the SHA-256 of a file in hexadecimal.

    Digests are cached in this process. A file that was modified less than a second ago is read again, because a further
    change may have the same modification time.

    Args:
        path: existing file.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if (known := _known.get(key)) is not None:
            return known
        settled = time.time_ns() - about.st_mtime_ns > _SETTLED
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _known[key] = found
    return found


def write_checksums(folder: str | Path) -> None:
    """Write ``checksums.json`` with the digest of every file in a folder and in the folders below it.

    Names that begin with a dot, such as locks and scratch files, are skipped. An older ``checksums.json`` is replaced.

    Args:
        folder: existing folder whose files are complete.

    Raises:
        OSError: a file cannot be read, or ``checksums.json`` cannot be written.
    """
    folder = Path(folder)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [name for name in names if name != Path(CHECKSUMS) and not any(part[0] == "." for part in name.parts)]
    _write(folder, {name.as_posix(): digest(folder / name) for name in files})


def add_checksum(path: str | Path) -> None:
    """Record the digest of one file in the ``checksums.json`` beside it; entries of other files are kept.

    Args:
        path: complete file.

    Raises:
        OSError: the file cannot be read, or ``checksums.json`` cannot be written.
        ChecksumError: ``checksums.json`` is damaged.
    """
    path = Path(path)
    _write(path.parent, {**_stored(path.parent), path.name: digest(path)})


def verify(folder: str | Path) -> None:
    """Compare the files of a folder with its ``checksums.json``; a folder without one passes.

    Args:
        folder: folder with the files.

    Raises:
        ChecksumError: a file is missing or has another content, or ``checksums.json`` is damaged.
    """
    folder = Path(folder)
    for name, expected in _stored(folder).items():
        _compare(folder, name, expected)


def verify_file(path: str | Path) -> None:
    """Compare one file with the ``checksums.json`` beside it; a file that is not listed there passes.

    Args:
        path: file to check.

    Raises:
        ChecksumError: the file is missing or has another content, or ``checksums.json`` is damaged.
    """
    path = Path(path)
    if (expected := _stored(path.parent).get(path.name)) is not None:
        _compare(path.parent, path.name, expected)


def _write(folder: Path, digests: dict[str, str]) -> None:
    scratch = folder / f".{CHECKSUMS}"
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(digests, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(folder / CHECKSUMS)


def _compare(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if not path.is_file():
        raise ChecksumError(f"'{path}' is missing, but {CHECKSUMS} beside it lists it")
    found = digest(path)
    if found != expected:
        raise ChecksumError(
            f"'{path}' is damaged or was changed: its SHA-256 is {found[:16]}…, not {expected[:16]}… "
            f"(if you changed it, remove '{folder / CHECKSUMS}')"
        )


def _stored(folder: Path) -> dict[str, str]:
    """Read the digests by file name from ``checksums.json``; empty if there is no such file."""
    where = folder / CHECKSUMS
    try:
        stored = json.loads(where.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise ChecksumError(f"cannot read '{where}': {str(error).splitlines()[0]}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
        raise ChecksumError(f"'{where}' is damaged: it is not a JSON object of digests by file name")
    for name in stored:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ChecksumError(f"'{where}' is damaged: '{name}' is outside of the folder")
    return stored
