"""Recipe of an evaluation: models, sets of questions, and how answers are sampled.

The defaults are the protocol of the distillation papers: Alpaca prompts, five seeds, temperature 1 over the whole
vocabulary, no 6-gram twice, 256 tokens for the prompt and 256 for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.files import SUFFIXES
from raycloud.data.prompts import Format
from raycloud.fetch import PREFIX
from raycloud.models.devices import Device, DType
from raycloud.models.texts import Bos
from raycloud.recipe import Recipe


class GenerationRecipe(Recipe):
    """Settings of sampling, applied in the order of ``transformers``: repeated n-grams, temperature, top-k, top-p."""

    renamed: ClassVar[dict[str, str]] = {"new_tokens": "max_new_tokens", "no_repeat_ngram": "no_repeat_ngram_size"}

    max_new_tokens: int = Field(256, gt=0)
    """Maximum number of tokens of an answer."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the fewest tokens whose probability reaches this."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens; 0 for all."""
    no_repeat_ngram_size: int = Field(6, ge=0)
    """Length of token sequences that must not occur twice in prompt and answer; 0 for no such rule."""
    batch_size: int = Field(16, gt=0)
    """Number of answers generated at a time; it does not change the answers."""


class EvaluateRecipe(Recipe):
    """Recipe that asks models questions and compares their answers with references."""

    renamed: ClassVar[dict[str, str]] = {"max_prompt": "max_prompt_length"}

    job: Literal["evaluate"] = "evaluate"
    output: str | None = None
    """Result directory; None only prints the results."""
    models: list[str] = Field(min_length=1)
    """Models: hub ids, directories, GGUF files or built-in names."""
    data: list[str] = Field(["builtin:instruct"], min_length=1)
    """Data sets with instruction, input and output: built-in names, JSONL, JSON or Parquet files, or hub ids. For data
    sets with a ``text`` column instead, ``plain`` measures only the perplexity."""
    split: Literal["train", "valid", "test", "all"] = "test"
    """Split to evaluate on; ``all`` for a file that is a test set as a whole."""
    limit: int | None = Field(None, gt=0)
    """Number of rows of each set, evenly spread over it; None for all."""
    format: Format = "alpaca"
    """Format of the prompts; ``plain`` is the instruction and its input without a template."""
    bos: Bos = "auto"
    """BOS at the beginning of prompts: ``auto`` as the tokenizer or the chat template has it, ``true`` or ``false``."""
    max_prompt_length: int = Field(256, gt=0)
    """Maximum number of tokens of a prompt; a longer one is shortened in its body."""
    max_length: int = Field(512, gt=1)
    """Maximum number of tokens of prompt and reference together, for perplexity."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field([10, 20, 30, 40, 50], min_length=1)
    """Seeds of the sampling: every question is answered once per seed, and scores are means over the seeds."""
    generation: GenerationRecipe = GenerationRecipe()
    teacher: str | None = None
    """Model whose most likely tokens the others are compared with, if they have the same vocabulary."""
    device: Device = "auto"
    dtype: DType = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field, named in (("models", folders(self.models)), ("data", folders(self.data)), ("seeds", self.seeds)):
            double = [name for name in named if list(named).count(name) > 1]
            if double:
                raise ValueError(f"{field}: '{double[0]}' is given twice, or two of them would have this name")
        if self.generation.temperature == 0 and len(self.seeds) > 1:
            raise ValueError("seeds: at temperature 0 every seed gives the same answers; give one")
        if self.max_length <= self.max_prompt_length:
            raise ValueError(
                f"max_length must be above max_prompt_length={self.max_prompt_length}, got {self.max_length}"
            )
        return self


def folders(sources: Sequence[str]) -> list[str]:
    """Names of models and data sets in tables and folders: ``dolly/valid.jsonl`` becomes ``dolly-valid``."""
    return [_folder(source) for source in sources]


def _folder(source: str) -> str:
    path = PurePath(source.removeprefix(PREFIX))
    if path.suffix in (*SUFFIXES, ".gguf"):
        path = path.with_suffix("")
    return re.sub(r"[^\w.-]+", "-", "-".join(path.parts[-2:])).strip("-.") or "unnamed"
