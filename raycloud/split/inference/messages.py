"""Messages of split inference: a session serves one generation, whose steps bring hidden states there and back."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from pydantic import Field

from raycloud.link.frames import Frame, FrameError, OpenRequest, SessionGrant

SERVICE = "inference"

_STEP = struct.Struct("<IIIHHHH")


class InferenceKind(IntEnum):
    """Kinds of the messages of split inference."""

    STEP = 16
    STEP_OK = 17
    REPLAY = 18
    """Step of a lost session that is rebuilt: its hidden states were sent before, and none are returned."""


class OpenInference(OpenRequest):
    """Request of the edge to open an inference session."""

    service: str = SERVICE
    fingerprint: str = Field(max_length=128)
    """Fingerprint of the model, which must be the same at both ends."""
    calibration: str = Field(default="", max_length=128)
    """Fingerprint of the codecs' calibration; empty if the codec needs none."""
    codec: str = Field(max_length=32)
    start_blocks: list[int] = Field(min_length=1, max_length=512)
    end_blocks: list[int] = Field(min_length=1, max_length=512)
    max_tokens: int = Field(ge=1)


class InferenceGrant(SessionGrant):
    """Grant of the cloud to an inference session."""

    max_tokens: int = Field(ge=1)
    max_step_tokens: int = Field(ge=1)


@dataclass(frozen=True)
class StepMessage:
    """Body of a step and of its reply: 20 bytes, as there is one for every token. The coded hidden states are raw."""

    start_block: int
    end_block: int
    keep: int
    """Number of tokens that stay valid; later ones are discarded before the step."""
    start: int
    """Position of the first token."""
    tokens: int
    """Number of tokens whose hidden states are sent."""
    wanted: int
    """Number of the last tokens whose hidden states are returned."""
    deadline: int = 0
    """Tenths of a second after which the reply is no longer needed; 0 for no deadline."""

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.tokens

    def pack(self) -> bytes:
        """Encode the body as bytes.

        Raises:
            FrameError: a number does not fit its field.
        """
        try:
            return _STEP.pack(
                self.keep, self.start, self.wanted, self.tokens, self.start_block, self.end_block, self.deadline
            )
        except struct.error as error:
            raise FrameError(f"a number does not fit a step: {error}") from error

    @classmethod
    def parse(cls, frame: Frame) -> StepMessage:
        """Parse the body of a frame.

        Raises:
            FrameError: the body has another length.
        """
        if len(frame.body) != _STEP.size:
            raise FrameError(f"{frame.kind.name}: a body has {_STEP.size} bytes, got {len(frame.body)}")
        keep, start, wanted, tokens, start_block, end_block, deadline = _STEP.unpack(frame.body)
        return cls(start_block, end_block, keep, start, tokens, wanted, deadline)


MAX_DEADLINE = 2**16 - 1
"""Longest deadline, in tenths of a second."""
STEP_BYTES = Frame.of(InferenceKind.STEP, StepMessage(0, 0, 0, 0, 0, 0)).size
"""Size in bytes of a step, or of its reply, without hidden states."""
