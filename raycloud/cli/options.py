"""Options that several verbs share, and the error for an extra that is not installed.

The options have the same meaning in every verb: ``--recipe`` is the file to read, ``--out`` the result directory,
``--overwrite`` and ``--resume`` say how to treat existing results, ``--json`` prints a JSON object at the end,
``--token`` is the token sent to the cloud, and ``--api-key`` is the key that clients of this command must send.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from raycloud.errors import MissingExtra, RecipeError
from raycloud.recipe import Recipe, read_yaml
from raycloud.results import Mode, plain_json

RecipeFile = Annotated[Path, typer.Option(help="The recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option(help="The result directory, in place of the recipe's output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the stopped run in the result directory.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Token = Annotated[
    str | None, typer.Option(envvar="RAYCLOUD_TOKEN", show_envvar=True, help="Bearer token sent to the cloud.")
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="RAYCLOUD_API_KEY", show_envvar=True, help="API key that clients must send.")
]
Certificates = Annotated[
    str | None, typer.Option(help="File of certificates to trust instead of the system's, such as for a private cloud.")
]

_Recipe = TypeVar("_Recipe", bound=Recipe)


def read_recipe(kind: type[_Recipe], path: Path, overrides: Sequence[str] | None, out: Path | None) -> _Recipe:
    """Read a recipe file, with ``out`` as its result directory if given; overrides take precedence over both.

    Raises:
        RecipeError: the file cannot be read, or a value is not allowed.
    """
    values = read_yaml(path)
    if out is not None:
        values["output"] = str(out)
    return kind.parse(values, overrides or (), source=str(path))


def mode_of(resume: bool, overwrite: bool) -> Mode:
    """Return the mode in which to open the result directory.

    Raises:
        RecipeError: both flags are set.
    """
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"


def print_json(wanted: bool, summary: Mapping[str, Any]) -> None:
    """Print a summary as one JSON object on one line, if ``wanted``: the value of ``--json``."""
    if wanted:
        print(plain_json(summary), flush=True)


@contextmanager
def requires_ray(verb: str) -> Iterator[None]:
    """Turn a failed import of ray inside into an error that names the extra to install.

    Raises:
        MissingExtra: ray is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra(f"'raycloud {verb}'", "cluster") from None
