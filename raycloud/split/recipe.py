"""Recipe of a split evaluation: one plan, one codec, one network, and the texts."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from raycloud.link.codecs.registry import check_codec
from raycloud.link.network import Network
from raycloud.models.devices import Device, DType
from raycloud.recipe import Recipe
from raycloud.split.plan import PlanSet, SplitPlan


class NetworkRecipe(Recipe):
    """Network between edge and cloud."""

    mbit_s: float = Field(10.0, gt=0)
    """Bandwidth of each direction in Mbit/s."""
    rtt_ms: float = Field(50.0, ge=0)
    """Delay of a round trip in milliseconds."""

    def network(self) -> Network:
        """Network that the link emulates."""
        return Network(self.mbit_s, self.rtt_ms)


class SplitEvaluateRecipe(Recipe):
    """Recipe of a split evaluation: perplexity, traffic, time and memory of a model cut at two blocks, with a codec."""

    renamed: ClassVar[dict[str, str]] = {"first": "start_block", "second": "end_block"}

    job: Literal["split_evaluate"] = "split_evaluate"
    output: str = "results/split-plan"
    """Result directory."""
    seed: int = 10
    """Seed for choosing the text of the time measurement."""
    model: str = "builtin:smollm2-135m-instruct"
    """Hub id, directory, GGUF file or built-in name."""
    start_block: int = Field(4, ge=0)
    """First block that the cloud runs."""
    end_block: int = Field(26, gt=0)
    """First block after those that the cloud runs."""
    codec: str = "int8"
    """Codec of hidden states, both ways: float32, float16, bfloat16, int8 or int4."""
    calibration: str | None = None
    """Folder that keeps the calibration of each cut for other runs, made if missing; None keeps nothing."""
    network: NetworkRecipe = NetworkRecipe()
    data: list[str] = Field(["builtin:instruct", "builtin:reviews"], min_length=1)
    """Sources of texts: the train split for calibration, the test split for evaluation."""
    tokens: int = Field(2048, ge=64)
    """Number of held-out tokens over which perplexity is computed."""
    new_tokens: int = Field(16, gt=0)
    """Number of generated tokens whose time and bytes are measured, one by one."""
    threads: int = Field(0, ge=0)
    """Number of CPU threads; 0 for one per core."""
    device: Device = "auto"
    dtype: DType = "auto"

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        check_codec(codec)
        return codec

    @model_validator(mode="after")
    def _something_between(self) -> Self:
        if not self.start_block < self.end_block:
            raise ValueError(
                f"start_block={self.start_block} and end_block={self.end_block}; allowed: start_block < end_block"
            )
        return self

    @property
    def plans(self) -> PlanSet:
        """Set of the one plan."""
        return PlanSet.of(SplitPlan(self.start_block, self.end_block))

    @property
    def rungs(self) -> tuple[int, ...]:
        """Token counts at which perplexity is reported before the end: 1/8, 1/4 and 1/2 of ``tokens``."""
        return self.tokens // 8, self.tokens // 4, self.tokens // 2
