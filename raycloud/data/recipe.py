"""Recipe of the training text and its tokenisation."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from raycloud.data.prompts import Format
from raycloud.models.texts import Bos
from raycloud.recipe import Recipe


class DataRecipe(Recipe):
    """Recipe of the training text."""

    renamed: ClassVar[dict[str, str]] = {"max_prompt": "max_prompt_length"}

    source: str = "builtin:reviews"
    """Source of the rows: ``builtin:reviews``, ``builtin:instruct``, a JSONL, JSON or Parquet file, a hub id."""
    validation: str | None = None
    """Another source, all of which is held out; then nothing of ``source`` is held out. If None, a tenth of ``source``
    is held out for validation and a tenth for the test, by content, unless the source has splits of its own."""
    format: Format = "plain"
    bos: Bos = "auto"
    """BOS at the beginning of texts: ``auto`` follows tokenizer or chat template; else ``true`` or ``false``."""
    max_length: int = Field(512, gt=1)
    """Largest number of tokens of prompt and response together."""
    max_prompt_length: int = Field(256, gt=0)
    """Largest number of tokens of a prompt; a longer one is shortened in its body."""
    limit: int | None = Field(None, gt=0)
    """Number of rows of the training split to use, evenly spread over it; None for all."""

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        check_validation(self.source, self.validation)
        return self


def check_validation(source: str, validation: str | None) -> None:
    """Refuse a validation source that is also the training source.

    Raises:
        ValueError: both sources are the same.
    """
    if validation == source:
        raise ValueError(f"validation={validation} is the source itself; allowed: another one, or null")
