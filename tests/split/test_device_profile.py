"""Profiles of devices: read from files, and measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycloud.errors import RecipeError
from raycloud.split.device_measure import measured_profile, memory_bytes
from raycloud.split.device_profile import DeviceProfile, SplitProfile, read_profile

GIVEN = """
edge: {memory_gb: 4, memory_gb_s: 12.5, gflop_s: 80}
network: {mbit_s: 20}
"""


def test_a_file_gives_what_it_names_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(GIVEN)
    found = read_profile(path)
    assert found.edge == DeviceProfile(memory_gb=4, memory_gb_s=12.5, gflop_s=80)
    assert (found.network.mbit_s, found.network.rtt_ms) == (20, SplitProfile().network.rtt_ms)
    assert found.cloud == SplitProfile().cloud
    assert read_profile(None) == SplitProfile()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("edge: {memory_gb_s: 1, gflop_s: 1, ram: 4}", "unknown key 'edge.ram'"),
        ("edge: {memory_gb_s: 1}", "missing key 'edge.gflop_s'"),
        ("edge: {memory_gb_s: 0, gflop_s: 1}", "edge.memory_gb_s"),
        ("edge: {memory_gb_s: 1, gflop_s: .inf}", "edge.gflop_s"),
        ("cloud: {memory_gb_s: 1, gflop_s: 1, dtype: int3}", "cloud.dtype"),
        ("phone: {}", "unknown key 'phone'"),
        ("[1]", "must be a mapping"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=why) as refused:
        read_profile(path)
    assert "\n" not in str(refused.value)


def test_a_measured_profile_is_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is proves nothing here; the limit of the profile stays if it is asked for."""
    monkeypatch.setattr("raycloud.split.device_measure._TOKENS", 2)
    monkeypatch.setattr("raycloud.split.device_measure._PROMPTS", 1)
    state = torch.get_rng_state()
    found = measured_profile(SplitProfile(), keep_limit=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert SplitProfile.parse(found.model_dump()) == found
    assert found.edge.memory_gb == SplitProfile().edge.memory_gb and found.edge.dtype in ("float32", "bfloat16")
    assert found.cloud == SplitProfile().cloud


def test_memory_is_what_a_container_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("raycloud.split.device_measure._CGROUP_LIMIT", limit)
    whole = memory_bytes(torch.device("cpu"))
    limit.write_text("max\n")
    assert memory_bytes(torch.device("cpu")) == whole
    limit.write_text("1000000\n")
    assert memory_bytes(torch.device("cpu")) == 1_000_000
