"""What several verbs share: their options, and what they say where a part is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from raycloud.errors import MissingExtra, RecipeError
from raycloud.results import Mode

RecipeFile = Annotated[Path, typer.Option(help="The recipe, a YAML file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]


def mode_of(resume: bool, overwrite: bool) -> Mode:
    """How a result directory is to be opened.

    Raises:
        RecipeError: both are set.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"


@contextmanager
def needing_ray(verb: str) -> Iterator[None]:
    """Import within this what only the extra ``cluster`` installs.

    Raises:
        MissingExtra: ray is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra(f"'raycloud {verb}'", "cluster") from None
