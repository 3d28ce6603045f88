"""What a teacher is asked to send."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raycloud.recipe import Recipe

SignalKind = Literal["hidden", "logits", "topk", "hybrid", "sampled", "sorted", "scalars"]
SignalCodec = Literal["float32", "bfloat16", "float16", "int8"]


class SignalRecipe(Recipe):
    """What the teacher sends for every response token."""

    kind: SignalKind = "hidden"
    """``hidden``: the row entering the head, with one frozen copy of the head (exact); ``logits``: all of them (exact);
    ``topk``: the largest with their ids, and the mass of all others; ``hybrid``: the same, and draws from the others;
    ``sampled``: draws from the whole distribution; ``sorted``: the largest without their ids; ``scalars``: the
    log-probability of the text's own next token."""
    codec: SignalCodec = "bfloat16"
    """How hidden rows or logits are coded; ``int8`` for ``hidden`` only."""
    k: int = Field(64, gt=0)
    """Logits kept by ``topk``, ``sorted`` and ``hybrid`` (16 to 32 are enough for the last)."""
    draws: int = Field(50, gt=0, le=255)
    """Draws of ``sampled`` (about 50) and ``hybrid`` (about 16), for each temperature."""

    @model_validator(mode="after")
    def _codec_fits(self) -> Self:
        if self.codec == "int8" and self.kind != "hidden":
            raise ValueError(f"codec is 'int8' with kind '{self.kind}'; allowed: float32, bfloat16, float16")
        return self
