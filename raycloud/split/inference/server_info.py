"""Server information for edges: the blocks a cloud runs, their model, and the available codecs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from raycloud.errors import RaycloudError
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.registry import CODEC_NAMES
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.parts import CloudPart
from raycloud.split.plan import PlanSet


class ServerInfo(BaseModel):
    """Server information, which an edge reads before it loads its own part."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    start_blocks: tuple[int, ...]
    end_blocks: tuple[int, ...]
    fingerprint: str
    """Fingerprint of the model."""
    codecs: tuple[str, ...]
    calibration: str = ""
    """Fingerprint of the calibration; empty if there is none."""
    max_tokens: int = Field(ge=1)
    """Largest number of tokens of a session."""

    @property
    def plans(self) -> PlanSet:
        """Plans by which the model is cut."""
        return PlanSet(self.start_blocks, self.end_blocks)

    @classmethod
    def of(cls, part: CloudPart, codecs: CutCodecs, limits: InferenceLimits) -> ServerInfo:
        """Server information of one part."""
        usable = []
        for codec in CODEC_NAMES:
            try:
                for cut in part.plans.cuts:
                    codecs.cut_codec(codec, cut)
            except RaycloudError:
                continue
            usable.append(codec)
        return cls(
            start_blocks=part.plans.start_blocks,
            end_blocks=part.plans.end_blocks,
            fingerprint=part.fingerprint,
            codecs=tuple(usable),
            calibration=next((codecs.fingerprint(codec) for codec in usable if codec not in CODECS), ""),
            max_tokens=limits.longest(part.config),
        )
