"""Messages between a device and the server of its rounds.

Weights and files are raw bytes: safetensors, or files as they are. They are named by their SHA-256, so that a device
keeps what it has and checks what it gets.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Annotated, Literal

from pydantic import Field

from raycloud.link.frames import Body, OpenRequest, SessionGrant
from raycloud.rounds.service.limits import REPORT_BYTES

SERVICE = "rounds"

DeviceName = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=128)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RoundNumber = Annotated[int, Field(ge=0, lt=2**31)]


class RoundKind(IntEnum):
    """Kinds of the service's messages."""

    TASK = 16
    TASK_OK = 17
    PULL = 18
    PULL_OK = 19
    PUSH = 20
    PUSH_OK = 21
    HEARTBEAT = 22
    HEARTBEAT_OK = 23


class Blob(Body):
    """Bytes that a device can pull."""

    digest: Digest
    """SHA-256 of the bytes."""
    nbytes: int = Field(ge=0)

    @classmethod
    def of(cls, content: bytes) -> Blob:
        """Describe bytes."""
        return cls(digest=hashlib.sha256(content).hexdigest(), nbytes=len(content))


class OpenRounds(OpenRequest):
    """Request of a device to take part."""

    service: str = SERVICE
    device: DeviceName | None = None
    """Name of the device's edge in the job's recipe; None for the only one."""
    process: str = Field(pattern="^[0-9a-f]{16,64}$")
    """Random id of the device's process: a new process takes the place of the one before, which cannot come back."""


class RoundGrant(SessionGrant):
    """Grant to a device, with the recipe from which it derives what the job demands: the body of OPEN_OK."""

    device: DeviceName
    """Name of the device's edge in the job's recipe."""
    recipe: str
    """Recipe of the job, as JSON."""
    config: str
    """Configuration of the model to train, as JSON."""
    facts: dict[str, str] = {}
    """Further facts by name, such as the name of the teacher."""
    blobs: dict[str, Blob] = {}
    """Files that the device may pull, by name."""
    weights_bytes: int = Field(ge=0)
    """Bytes of the weights that each round sends and gets back."""


class TaskRequest(Body):
    """Request for the device's next task. The answer takes some seconds where there is none."""

    samples: int = Field(ge=1, lt=2**53)
    """Number of the device's training samples: it is ready to train."""


class TaskReply(Body):
    """Task of a device."""

    state: Literal["wait", "train", "finished"]
    """``wait``: ask again. ``train``: train for a round. ``finished``: there are no further rounds."""
    round: RoundNumber = 0
    """Number of the round, counted from 0."""
    weights: Blob | None = None
    """Weights that the round begins with; after the last round, the final ones."""


class PullRequest(Body):
    """Request for bytes."""

    digest: Digest


class PullReply(Body):
    """Answer to a request for bytes, which follow."""

    found: bool
    """False if there are no such bytes here, or not any longer."""


class ContributionRequest(Body):
    """Contribution of a device to a round; the report follows, then the weights as safetensors."""

    round: RoundNumber
    weights: Digest
    """Weights that the round began with."""
    samples: int = Field(ge=0, lt=2**53)
    """Number of samples or tokens that the weights were trained on."""
    report_bytes: int = Field(ge=0, le=REPORT_BYTES)
    """Number of bytes of the report."""
    error: str = Field(default="", max_length=500)
    """Reason why the device has no contribution; the round goes on without it."""


class ContributionReply(Body):
    """Answer to a contribution. One that was accepted is answered alike however often it is sent."""

    accepted: bool
    reason: str = Field(default="", max_length=32)
    """Reason of a refusal, for programs."""
    detail: str = Field(default="", max_length=500)
    """Reason of a refusal in one line, for people."""


class HeartbeatRequest(Body):
    """Progress of a device that trains."""

    round: RoundNumber
    weights: Digest
    step: int = Field(ge=0, lt=2**53)
    loss: float
    tokens_per_second: float = Field(ge=0)
    process: int = Field(ge=0, lt=2**53)
    """Id of the device's process."""


class HeartbeatReply(Body):
    """Answer to a heartbeat."""

    current: bool
    """False if the round is over, so that the device should stop."""
