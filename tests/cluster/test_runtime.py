"""Which Ray a job joins, and what it says of one that cannot be joined or is too small."""

from __future__ import annotations

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
    """Not the private Ray of another job on the same machine, which Ray's "auto" would find."""
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
    assert runtime.share_of_cores(5, "edge", 2) == 5
    assert runtime.share_of_cores(0, "edge", 2) == 6
    assert runtime.share_of_cores(0, "edge", 100) == 1  # eight of them fit here
    assert runtime.share_of_cores(0, "elsewhere", 4) == 12
