"""Findings of the doctor: every check, with a healthy snapshot and a faulty one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from raycloud.cluster import diagnostic_snapshot as snapshot
from raycloud.cluster.capacity import Capacity, total_resources
from raycloud.cluster.diagnostic_snapshot import DiagnosticSnapshot, JobServer, Node, Versions
from raycloud.cluster.doctor import Finding, diagnose, run_checks
from raycloud.distill.recipe import DistillRecipe, bundles
from raycloud.recipe import Bundle
from tests.cluster.recipes import small

HERE: Versions = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0", "raycloud": "0.1.0"}
CLOUD = Node("head", {"CPU": 4.0, "cloud": 1.0}, {"tier": "cloud"}, HERE)
EDGE = Node("store", {"CPU": 1.0, "edge": 1.0}, {"tier": "edge"}, HERE)
OUTPUT = Path("/mnt/shared/results")
JOB: list[Bundle] = [{"CPU": 0.5, "cloud": 1.0}, {"CPU": 0.5, "edge": 1.0}]


def of(*nodes: Node, **changes: Any) -> DiagnosticSnapshot:
    resources = tuple(node.resources for node in nodes)
    values: dict[str, Any] = {
        "address": "192.0.2.1:6379",
        "here": HERE,
        "nodes": nodes,
        "capacity": Capacity(resources, total_resources(resources)),
        "free": total_resources(resources),
        "job_server": JobServer("http://192.0.2.1:8265", True, True),
        "folders": {"output": OUTPUT},
    }
    return DiagnosticSnapshot(**{**values, **changes})


def checked(recipe: DistillRecipe) -> list[Finding]:
    return run_checks(None, recipe.output, bundles(recipe))


def ill(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(one.check, one.level, one.what) for one in findings if one.level != "fine"]


def test_a_healthy_cluster_has_nothing_to_mend() -> None:
    found = diagnose(of(CLOUD, EDGE), JOB)
    assert ill(found) == []
    assert [one.check for one in found] == [
        "address", "versions", "token", "job server", "tiers", "tiers", "storage", "capacity"
    ]  # fmt: skip


def differing(**versions: str | None) -> Node:
    return replace(EDGE, versions={**HERE, **versions})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (of(CLOUD, differing(ray="2.59.0")), ("versions", "error", "ray is 2.59.0 on node store, 2.60.0 here")),
        (of(CLOUD, differing(python="3.12.1")), ("versions", "error", "python is 3.12.1 on node store, 3.11.7 here")),
        (of(CLOUD, differing(raycloud=None)), ("versions", "error", "raycloud is missing on node store, 0.1.0 here")),
        (of(CLOUD, differing(torch="2.12.0")), ("versions", "warning", "torch is 2.12.0 on node store, 2.13.0 here")),
        (of(CLOUD, replace(EDGE, versions=None)), ("versions", "error", "node store does not answer")),
        (
            of(CLOUD, EDGE, job_server=JobServer("http://h:1", True, False)),
            ("token", "warning", "the cluster asks for no token: whoever reaches http://h:1 can run programs on it"),
        ),
        (
            of(CLOUD, EDGE, open_token=Path("/t")),
            ("token", "warning", "everyone on this machine can read /t"),
        ),
        (
            of(CLOUD, EDGE, job_server=JobServer("http://h:1", False, None)),
            ("job server", "warning", "http://h:1 cannot be reached from here: ray job submit will not work"),
        ),
        (of(CLOUD, EDGE, job_server=None), ("job server", "warning", "none: ray job submit will not work")),
        (
            of(CLOUD, replace(EDGE, labels={})),
            ("tiers", "warning", "node store offers 'edge', its label tier is missing"),
        ),
        (
            of(CLOUD, replace(EDGE, labels={"tier": "cloud"})),
            ("tiers", "warning", "node store offers 'edge', its label tier is cloud"),
        ),
        (
            of(CLOUD, replace(EDGE, unseen=("output",))),
            ("storage", "error", f"output {OUTPUT} is not the same folder on store"),
        ),
        (of(CLOUD, EDGE, unwritable=("output",)), ("storage", "error", f"output {OUTPUT} may not be written")),
        (
            of(CLOUD, replace(EDGE, unseen=("cache",)), folders={"cache": OUTPUT}),
            ("storage", "warning", f"cache {OUTPUT} is not the same folder on store"),
        ),
        (
            of(CLOUD, replace(EDGE, resources={"CPU": 0.25, "edge": 1.0})),
            ("capacity", "error", "no node has 0.5 CPU and 1 edge together, which one actor of this job needs"),
        ),
        (of(CLOUD, EDGE, free={"CPU": 5.0, "cloud": 1.0}), ("capacity", "warning", "in use right now: 0 edge free")),
    ],
)
def test_what_is_wrong_is_said_once_with_its_mend(seen: DiagnosticSnapshot, expected: tuple[str, str, str]) -> None:
    found = diagnose(seen, JOB)
    assert ill(found) == [expected]
    assert all(one.fix and "\n" not in one.what + one.fix for one in found if one.level != "fine")


def test_a_cluster_without_edges_cannot_hold_the_job() -> None:
    found = diagnose(of(CLOUD), JOB)
    assert ("capacity", "error", "the cluster has 0 of the resource 'edge', this job needs 1") in ill(found)
    assert ("tiers", "warning", "no node offers the resource 'edge'") in ill(found)
    assert not [one for one in diagnose(of(CLOUD), []) if one.level == "error"]


def test_actors_that_do_not_fit_beside_each_other() -> None:
    wide = replace(EDGE, resources={"CPU": 1.0, "edge": 2.0})
    (found,) = ill(diagnose(of(CLOUD, wide), [{"CPU": 1.0, "edge": 1.0}] * 2))
    assert found == ("capacity", "error", "1 of the job's 2 actors find no place beside the others")


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("http://127.0.0.1:8265", "is the address of a job server or a client"),
        ("cluster", "'cluster' must be HOST:PORT"),
        ("127.0.0.1:1", "no cluster answers at 127.0.0.1:1"),
    ],
)
def test_an_address_without_a_cluster_is_one_finding(address: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot.ray, "is_initialized", lambda: False)
    (found,) = run_checks(address)
    assert found.level == "error" and what in found.what and found.fix


def test_without_a_cluster_the_machine_itself_is_checked(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ill(checked(small(tiny_llama, tmp_path / "run"))) == []
    greedy = small(tiny_llama, tmp_path / "run", student={"placement": {"num_cpus": 10_000}})
    assert "this job needs 20000.1" in ill(checked(greedy))[0][2]
    assert not list(tmp_path.glob(".raycloud-probe-*"))


def test_a_node_tells_its_versions_and_which_files_it_sees(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    _, versions, seen = snapshot._probe_task()({"a": str(tmp_path / "there"), "b": str(tmp_path / "not")})
    assert seen == {"a": True, "b": False}
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(versions.values())


@pytest.fixture
def dashboard() -> Iterator[tuple[HTTPServer, list[int]]]:
    """HTTP server that answers every request with the next status in the list."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, status
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "guarded"), [(200, False), (401, True), (403, True), (500, False)])
def test_whether_the_job_server_asks_for_a_token(
    status: int, guarded: bool, dashboard: tuple[HTTPServer, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, answer = dashboard
    answer[0] = status
    monkeypatch.setattr(snapshot, "get_dashboard_url", lambda: f"127.0.0.1:{server.server_port}")
    assert snapshot._job_server() == JobServer(f"http://127.0.0.1:{server.server_port}", True, guarded)


@pytest.mark.usefixtures("local_ray")
def test_the_ray_of_this_process_is_checked(tiny_llama: Path, tmp_path: Path) -> None:
    found = checked(small(tiny_llama, tmp_path / "run"))
    assert ill(found) == [("job server", "warning", "none: ray job submit will not work")]
    assert {one.check for one in found} >= {"versions", "tiers", "storage", "capacity"}
    many = checked(small(tiny_llama, tmp_path / "run", edges=[{"name": f"e{n}"} for n in range(9)]))
    assert ("capacity", "error", "the cluster has 8 of the resource 'edge', this job needs 9") in ill(many)


SCRIPT = """
import subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "resources": {"cloud": 1}, "labels": {"tier": "cloud"}, "include_dashboard": False,
    "object_store_memory": 100_000_000})
cluster.add_node(num_cpus=1, resources={"edge": 2}, labels={"tier": "cloud"}, object_store_memory=100_000_000)
cluster.wait_for_nodes()
command = [sys.executable, "-m", "raycloud", "doctor", "--address", cluster.address, "--json"]
done = subprocess.run([*command, *sys.argv[1:]])
cluster.shutdown()
sys.exit(done.returncode)
"""


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_the_command_on_a_cluster_of_two_nodes(tiny_llama: Path, tmp_path: Path) -> None:
    """The second node has the wrong label and cannot run three students."""
    path = tmp_path / "recipe.yaml"
    path.write_text(small(tiny_llama, tmp_path / "run", edges=[{"name": f"e{n}"} for n in range(3)]).dump())
    command = [sys.executable, "-c", SCRIPT, "--recipe", str(path)]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": root}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["healthy"] is False
    found = {(one["check"], one["level"]): one["what"] for one in said["findings"]}
    assert found["capacity", "error"] == "the cluster has 2 of the resource 'edge', this job needs 3"
    assert "offers 'edge', its label tier is cloud" in found["tiers", "warning"]
    assert ("versions", "fine") in found
    assert found["storage", "fine"].endswith("run is shared by all nodes")
