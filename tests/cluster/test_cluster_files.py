"""Files for Ray's cluster launcher: valid by Ray's schema, with the roles that jobs need."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "cluster.local.yaml")
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """Process a file as ``ray up`` does before it contacts any machine."""
    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", FILES)
def test_rays_own_schema_accepts_the_file(name: str) -> None:
    validated(read(name))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config.update(colour="red"),
        lambda config: config["provider"].pop("type"),
        lambda config: config.update(setup_commands="make install"),
        lambda config: config["auth"].update(ssh_users="ray"),
        lambda config: config.update(max_workers="ten"),
    ],
)
def test_a_spoiled_file_is_refused(name: str, spoil: Callable[[dict[str, Any]], None]) -> None:
    config = read(name)
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, KeyError, TypeError)):
        validated(config)


@pytest.mark.parametrize(
    ("resources", "labels"), [({"edge": 0.5}, {"tier": "edge"}), ({"edge": -1}, {}), ({"edge": 1}, {"tier": 1})]
)
def test_node_types_have_whole_resources_and_words_as_labels(resources: Any, labels: Any) -> None:
    config = read("cluster.yaml")
    config["available_node_types"]["edge"].update(resources=resources, labels=labels)
    with pytest.raises(jsonschema.ValidationError):
        validated(config)


def test_cloud_and_edge_offer_what_jobs_ask_for_within_limits() -> None:
    config = validated(read("cluster.yaml"))
    types = config["available_node_types"]
    for tier in ("cloud", "edge"):
        assert types[tier]["resources"][tier] == 1
        assert types[tier]["labels"]["tier"] == tier
        assert 0 <= types[tier]["min_workers"] < types[tier]["max_workers"]
    assert types["cloud"]["resources"]["GPU"] == 1
    assert sum(types[tier]["max_workers"] for tier in ("cloud", "edge")) <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


def test_nodes_are_installed_from_the_pins() -> None:
    config = validated(read("cluster.yaml"))
    images = [config["docker"]["image"], config["available_node_types"]["cloud"]["docker"]["worker_image"]]
    assert [image.split(":")[1].split("-")[0] for image in images] == [PINS["ray"]] * 2
    cloud = config["available_node_types"]["cloud"]["worker_setup_commands"]
    for commands in (cloud, config["head_setup_commands"]):
        assert any("--constraint constraints.txt --editable '.[cluster]'" in command for command in commands)
    assert "make install" in read("cluster.local.yaml")["setup_commands"][0]


@pytest.mark.parametrize("name", FILES)
def test_the_files_agree_on_token_and_storage(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start and "RAYCLOUD_CACHE=/mnt/shared/" in start


@pytest.mark.parametrize(("role", "tier"), [(None, "edge"), ("cloud\n", "cloud"), ("edge\n", "edge")])
def test_a_worker_on_the_premises_starts_in_the_role_its_machine_names(
    role: str | None, tier: str, tmp_path: Path
) -> None:
    """The start commands run in a shell whose ``ray`` only records its arguments."""
    if role is not None:
        (tmp_path / ".raycloud-role").write_text(role)
    assert started("worker", tmp_path) == {tier: 1, "tier": tier, "mode": "token", "address": "192.0.2.10:6379"}


def test_the_head_on_the_premises_is_a_cloud_node(tmp_path: Path) -> None:
    assert started("head", tmp_path) == {"cloud": 1, "tier": "cloud", "mode": "token", "address": None}


def started(node: str, home: Path) -> dict[str, Any]:
    ray = home / "raycloud" / ".venv" / "bin" / "ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$RAY_AUTH_MODE" "$@" > ~/called\n')
    ray.chmod(0o755)
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "192.0.2.10"}
    for command in read("cluster.local.yaml")[f"{node}_start_ray_commands"]:
        subprocess.run(["bash", "-c", command], env=env, check=True)
    mode, _, *words = (home / "called").read_text().splitlines()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    tier = options["--labels"].removeprefix("tier=")
    return {**json.loads(options["--resources"]), "tier": tier, "mode": mode, "address": options.get("--address")}
