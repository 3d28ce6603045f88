"""Which text to learn from, and how it becomes tokens."""

from __future__ import annotations

from pydantic import Field

from raycloud.data.prompts import Format
from raycloud.recipe import Recipe


class DataRecipe(Recipe):
    """The text to learn from."""

    source: str = "builtin:reviews"
    """``builtin:reviews``, ``builtin:instruct``, a JSONL or Parquet file, or a hub id."""
    format: Format = "plain"
    max_length: int = Field(512, gt=1)
    """Tokens of prompt and response together."""
    max_prompt: int = Field(256, gt=0)
    limit: int | None = Field(None, gt=0)
    """So many rows of the training split, evenly spread over it; None for all."""
