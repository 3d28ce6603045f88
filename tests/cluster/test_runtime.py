"""Choice of the Ray cluster that a job joins, and errors for one that cannot be joined or is too small."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raycloud.cluster import runtime
from raycloud.errors import ClusterError


@pytest.fixture
def nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def test_only_named_and_started_clusters_are_joined(nothing_running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job does not join the private Ray of another job on the machine, which Ray's "auto" would find."""
    assert runtime.running_address() is None
    (nothing_running / "ray").mkdir()
    (nothing_running / "ray" / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert runtime.running_address() == "127.0.0.1:6379"
    monkeypatch.setenv("RAY_TMPDIR", str(nothing_running / "elsewhere"))
    assert runtime.running_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    assert runtime.running_address() == "192.0.2.1:6379"


def test_an_unreachable_cluster_is_one_line_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("nobody is there\nand much more")

    monkeypatch.setattr(runtime.ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not runtime._join({})
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(ClusterError, match=r"at RAY_ADDRESS=192\.0\.2\.1:6379: nobody is there$"):
        runtime._join({})


def test_threads_are_a_share_of_the_cores(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cores", lambda: 12)
    assert runtime.threads_per_actor(5, "edge", 2) == 5
    assert runtime.threads_per_actor(0, "edge", 2) == 6
    assert runtime.threads_per_actor(0, "edge", 100) == 1  # eight of them fit here
    assert runtime.threads_per_actor(0, "elsewhere", 4) == 12


def test_no_other_user_can_read_the_token_that_ray_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    runtime.protect_token()  # before Ray starts, which makes the file readable for everyone who reaches it
    assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700
    token = tmp_path / ".ray" / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    runtime.protect_token()
    assert token.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_in_a_hook_of_fork_is_not_lost() -> None:
    """Fork handlers cannot raise: Python only prints their errors, and Ray starts its processes by forking."""
    script = (
        "import os, signal\n"
        "from raycloud.cluster import runtime\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "def start(**_):\n"
        "    child = os.fork()\n"
        "    if child == 0: os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "runtime.ray.init, runtime.running_address = start, lambda: None\n"
        "runtime.ray.shutdown = runtime.protect_token = runtime.check_capacity = lambda *_: None\n"
        "try:\n"
        "    with runtime.ray_connection({}, {}): print('went on')\n"
        "except KeyboardInterrupt: print('stopped')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


@pytest.mark.parametrize("error", [None, ConnectionError("a part of Ray was hit")])
def test_ctrl_c_while_ray_starts_is_raised_after_it(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: None)  # the Ray that other tests share goes on

    def start() -> None:
        with runtime._deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        start()


def test_a_second_ctrl_c_does_not_wait_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.ray, "shutdown", lambda: None)
    done: list[str] = []

    def start() -> None:
        with runtime._deferred_interrupt():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                done.append("went on")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["went on"]
