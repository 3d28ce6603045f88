"""The recipe of an examination: one plan, one codec, one link, and the texts that they are tried on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from raycloud.link.network import Network
from raycloud.models.loading import Device, DType
from raycloud.recipe import Recipe
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.terms import CODEC_NUMBERS


class NetworkRecipe(Recipe):
    """The link between edge and cloud."""

    mbit_s: float = Field(10.0, gt=0)
    """Bandwidth of each direction."""
    rtt_ms: float = Field(50.0, ge=0)
    """Delay of a round trip."""

    def network(self) -> Network:
        """What the link is slowed to."""
        return Network(self.mbit_s, self.rtt_ms)


class SplitPlanRecipe(Recipe):
    """What a model loses, sends and takes when it is cut at two blocks and its rows cross a link through a codec."""

    job: Literal["split_plan"] = "split_plan"
    output: str = "results/split-plan"
    """The result directory."""
    seed: int = 10
    """Of the choice of the text that is continued while time is taken."""
    model: str = "builtin:smollm2-135m-instruct"
    """A hub id, a directory, a GGUF file or a built-in name."""
    first: int = Field(4, ge=0)
    """The first block that the cloud runs."""
    second: int = Field(26, gt=0)
    """The first block after those that the cloud runs."""
    codec: str = "int8"
    """What rows cross the link as, both ways: float32, float16, bfloat16, int8, int4, low-rank or low-rank-int8."""
    calibration: str | None = None
    """A folder that keeps the calibration of each cut for other runs, made where it is missing; None keeps nothing."""
    network: NetworkRecipe = NetworkRecipe()
    data: list[str] = Field(["builtin:instruct", "builtin:reviews"], min_length=1)
    """Texts: the train split to calibrate on, the test split to examine on."""
    tokens: int = Field(2048, ge=64)
    """Of held-out text, that perplexity is over."""
    new_tokens: int = Field(16, gt=0)
    """Whose time and bytes are taken, one by one."""
    threads: int = Field(0, ge=0)
    """CPU threads to compute with; 0 for as many as there are cores."""
    device: Device = "auto"
    dtype: DType = "auto"

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        if codec not in CODEC_NUMBERS:
            raise ValueError(f"no codec '{codec}'; allowed: {', '.join(CODEC_NUMBERS)}")
        return codec

    @model_validator(mode="after")
    def _something_between(self) -> Self:
        if not self.first < self.second:
            raise ValueError(f"first={self.first} and second={self.second}; allowed: first < second")
        return self

    @property
    def plans(self) -> PlanSet:
        """The set of the one plan."""
        return PlanSet.of(SplitPlan(self.first, self.second))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Tokens after which perplexity is reported before the end: an eighth, a quarter, half of them."""
        return self.tokens // 8, self.tokens // 4, self.tokens // 2
