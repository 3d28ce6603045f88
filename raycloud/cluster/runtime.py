"""Joining a Ray cluster, or starting one on this machine, and checking that it can hold a job."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import torch

from raycloud.cluster.bundles import Bundle
from raycloud.cluster.capacity import capacity, shortfall
from raycloud.errors import ClusterError

_FORWARDED = ("RAYCLOUD_CACHE", "RAYCLOUD_DATA")


@contextmanager
def joined(needs: Mapping[str, float], shares: Mapping[str, float], actors: Sequence[Bundle] = ()) -> Iterator[None]:
    """A connection to Ray for the length of a job.

    An initialised session is used as it is. Otherwise the cluster at ``RAY_ADDRESS`` or the one that ``ray start`` runs
    on this machine is joined; where there is none, one is started here that provides what the job needs.

    Args:
        needs: custom resources the job takes in all, such as ``{"cloud": 1, "edge": 2}``.
        shares: ``CPU`` and ``GPU`` it takes in all.
        actors: what each of its actors takes, where that is known.

    Raises:
        ClusterError: the cluster cannot be reached, has less than that, or no node that fits one of the actors.
    """
    if ray.is_initialized():
        check_capacity({**needs, **shares}, actors)
        yield
        return
    # What the job was submitted with already reaches the workers; Ray refuses to be told twice.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    known = submitted.get("env_vars", {})
    forwarded = {name: os.environ[name] for name in _FORWARDED if name in os.environ and name not in known}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if forwarded:
        options["runtime_env"] = {"env_vars": forwarded}
    if not (running_address() and _join(options)):
        ray.init(address="local", resources=dict(needs), include_dashboard=False, **options)
        _hide_token()
    try:
        check_capacity({**needs, **shares}, actors)
        yield
    finally:
        ray.shutdown()


def running_address() -> str | None:
    """What ``RAY_ADDRESS`` names, or where ``ray start`` noted that it runs a cluster on this machine; None for none.

    Ray's own "auto" would go on to join whatever Ray it finds running, such as the private one of another job.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    noted = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    return noted.read_text().strip() or None if noted.is_file() else None


def _join(options: Mapping[str, Any]) -> bool:
    """Connect; False where ``ray start`` left an address behind that nobody answers at."""
    try:
        ray.init(address="auto", **options)
    except (ConnectionError, ValueError) as error:
        address, first = os.environ.get("RAY_ADDRESS"), str(error).splitlines()[0]
        if address:
            raise ClusterError(f"cannot reach the Ray cluster at RAY_ADDRESS={address}: {first}") from None
        return False
    return True


def _hide_token() -> None:
    """Ray leaves the token it makes for a local session readable by everyone on the machine."""
    with suppress(OSError):
        (Path.home() / ".ray" / "auth_token").chmod(0o600)


def check_capacity(needs: Mapping[str, float], actors: Sequence[Bundle] = ()) -> None:
    """Ray would wait for ever, and silently, for resources that no node has.

    Args:
        needs: what the job takes in all.
        actors: what each of its actors takes, which has to be on one node.

    Raises:
        ClusterError: naming the resource, what is there and how to provide it.
    """
    found = shortfall(needs, actors, capacity())
    if found is not None:
        raise ClusterError(f"{found.what}; {found.mend}")


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has under ``taskset`` and in some containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(threads: int, tier: str, actors: int) -> int:
    """CPU threads of one of ``actors`` with the resource ``tier``; ``threads`` if that is set.

    They share the cores of this node as far as they fit on it; a node without the resource has its cores to itself.
    """
    if threads:
        return threads
    here = ray.get_runtime_context().get_node_id()
    fitting = next(int(node["Resources"].get(tier, 0)) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, cores() // max(1, min(actors, fitting)))


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Ray sets one OpenMP thread where it is told nothing; compute with this many, and put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stoppable() -> Iterator[None]:
    """Let ``ray job stop``, which sends SIGTERM, end a job in the same orderly way as Ctrl-C.

    To be entered after :func:`joined`: connecting, Ray puts its own handlers in, which end the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
