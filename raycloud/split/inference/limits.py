"""Limits of split inference in the cloud."""

from __future__ import annotations

from pydantic import Field
from transformers import PretrainedConfig

from raycloud.link.server import SessionLimits
from raycloud.models.configuration import context_length
from raycloud.models.rotary import fixed_rope_length


class InferenceLimits(SessionLimits):
    """Limits of inference sessions, checked before memory is allocated."""

    tokens: int = Field(default=4096, ge=1)
    """Largest number of tokens per session."""
    step_tokens: int = Field(default=512, ge=1, le=4096)
    """Largest number of tokens per step, which is a chunk of a prompt or one new token. An edge sends chunks of
    :data:`~raycloud.split.inference.generation.PROMPT_CHUNK`."""
    kv_bytes: int = Field(default=4 * 2**30, ge=1)
    """Largest size in bytes of the keys and values of all sessions."""
    queue: int = Field(default=256, ge=1)
    """Largest number of steps queued at the engine."""

    def longest(self, config: PretrainedConfig) -> int:
        """Largest number of tokens of a session with a model: at most the model's number of positions.

        It is at most ``fixed_rope_length``: a link splits prompts, and a lost session is rebuilt in other chunks.
        """
        return min(self.tokens, context_length(config), fixed_rope_length(config) or self.tokens)
