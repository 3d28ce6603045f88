"""The recipe of an evaluation: models, sets of questions, and how answers are drawn.

The defaults are the protocol of the distillation papers: Alpaca prompts, five seeds, temperature 1 over the whole
vocabulary, no 6-gram twice, 256 tokens for the prompt and 256 for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.prompts import Format
from raycloud.fetch import PREFIX
from raycloud.models.loading import Device, DType
from raycloud.recipe import Recipe


class GenerationRecipe(Recipe):
    """How answers are drawn; in the order of ``transformers``: repeated n-grams, temperature, top-k, top-p."""

    new_tokens: int = Field(256, gt=0)
    """Where an answer ends at the latest."""
    temperature: float = Field(1.0, ge=0)
    """0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the fewest tokens whose probability reaches this."""
    top_k: int = Field(0, ge=0)
    """Draw among this many most likely tokens; 0 for all."""
    no_repeat_ngram: int = Field(6, ge=0)
    """No sequence of this many tokens occurs twice in prompt and answer; 0 for no such rule."""
    batch_size: int = Field(16, gt=0)
    """Answers written together; it changes no answer."""


class EvaluateRecipe(Recipe):
    """Ask models questions and compare what they answer with references."""

    job: Literal["evaluate"] = "evaluate"
    output: str | None = None
    """The result directory; None keeps nothing but what is printed."""
    models: list[str] = Field(min_length=1)
    """Hub ids, directories, GGUF files or built-in names."""
    data: list[str] = Field(["builtin:instruct"], min_length=1)
    """Sets with instruction, input and output: built-in, JSONL or Parquet files, or hub ids."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """``all`` for a file that is a test set as a whole."""
    limit: int | None = Field(None, gt=0)
    """So many rows of each set, evenly spread over it; None for all."""
    format: Format = "alpaca"
    """How a row becomes a prompt; ``plain`` is the instruction and its input without a template."""
    max_prompt: int = Field(256, gt=0)
    """Tokens of a prompt; a longer one is shortened in its body."""
    max_length: int = Field(512, gt=1)
    """Tokens of prompt and reference together, for perplexity."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field([10, 20, 30, 40, 50], min_length=1)
    """Every question is answered once for each; scores are means over them."""
    generation: GenerationRecipe = GenerationRecipe()
    teacher: str | None = None
    """Agreement with this model's most likely tokens is measured where it shares the vocabulary."""
    device: Device = "auto"
    dtype: DType = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, named in (("models", folders(self.models)), ("data", folders(self.data)), ("seeds", self.seeds)):
            double = [name for name in named if list(named).count(name) > 1]
            if double:
                raise ValueError(f"{field}: '{double[0]}' is given twice, or two would be called so")
        if self.generation.temperature == 0 and len(self.seeds) > 1:
            raise ValueError("seeds: at temperature 0 every seed gives the same answers; give one")
        if self.max_length <= self.max_prompt:
            raise ValueError(f"max_length must be above max_prompt={self.max_prompt}, got {self.max_length}")
        return self


def folders(sources: Sequence[str]) -> list[str]:
    """What models and sets are called in tables and folders: ``dolly/valid.jsonl`` becomes ``dolly-valid``."""
    return [_folder(source) for source in sources]


def _folder(source: str) -> str:
    path = PurePath(source.removeprefix(PREFIX))
    if path.suffix in (".jsonl", ".json", ".parquet", ".gguf"):
        path = path.with_suffix("")
    return re.sub(r"[^\w.-]+", "-", "-".join(path.parts[-2:])).strip("-.") or "unnamed"
