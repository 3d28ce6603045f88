"""A device without Ray takes part in a job of the cluster: it brings its data, and gets all else from the cloud."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from raycloud.data.sources import path_of
from raycloud.durable import check_folder
from raycloud.edge.learn_distill import DistillDevice
from raycloud.edge.learn_retrain import RetrainDevice
from raycloud.edge.learn_session import Connect, JobSession, LearnOptions
from raycloud.edge.learn_split_tune import SplitTuneDevice
from raycloud.errors import LinkSetupError
from raycloud.link.channel import Channel, MeteredChannel
from raycloud.link.meter import Meter
from raycloud.link.retry_notices import with_retry_notices
from raycloud.link.websocket import JOB_HEADER, SESSION_HEADER, WebSocketChannel, check_cloud
from raycloud.rounds.service import RoundClient


@dataclass(frozen=True)
class JobEndpoint:
    """Address of a job on the cloud."""

    url: str
    """Address of the cloud, ``wss://host[:port]/v1/rounds``."""
    job: str
    token: str | None = None
    certificates: str | None = None
    """File of certificates to trust instead of the system's."""

    def __post_init__(self) -> None:
        check_cloud(self.url, self.certificates)

    def connect(self, service: str, session: str) -> Channel:
        """Open a channel of a session."""
        url = self.url if service == "rounds" else f"{self.url.rstrip('/')}/{service}"
        headers = {SESSION_HEADER: session, JOB_HEADER: self.job}
        return WebSocketChannel(url, token=self.token, headers=headers, certificates=self.certificates)


class JobDevice(Protocol):
    """Device in a job of one kind."""

    def run(self) -> None:
        """Do all that the cloud asks for, until the job ends."""
        ...

    def close(self) -> None:
        """End the sessions other than that of the rounds."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return what was done, as plain JSON."""
        ...


DEVICES: dict[str, Callable[[JobSession], JobDevice]] = {
    "distill": DistillDevice,
    "split_tune": SplitTuneDevice,
    "retrain": RetrainDevice,
}
"""Devices by the kind of job."""


def learn(
    job: str,
    connect: Connect,
    options: LearnOptions,
    *,
    notify: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, int, str], None] = lambda what, done, total, note: None,
) -> dict[str, Any]:
    """Take part in a job until its last round; killed at any time, the same call goes on.

    Args:
        job: name of the job.
        connect: opens channels to the cloud.
        options: options of the device.
        notify: called with one line about what happens.
        on_progress: called with a name, the number of steps done and in all, and a note.

    Returns:
        Summary as plain JSON.

    Raises:
        RecipeError: the job asks for more than is allowed; nothing has been downloaded.
        LinkError: the cloud cannot be reached in time, or refuses.
        DataError: the data cannot be read.
    """
    path_of(options.data)
    check_folder(options.folder)
    begun, meter = time.monotonic(), Meter()

    def metered(service: str, session: str) -> Channel:
        return MeteredChannel(connect(service, session), meter)

    opening = with_retry_notices(partial(metered, "rounds"), notify)
    client = RoundClient(opening, options.device, patience_s=options.patience_s)
    try:
        session = JobSession(job, client, metered, meter, options, notify, on_progress)
        device = DEVICES[_kind(job, session.granted.recipe)](session)
        try:
            device.run()
        finally:
            device.close()
    finally:
        client.close()
    return device.summary() | {
        "bytes_up": meter.payload["up"],
        "bytes_down": meter.payload["down"],
        "seconds": time.monotonic() - begun,
    }


def _kind(job: str, recipe: str) -> str:
    try:
        kind = json.loads(recipe)["job"]
    except (ValueError, KeyError, TypeError):
        kind = None
    if kind not in DEVICES:
        raise LinkSetupError(f"job '{job}' is of a kind that takes no devices; allowed: {', '.join(DEVICES)}")
    return str(kind)
