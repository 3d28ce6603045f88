"""Atomic writes of files and folders: they are complete or absent, also after a crash or a power failure.

A scratch file or folder is written beside its target, flushed to the disk and renamed to the target; the rename is
flushed too, and only then is the former version removed. A writer holds a lock on its scratch while it runs. So the
next writer can tell the scratch of a killed writer from one in use, and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raycloud.checksums import add_checksum, write_checksums
from raycloud.errors import StorageError

_OLD = "-old"
_SCRATCH = re.compile(rf"\.(?P<name>.+)-[a-z0-9_]{{8}}(?P<old>{_OLD})?")
"""Names that the ``tempfile`` module makes from the prefixes used here."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""Error number of the operating system in messages of libraries written in Rust, such as safetensors."""
_UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS}


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some mounted buckets do not flush folders
            raise
    finally:
        os.close(handle)


def no_follow(path: str, flags: int) -> int:
    """Opener for :func:`open` that refuses a symbolic link (OSError ELOOP) instead of writing to its target."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, content: str | bytes, *, checksum: bool = False) -> None:
    """Replace a file atomically: readers see the old or the new content, also after a crash.

    A symbolic link at ``path`` is replaced, not followed.

    Args:
        path: path of the file.
        content: content of the file; text is encoded as UTF-8.
        checksum: record the digest in the ``checksums.json`` beside the file, as loading weights requires.

    Raises:
        StorageError: the file cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_scratch(path.parent, path.name)
        with _scratch(path, folder=False) as scratch:
            scratch.write_bytes(content.encode() if isinstance(content, str) else content)
            scratch.chmod(0o644)
            sync(scratch)
            scratch.replace(path)
            if checksum:
                add_checksum(path)
            sync(path.parent)


def check_file(path: Path) -> None:
    """Check that a file can be written at a path; for jobs that compute for a long time before they write it.

    Raises:
        StorageError: the path is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise StorageError(f"'{path}' is a directory; give a file")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Check that files can be written into a folder, which need not exist yet.

    Raises:
        StorageError: the path or a parent of it is a file, or the folder cannot be written.
    """
    where = path.expanduser().absolute()
    there = next(folder for folder in (where, *where.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise StorageError(f"cannot write into '{path}': '{there}' is not a writable directory")


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder atomically.

    The folder gets a ``checksums.json``, see :mod:`raycloud.checksums`. A symbolic link at ``target`` is replaced, not
    followed.

    Args:
        target: path of the folder.
        fill: called with a scratch folder beside ``target``, which it fills; the scratch is then renamed to ``target``.

    Raises:
        StorageError: the folder cannot be written.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_scratch(target.parent, target.name)
        with _scratch(target, folder=True) as scratch:
            fill(scratch)
            write_checksums(scratch)
            # Everybody who can read the folder can read all of it: some libraries make files that only the owner reads.
            scratch.chmod(0o755)
            for path in (*scratch.rglob("*"), scratch):
                path.chmod(0o755 if path.is_dir() else 0o644)
                sync(path)
            # The old folder stays complete until the new one is in its place.
            aside = scratch.with_name(scratch.name + _OLD)
            if os.path.lexists(target):
                target.rename(aside)
            scratch.rename(target)
            sync(target.parent)
            remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder if it exists; the target of a link is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_scratch(folder: Path, name: str | None = None) -> None:
    """Remove the scratch files and folders of killed writers; an old folder without its replacement is put back.

    Args:
        folder: folder in which they wrote.
        name: name of the file or folder that they were writing; None for any.
    """
    for path in sorted(folder.glob(".*" if name is None else f".{name}-*")):
        found = _SCRATCH.fullmatch(path.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        with _held(path) as dead:
            if not dead:
                continue
            if found["old"] and not os.path.lexists(target := folder / found["name"]):
                path.rename(target)
                sync(folder)
            else:
                remove(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write inside, such as on a full disk, into an error that names the path known to the user.

    Raises:
        StorageError: in place of an error of the operating system, or of a library error that contains its number.
    """
    try:
        yield
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number not in _UNWRITABLE or number is None:
            raise
        raise StorageError(f"cannot write '{path}': {os.strerror(number)}") from error


@contextmanager
def _scratch(target: Path, *, folder: bool) -> Iterator[Path]:
    """Make a locked scratch file or folder beside ``target``; remove it if the block raises."""
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            handle = os.open(path, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
            path = Path(name)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if path.exists():  # another process may have removed it before it was locked
            break
        os.close(handle)
    try:
        yield path
    except BaseException:
        remove(path)
        raise
    finally:
        os.close(handle)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Lock a scratch file or folder for the block; yield False if a running writer holds it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # removed meanwhile, or not a scratch of this module
        yield False
        return
    try:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
            return
        yield False
    finally:
        os.close(handle)
