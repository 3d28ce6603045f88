"""Snapshot of a cluster before a job runs on it: nodes, versions, ports, token, shared folders."""

from __future__ import annotations

import logging
import os
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycloud.cluster.capacity import Capacity, capacity
from raycloud.cluster.runtime import running_address
from raycloud.recipe import Bundle

PACKAGES = ("ray", "torch", "transformers", "raycloud")
_CONNECT_S = 5.0
_ANSWER_S = 60.0

Versions = dict[str, str | None]
"""Versions of Python and of the packages, by name; None for a package that is not installed."""


@dataclass(frozen=True)
class Node:
    """Node of the cluster.

    Args:
        name: host name, or the address where the node did not answer.
        resources: total resources of the node.
        labels: labels without Ray's own.
        versions: installed versions; None if the node did not answer.
        unseen: names of the folders in which the node does not see the files that the driver writes.
    """

    name: str
    resources: Bundle
    labels: Mapping[str, str]
    versions: Versions | None
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobServer:
    """Job server, which receives ``ray job submit``.

    Args:
        url: URL of the dashboard that serves it.
        reachable: whether this machine can connect to it.
        guarded: whether it refuses requests without a token; None where it did not answer.
    """

    url: str
    reachable: bool
    guarded: bool | None


@dataclass(frozen=True)
class DiagnosticSnapshot:
    """State of a cluster; without an address, the Ray that a job would start on this machine.

    Args:
        address: address of the cluster; None where there is none.
        here: versions on the driver.
        nodes: live nodes.
        capacity: resources of the cluster, including those that the autoscaler may add.
        free: resources that are not in use now.
        job_server: job server; None where the cluster has none.
        folders: folders that were checked on every node, by name.
        unwritable: names of the folders that the driver may not write to.
        open_token: token file that other users of this machine can read; None if there is none.
    """

    address: str | None
    here: Versions
    nodes: tuple[Node, ...]
    capacity: Capacity
    free: Bundle
    job_server: JobServer | None
    folders: Mapping[str, Path]
    unwritable: tuple[str, ...] = ()
    open_token: Path | None = None


class Unreachable(Exception):
    """Error: no cluster answers at the given address; ``fix`` is the suggested remedy."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def take_snapshot(address: str | None, folders: Mapping[str, Path]) -> DiagnosticSnapshot:
    """Connect to a cluster, inspect it and disconnect.

    Args:
        address: ``host:port``; None for ``RAY_ADDRESS`` or the cluster that ``ray start`` runs on this machine.
        folders: folders, by name, where the driver writes and from which every node should read.

    Raises:
        Unreachable: there is an address, but no cluster answers at it.
    """
    if ray.is_initialized():
        return _inspect_cluster(ray.get_runtime_context().gcs_address, folders)
    address = address or running_address()
    if address is None:
        return _this_machine(folders)
    _check(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except Exception as error:  # Ray raises many types of errors here
        raise _refused(address, error) from None
    try:
        return _inspect_cluster(address, folders)
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Check the address with a single connection, since Ray would retry for a long time.

    Raises:
        Unreachable: the address is malformed, or nothing answers at it.
    """
    if "://" in address:
        raise Unreachable(
            f"'{address}' is the address of a job server or a client, not of a cluster", "give --address HEAD:6379"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise Unreachable(f"'{address}' must be HOST:PORT", "give --address HEAD:6379")
    if not _connects(host, int(port)):
        raise Unreachable(
            f"no cluster answers at {address}",
            "start the head (ray start --head), open its port, or set RAY_ADDRESS to where it is",
        )


def _connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def _refused(address: str, error: Exception) -> Unreachable:
    said = " ".join(str(error).split()) or type(error).__name__
    if "ersion mismatch" in said:
        return Unreachable(said, "install here what runs there: pip install --constraint constraints.txt …")
    first = said.split(". ")[0]
    if not is_token_auth_enabled():  # Ray does not distinguish a missing token from a dead head
        return Unreachable(
            f"{address} answers, but not to one without a token: {first}",
            "copy the head's ~/.ray/auth_token here and export RAY_AUTH_MODE=token",
        )
    return Unreachable(
        f"{address} answers, but cannot be joined from here: {first}",
        "ask on a node of the cluster: ray job submit --working-dir . -- python -m raycloud doctor",
    )


def _this_machine(folders: Mapping[str, Path]) -> DiagnosticSnapshot:
    here = _probe_task()({})
    cores = float(os.cpu_count() or 1)
    # A job that starts its own Ray gives it the custom resources that the job needs.
    offers = {"CPU": cores, "GPU": float(torch.cuda.device_count()), "cloud": float("inf"), "edge": float("inf")}
    with _probes(folders) as (_, unwritable):
        node = Node(here[0], offers, {}, here[1])
        return DiagnosticSnapshot(
            None, here[1], (node,), Capacity((offers,), offers), offers, None, folders, unwritable
        )


def _inspect_cluster(address: str, folders: Mapping[str, Path]) -> DiagnosticSnapshot:
    alive = [node for node in ray.nodes() if node["Alive"]]
    with _probes(folders) as (probes, unwritable):
        answers = _ask([node["NodeID"] for node in alive], probes)
    nodes = []
    for node, answer in zip(alive, answers, strict=True):
        name, versions, seen = answer or (node["NodeManagerAddress"], None, {})
        labels = {key: value for key, value in node["Labels"].items() if not key.startswith("ray.io/")}
        unseen = tuple(sorted(folder for folder, there in seen.items() if not there))
        nodes.append(Node(name, dict(node["Resources"]), labels, versions, unseen))
    return DiagnosticSnapshot(
        address,
        _probe_task()({})[1],
        tuple(nodes),
        capacity(),
        dict(ray.available_resources()),
        _job_server(),
        folders,
        unwritable,
        _open_token(),
    )


@contextmanager
def _probes(folders: Mapping[str, Path]) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """Create a small probe file in each folder, or in its nearest existing parent; delete the files on exit.

    Yields the probe files by folder name, and the names of the folders that cannot be written.
    """
    probes, unwritable = {}, []
    with ExitStack() as stack:
        for name, folder in folders.items():
            there = next(one for one in (folder, *folder.parents) if one.is_dir())
            file = there / f".raycloud-probe-{uuid.uuid4().hex}"
            try:
                file.touch()
            except OSError:
                unwritable.append(name)
                continue
            stack.callback(file.unlink, missing_ok=True)
            probes[name] = str(file)
        yield probes, tuple(unwritable)


NodeReport = tuple[str, Versions, dict[str, bool]]


def _probe_task() -> Callable[[Mapping[str, str]], NodeReport]:
    """Return the function that inspects a node.

    It is a closure, so that Ray pickles it by value: the node may lack this package.
    """
    packages = PACKAGES

    def look(probes: Mapping[str, str]) -> NodeReport:
        import importlib
        import platform
        import socket
        from importlib import metadata
        from pathlib import Path

        versions: dict[str, str | None] = {"python": platform.python_version()}
        for name in packages:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                try:  # in a job's working directory the package can be imported without being installed
                    versions[name] = str(importlib.import_module(name).__version__)
                except ImportError:
                    versions[name] = None
        return socket.gethostname(), versions, {name: Path(file).exists() for name, file in probes.items()}

    return look


def _ask(nodes: Sequence[str], probes: Mapping[str, str]) -> list[NodeReport | None]:
    """Return each node's report; None for a node without an answer within ``_ANSWER_S`` seconds."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_probe_task())
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(dict(probes))
        for node in nodes
    ]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    answers: list[NodeReport | None] = []
    for ref in refs:
        answer = None
        if ref in ready:
            with suppress(RayError):
                answer = ray.get(ref)
        answers.append(answer)
    for ref in late:
        ray.cancel(ref, force=True)
    return answers


def _job_server() -> JobServer | None:
    url = get_dashboard_url()
    if not url:
        return None
    host, _, port = url.rpartition(":")
    if not _connects(host, int(port)):
        return JobServer(f"http://{url}", False, None)
    try:
        # No token, on purpose; no proxy, since the cluster is on the local network.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{url}/api/version", timeout=_CONNECT_S):
            guarded: bool | None = False
    except urllib.error.HTTPError as error:
        guarded = error.code in (401, 403)
    except OSError:
        guarded = None
    return JobServer(f"http://{url}", True, guarded)


def _open_token() -> Path | None:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path if path.is_file() and path.stat().st_mode & 0o044 else None
