"""Files and folders after crashes, on full disks, and in place of links."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raycloud.checksums import CHECKSUMS, verify
from raycloud.durable import remove_scratch, write_atomically, write_folder
from raycloud.errors import StorageError


def filled(text: str) -> Callable[[Path], None]:
    def fill(to: Path) -> None:
        (to / "deep").mkdir(exist_ok=True)
        (to / "deep" / "weights").write_text(text)

    return fill


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record flushes, renames and removals in order."""
    told: list[str] = []
    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

    def plain(path: str | os.PathLike[str]) -> str:
        name = Path(path).name
        return "old" if name.endswith("-old") else "scratch" if name.startswith(".") else name

    def flushed(handle: int) -> None:
        told.append(f"flush {plain(Path(f'/proc/self/fd/{handle}').readlink())}")
        fsync(handle)

    def renamed(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: str, target: str) -> None:
            told.append(f"{plain(source)} to {plain(target)}")
            real(source, target)

        return rename

    def removed(path: Path, ignore_errors: bool = False) -> None:
        told.append(f"remove {plain(path)}")
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(shutil, "rmtree", removed)
    return told


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, order: list[str]) -> None:
    write_atomically(tmp_path / "facts.json", "{}")
    assert order == ["flush scratch", "scratch to facts.json", f"flush {tmp_path.name}"]


def test_a_folder_is_on_the_disk_before_the_former_one_is_removed(tmp_path: Path, order: list[str]) -> None:
    write_folder(tmp_path / "model", filled("old"))
    order.clear()
    write_folder(tmp_path / "model", filled("new"))
    moved = order.index("model to old")
    assert {"flush weights", "flush deep", f"flush {CHECKSUMS}", "flush scratch"} <= set(order[:moved])
    assert order[moved:] == ["model to old", "scratch to model", f"flush {tmp_path.name}", "remove old"]
    assert names(tmp_path) == ["model"]
    verify(tmp_path / "model")


_KILLED = """
import os, signal, sys
from pathlib import Path
from raycloud.durable import write_atomically, write_folder

at, target = sys.argv[1], Path(sys.argv[2])
real = Path.rename

def fill(to):
    (to / "deep").mkdir()
    (to / "deep" / "weights").write_text("new")
    if at == "fill":
        os.kill(os.getpid(), signal.SIGKILL)

def rename(self, to):
    if at == "window" and self.name[0] == ".":
        os.kill(os.getpid(), signal.SIGKILL)
    if at == "old" and self.name[0] == ".":
        real(self, to)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, to)

Path.rename = rename
if at == "file":
    Path.replace = lambda self, to: os.kill(os.getpid(), signal.SIGKILL)
    write_atomically(target, "new")
write_folder(target, fill)
"""


@pytest.mark.parametrize(("at", "left"), [("fill", "old"), ("window", "old"), ("old", "new")])
def test_a_writer_killed_at_any_point_leaves_a_whole_folder(tmp_path: Path, at: str, left: str) -> None:
    target = tmp_path / "model"
    write_folder(target, filled("old"))
    killed = subprocess.run([sys.executable, "-c", _KILLED, at, str(target)])
    assert killed.returncode == -signal.SIGKILL and len(names(tmp_path)) > 1
    remove_scratch(tmp_path)
    assert names(tmp_path) == ["model"]
    assert (target / "deep" / "weights").read_text() == left
    verify(target)


def test_a_killed_writers_scratch_goes_with_the_next_write(tmp_path: Path) -> None:
    write_atomically(tmp_path / "facts.json", "old")
    killed = subprocess.run([sys.executable, "-c", _KILLED, "file", str(tmp_path / "facts.json")])
    assert killed.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    assert (tmp_path / "facts.json").read_text() == "old"
    write_atomically(tmp_path / "facts.json", "newer")
    assert names(tmp_path) == ["facts.json"]
    assert (tmp_path / "facts.json").read_text() == "newer"


def test_the_scratch_of_a_living_writer_and_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".model-notes").touch()

    def fill(to: Path) -> None:
        remove_scratch(tmp_path)
        assert to.is_dir()
        filled("new")(to)

    write_folder(tmp_path / "model", fill)
    assert names(tmp_path) == [".lock", ".model-notes", "model"]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "model").symlink_to(home)
    (tmp_path / "facts.json").symlink_to(home / "thesis.tex")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("model", "dangling"):
        write_folder(tmp_path / name, filled("new"))
        assert not (tmp_path / name).is_symlink()
    write_atomically(tmp_path / "facts.json", "{}")
    assert names(home) == ["thesis.tex"] and (home / "thesis.tex").read_text() == "years of work"
    assert names(tmp_path) == ["dangling", "facts.json", "home", "model"]


_FULL = """
import resource, signal, sys
import torch
from pathlib import Path
from safetensors.torch import save_file
from raycloud.durable import write_atomically, write_folder
from raycloud.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])

def tensors(to):
    save_file({"weights": torch.zeros(1000)}, to / "model.safetensors")

for write in (
    lambda: write_atomically(folder / "facts.json", "x" * 2000),
    lambda: write_folder(folder / "plain", lambda to: (to / "a").write_text("x" * 2000) and None),
    lambda: write_folder(folder / "model", tensors),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    wanted = [f"cannot write '{tmp_path / name}': File too large" for name in ("facts.json", "plain", "model")]
    assert done.stdout.splitlines() == wanted
    assert names(tmp_path) == []


def test_other_errors_are_told_as_they_are(tmp_path: Path) -> None:
    def fill(to: Path) -> None:
        raise FileNotFoundError("no such source")

    with pytest.raises(FileNotFoundError, match="no such source"):
        write_folder(tmp_path / "model", fill)
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(StorageError, match=r"closed/facts\.json': Permission denied"):
        write_atomically(tmp_path / "closed" / "facts.json", "{}")
