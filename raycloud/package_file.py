"""Download of one file from a package index, by ``python -m raycloud.package_file`` in a separate process.

pip finds the file, so its configuration, credentials, certificates and proxies apply as in ``pip install``. But
``pip download`` reads the metadata of a source archive, which runs the archive's build back end before its hash is
checked. Therefore this module downloads the file itself: it unpacks, builds and runs nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raycloud.errors import FetchError

_CHUNK = 2**16


@dataclass(frozen=True)
class PackageFile:
    """File of a package index.

    Args:
        name: name of the package.
        version: version of the package.
        sdist: True for the source archive, False for a wheel.
        sha256: expected SHA-256 of the file.
        max_bytes: maximum size in bytes; a larger download is aborted.
    """

    name: str
    version: str
    sdist: bool
    sha256: str
    max_bytes: int


def download(file: PackageFile, folder: Path) -> Path:
    """Download a file into a folder from the index that pip is configured to use; return its path.

    Raises:
        FetchError: the file does not exist, cannot be downloaded, is too large, or has another hash.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(file)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        reply = json.loads(done.stdout)
        if done.returncode == 0:
            return folder / str(reply["file"])
        why = str(reply["error"])
    except (ValueError, KeyError, TypeError):
        why = (done.stderr.strip().splitlines() or ["the download process ended without a message"])[-1]
    raise FetchError(f"cannot download {file.name}=={file.version}: {why}")


class _PipMessages(logging.Handler):
    """Handler that keeps the messages in which pip says why it could not read an index; pip only logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Could not fetch"):
            self.lines.append(" ".join(message.removesuffix(" - skipping").split()))


def _download_here(file: PackageFile, folder: Path) -> str:
    """Download the file; return its name.

    Raises:
        ValueError: the file cannot be found, is too large, or has another hash.
    """
    from pip._internal.commands import create_command

    messages = _PipMessages()
    logging.getLogger("pip").addHandler(messages)
    logging.getLogger("pip").setLevel(logging.DEBUG)
    # This command reads the user's pip settings. Only its session and its finder are used; the command is not run.
    command: Any = create_command("download")
    options, _ = command.parse_args([])
    options.cache_dir, options.no_input = None, True
    session = command._build_session(options)
    finder = command._build_package_finder(options, session)
    found = [
        candidate.link
        for candidate in finder.find_all_candidates(file.name)
        if str(candidate.version) == file.version and candidate.link.is_wheel != file.sdist
    ]
    if not found:
        kind = "source archive" if file.sdist else "wheel"
        raise ValueError(messages.lines[-1] if messages.lines else f"the package index has no {kind} of this version")
    link = next((link for link in found if link.hash == file.sha256), found[0])
    digest, size = hashlib.sha256(), 0
    with session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True) as answer:
        answer.raise_for_status()
        with open(folder / link.filename, "xb") as out:
            for chunk in answer.iter_content(_CHUNK):
                size += len(chunk)
                if size > file.max_bytes:
                    raise ValueError(f"{link.filename} is larger than the allowed {file.max_bytes} bytes")
                digest.update(chunk)
                out.write(chunk)
    if digest.hexdigest() != file.sha256:
        raise ValueError(f"{link.filename} has SHA-256 {digest.hexdigest()}, expected {file.sha256}")
    return str(link.filename)


def _main(spec: str, folder: str) -> int:
    try:
        reply = {"file": _download_here(PackageFile(**json.loads(spec)), Path(folder))}
    except ModuleNotFoundError as error:
        reply = {"error": f"this Python has no {error.name}; built-ins are found through pip"}
    except Exception as error:  # pip and its HTTP library raise many kinds of errors
        reply = {"error": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(reply))
    return "error" in reply


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
