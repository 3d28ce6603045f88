"""Connection to a Ray cluster, or to a Ray started on this machine, and the check that it can hold a job."""

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

from raycloud.cluster.capacity import capacity, shortfall
from raycloud.errors import ClusterSetupError
from raycloud.origin import cores
from raycloud.recipe import Bundle

_FORWARDED = ("RAYCLOUD_CACHE", "RAYCLOUD_DATA")


@contextmanager
def ray_connection(
    needs: Mapping[str, float], shares: Mapping[str, float], actors: Sequence[Bundle] = ()
) -> Iterator[None]:
    """Connect to Ray for the duration of a job.

    An initialised session is used as it is. Otherwise the cluster at ``RAY_ADDRESS`` or the one that ``ray start`` runs
    on this machine is used. If there is none, a local Ray starts with the resources that the job needs.

    Args:
        needs: custom resources of the whole job, such as ``{"cloud": 1, "edge": 2}``.
        shares: ``CPU`` and ``GPU`` of the whole job.
        actors: resources of each of its actors, where known.

    Raises:
        ClusterSetupError: the cluster cannot be reached, has too few resources, or has no node that fits an actor.
    """
    if ray.is_initialized():
        check_capacity({**needs, **shares}, actors)
        yield
        return
    # Variables of the submitted job already reach the workers; Ray refuses to set them twice.
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    known = submitted.get("env_vars", {})
    forwarded = {name: os.environ[name] for name in _FORWARDED if name in os.environ and name not in known}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if forwarded:
        options["runtime_env"] = {"env_vars": forwarded}
    with _deferred_interrupt():
        if not (running_address() and _join(options)):
            protect_token()
            ray.init(address="local", resources=dict(needs), include_dashboard=False, **options)
            protect_token()
    try:
        check_capacity({**needs, **shares}, actors)
        yield
    finally:
        ray.shutdown()


def running_address() -> str | None:
    """Return ``RAY_ADDRESS``, or the address that ``ray start`` noted on this machine; None for none.

    Ray's own "auto" would also connect to any other Ray that runs here, such as the private one of another job.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    noted = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    return noted.read_text().strip() or None if noted.is_file() else None


def _join(options: Mapping[str, Any]) -> bool:
    """Connect to the cluster; False if ``ray start`` left an address at which nothing answers.

    Raises:
        ClusterSetupError: the cluster at ``RAY_ADDRESS`` cannot be reached.
    """
    try:
        ray.init(address="auto", **options)
    except (ConnectionError, ValueError) as error:
        address, first = os.environ.get("RAY_ADDRESS"), str(error).splitlines()[0]
        if address:
            raise ClusterSetupError(f"cannot reach the Ray cluster at RAY_ADDRESS={address}: {first}") from None
        return False
    return True


def protect_token() -> None:
    """Protect Ray's token, which Ray makes readable for everyone, from other users of this machine.

    Before Ray starts this restricts the folder, so that the file is never readable by others; afterwards the file too.
    """
    folder = Path.home() / ".ray"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        (folder / "auth_token").chmod(0o600)


def check_capacity(needs: Mapping[str, float], actors: Sequence[Bundle] = ()) -> None:
    """Check that the cluster can hold a job, since Ray would wait forever, without a message, for missing resources.

    Args:
        needs: total resources of the job.
        actors: resources of each of its actors, which must be on one node.

    Raises:
        ClusterSetupError: a resource is missing; the message names it, the amount present and the remedy.
    """
    found = shortfall(needs, actors, capacity())
    if found is not None:
        raise ClusterSetupError(f"{found.what}; {found.fix}")


def threads_per_actor(threads: int, tier: str, actors: int) -> int:
    """Return the CPU threads of one of ``actors`` actors with the resource ``tier``; ``threads`` if that is not 0.

    The actors that fit on this node share its cores; on a node without the resource an actor gets all cores.
    """
    if threads:
        return threads
    here = ray.get_runtime_context().get_node_id()
    fitting = next(int(node["Resources"].get(tier, 0)) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, cores() // max(1, min(actors, fitting)))


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Defer Ctrl-C while Ray starts: the first is raised once Ray has started, a second one at once.

    Starting Ray forks, and Python drops an exception that a signal handler raises in a hook of ``fork``: the command
    would continue as if Ctrl-C had not been pressed.
    """
    raising = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(raising):
        yield
        return
    came: list[int] = []

    def keep(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, raising)
        if came:  # also if it interrupted Ray's start
            ray.shutdown()
            raise KeyboardInterrupt from None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM, which ``ray job stop`` sends, in the same way as Ctrl-C.

    Enter it after :func:`ray_connection`: on connecting, Ray installs its own handlers, which end the process at once.
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
