"""Checksums of folders: which files are listed, compared, and read only once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from raycloud import checksums
from raycloud.checksums import CHECKSUMS, add_checksum, digest, verify, write_checksums
from raycloud.errors import ChecksumError

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""SHA-256 of "abc", FIPS 180-2, appendix B.1."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc")
    (tmp_path / "deep" / "b.json").write_text("{}")
    (tmp_path / ".lock").touch()
    write_checksums(tmp_path)
    return tmp_path


def test_every_file_is_named_but_for_hidden_ones(folder: Path) -> None:
    stored = json.loads((folder / CHECKSUMS).read_text())
    assert stored == {"a.bin": ABC, "deep/b.json": hashlib.sha256(b"{}").hexdigest()}
    verify(folder)
    write_checksums(folder)
    assert json.loads((folder / CHECKSUMS).read_text()) == stored


def test_a_flipped_byte_and_a_missing_file_are_named(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"abd")
    with pytest.raises(ChecksumError, match=r"a\.bin' is damaged or was changed") as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
    (folder / "a.bin").write_bytes(b"abc")
    verify(folder)
    (folder / "deep" / "b.json").unlink()
    with pytest.raises(ChecksumError, match=r"deep/b\.json' is missing"):
        verify(folder)


def test_one_file_is_added_to_those_that_are_named(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"abc")
    add_checksum(folder / "weights.bin")
    (folder / "log.txt").write_text("it changes")
    stored = json.loads((folder / CHECKSUMS).read_text())
    assert stored.keys() == {"a.bin", "deep/b.json", "weights.bin"} and stored["weights.bin"] == ABC
    verify(folder)
    (folder / "weights.bin").write_bytes(b"abd")
    with pytest.raises(ChecksumError, match=r"weights\.bin' is damaged or was changed"):
        verify(folder)


def test_a_folder_without_checksums_and_added_files_pass(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    verify(folder)
    (folder / CHECKSUMS).unlink()
    (folder / "a.bin").write_bytes(b"abd")
    verify(folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "cannot read"),
        (b"\xff", "cannot read"),
        (b"[]", "not a JSON object"),
        (b'{"a.bin": 3}', "not a JSON object"),
        (b'{"../a.bin": "x"}', "outside"),
        (b'{"/etc/passwd": "x"}', "outside"),
    ],
)
def test_a_damaged_list_is_one_line(folder: Path, content: bytes, told: str) -> None:
    (folder / CHECKSUMS).write_bytes(content)
    with pytest.raises(ChecksumError, match=told) as caught:
        verify(folder)
    assert CHECKSUMS in str(caught.value) and "\n" not in str(caught.value)


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = hashlib.file_digest

    def counted(file, name):
        read.append(file.name)
        return real(file, name)

    monkeypatch.setattr(checksums.hashlib, "file_digest", counted)
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    assert [digest(path), digest(path)] == [ABC, ABC]
    assert len(read) == 1
    path.rename(tmp_path / "moved")
    assert digest(tmp_path / "moved") == ABC
    assert len(read) == 1


def test_a_change_within_the_clocks_tick_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    modified = path.stat().st_mtime_ns
    before = digest(path)
    path.write_bytes(b"abd")
    os.utime(path, ns=(modified, modified))
    assert digest(path) != before
