"""Session of a device in a job: the cloud's grant, the folder of the run, and the bytes that cross the link."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from raycloud.distill.learner import Heartbeat
from raycloud.durable import write_atomically
from raycloud.edge.learn_terms import Allowance
from raycloud.errors import LinkError, LinkSetupError, RecipeError
from raycloud.link.channel import Channel
from raycloud.link.meter import Meter
from raycloud.models.configuration import CONFIG
from raycloud.rounds.service import RoundClient
from raycloud.rounds.service.messages import Blob, RoundGrant

_LOG = logging.getLogger(__name__)
_RUN = re.compile(r"\w{1,64}")
_PULSE_S = 0.5

Connect = Callable[[str, str], Channel]
"""Function that opens a channel of a service (``rounds``, ``signals`` or ``split-tune``) for a session."""


@dataclass(frozen=True)
class LearnOptions:
    """Options of a device."""

    data: str
    """Source of the device's texts."""
    folder: Path
    """Folder for the state; the same command goes on from it."""
    device: str | None = None
    """Name of the device's edge in the job's recipe; None for the only one."""
    allowed: Allowance = field(default_factory=Allowance)
    threads: int = 0
    """CPU threads; 0 for all cores."""
    patience_s: float = 300.0
    """Longest time in seconds without an answer of the cloud."""


class JobSession:
    """Session of a device in a job, whatever the job is.

    Args:
        job: name of the job.
        client: client of the job's rounds.
        connect: opens channels to the cloud, which ``meter`` counts.
        meter: meter of all channels.
        options: options of the device.
        notify: called with one line about what happens.
        on_progress: called with a name, the number of steps done and in all, and a note.

    Raises:
        LinkSetupError: the cloud does not name the run.
    """

    def __init__(
        self,
        job: str,
        client: RoundClient,
        connect: Connect,
        meter: Meter,
        options: LearnOptions,
        notify: Callable[[str], None],
        on_progress: Callable[[str, int, int, str], None],
    ) -> None:
        self.job, self.client, self.options = job, client, options
        self.notify, self.on_progress = notify, on_progress
        self._connect, self._meter = connect, meter
        self._counted_from = self._once_bytes = 0
        run = self.granted.facts.get("run", "")
        if not _RUN.fullmatch(run):
            raise LinkSetupError(f"the cloud does not name the run of job '{job}'")
        self.run, self.folder = run, options.folder / run

    @property
    def granted(self) -> RoundGrant:
        """Grant of the cloud, with the demands of the job."""
        return self.client.granted

    def channels(self, service: str) -> Callable[[str], Channel]:
        """Function that opens a channel of a service for a session."""
        return partial(self._connect, service)

    def blob(self, blob: Blob, name: str) -> bytes:
        """Return bytes that are kept in the folder, or pull them.

        Raises:
            LinkError: the cloud does not have them.
        """
        path = self.folder / name
        if path.is_file() and path.stat().st_size == blob.nbytes:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == blob.digest:
                return content
        pulled = self.client.pull(blob)
        if pulled is None:
            raise LinkError(f"the cloud does not have '{name}' any longer")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, pulled)
        return pulled

    def files(self, kind: str, allowed: re.Pattern[str]) -> Path | None:
        """Download the files of one kind into a folder of its name; None if the job has none.

        Args:
            kind: first part of the files' names.
            allowed: pattern that the rest of each name must match.

        Raises:
            LinkSetupError: a file has another name.
            LinkError: the cloud does not have a file any longer.
        """
        blobs = {name: blob for name, blob in self.granted.blobs.items() if name.startswith(f"{kind}/")}
        if any(allowed.fullmatch(name.removeprefix(f"{kind}/")) is None for name in blobs):
            raise LinkSetupError(f"the cloud names an odd file: {', '.join(blobs)}")
        if not blobs:
            return None
        for name, blob in blobs.items():
            self.blob(blob, name)
        if f"{kind}/{CONFIG}" not in blobs:  # a folder of a model has one
            write_atomically(self.folder / kind / CONFIG, self.granted.config)
        return self.folder / kind

    def count_bytes(self, once: int = 0) -> None:
        """Begin to count the bytes of a round; ``once`` of them may come in addition."""
        self._counted_from, self._once_bytes = self._meter.total, once

    def check_bytes(self, what: str, next_bytes: int = 0) -> None:
        """Refuse to go on with a round that takes more bytes than are allowed, ``next_bytes`` of them next.

        Raises:
            RecipeError: more has crossed the link than the job said, or is about to.
        """
        allowed, taken = self.options.allowed.max_bytes, self._meter.total - self._counted_from + next_bytes
        if allowed is not None and taken > allowed + self._once_bytes:
            raise RecipeError(
                f"{what} of job '{self.job}' takes {taken / 1e6:,.1f} MB; --max-bytes allows {allowed / 1e6:,.1f} MB"
            )


class Pulse:
    """Heartbeats to the cloud while a round is trained; they tell whether the round is still the current one."""

    def __init__(self, client: RoundClient, number: int, weights: str) -> None:
        self._client, self._number, self._weights = client, number, weights
        self.latest = Heartbeat(number, 0, 0.0, 0.0, os.getpid())
        self.outdated = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_PULSE_S) and not self.outdated.is_set():
            now = self.latest
            try:
                current = self._client.heartbeat(
                    self._number, self._weights, now.step, now.loss, now.tokens_per_second, now.pid
                )
            except LinkSetupError:  # the job is over, or another process took this one's place
                current = False
            except LinkError as error:
                _LOG.warning("no heartbeat: %s", error)
                continue
            if not current:
                self.outdated.set()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_tensors(content: bytes) -> dict[str, Tensor]:
    """Read tensors that the cloud sent.

    Raises:
        LinkError: the bytes are none.
    """
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise LinkError(f"the cloud's tensors cannot be read: {str(error).splitlines()[0]}") from None
