"""Recipe of the signals that a teacher sends."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raycloud.recipe import Recipe

SignalKind = Literal["hidden", "logits", "topk", "hybrid", "sampled", "sorted", "scalars"]
SignalCodec = Literal["float32", "bfloat16", "float16", "int8"]


class SignalRecipe(Recipe):
    """Content of the teacher's signal for every response token."""

    kind: SignalKind = "hidden"
    """``hidden``: the hidden state before the head, with one frozen copy of the head (exact); ``logits``: all logits
    (exact); ``topk``: the k largest logits with their ids, and the mass of all others; ``hybrid``: as ``topk``, and ids
    drawn from the others; ``sampled``: ids drawn from the whole distribution; ``sorted``: the k largest logits without
    ids; ``scalars``: the log-probability of the next token in the text, which no objective learns from: for benchmarks
    only."""
    codec: SignalCodec = "bfloat16"
    """Codec of hidden states or logits; ``int8`` only for ``hidden``."""
    k: int = Field(64, gt=0)
    """Number of logits kept by ``topk``, ``sorted`` and ``hybrid`` (16 to 32 are enough for ``hybrid``)."""
    draws: int = Field(50, gt=0, le=255)
    """Number of draws of ``sampled`` (about 50) and ``hybrid`` (about 16), for each temperature."""

    @model_validator(mode="after")
    def _codec_fits(self) -> Self:
        if self.codec == "int8" and self.kind != "hidden":
            raise ValueError(f"codec is 'int8' with kind '{self.kind}'; allowed: float32, bfloat16, float16")
        return self
