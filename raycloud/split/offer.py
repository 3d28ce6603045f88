"""What a cloud offers to edges: which blocks it runs, of which model, through which codecs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from raycloud.errors import RaycloudError
from raycloud.link.codecs import CODECS
from raycloud.split.cloud.limits import Limits
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet
from raycloud.split.terms import CODEC_NUMBERS, Codecs


class Offer(BaseModel):
    """Read by an edge before it loads its own part."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    firsts: tuple[int, ...]
    seconds: tuple[int, ...]
    fingerprint: str
    """Of the model."""
    codecs: tuple[str, ...]
    calibration: str = ""
    """Fingerprint of the calibration; empty if there is none."""
    max_tokens: int = Field(ge=1)
    """Longest text of a session."""

    @property
    def plans(self) -> PlanSet:
        """Where the model is cut."""
        return PlanSet(self.firsts, self.seconds)

    @classmethod
    def of(cls, part: CloudPart, codecs: Codecs, limits: Limits) -> Offer:
        """The offer of one part."""
        usable = []
        for codec in CODEC_NUMBERS:
            try:
                for cut in part.plans.cuts:
                    codecs.boundary(codec, cut)
            except RaycloudError:
                continue
            usable.append(codec)
        return cls(
            firsts=part.plans.firsts,
            seconds=part.plans.seconds,
            fingerprint=part.fingerprint,
            codecs=tuple(usable),
            calibration=next((codecs.fingerprint(codec) for codec in usable if codec not in CODECS), ""),
            max_tokens=min(limits.tokens, part.config.max_position_embeddings),
        )
