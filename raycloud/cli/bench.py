"""``raycloud bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from raycloud.benchmarks.registry import BENCHMARKS, COMMON_KEYS, measure
from raycloud.cli.options import AsJson, requires_ray
from raycloud.errors import FetchError

SKIPPED = 3
"""Exit code of a benchmark whose data is not available."""
Quick = Annotated[
    bool,
    typer.Option("--quick", help="Check that it works, in seconds to two minutes, with small sizes and the same keys."),
]

app = typer.Typer(help="Run a benchmark. Each prints a table and, with --json, one JSON object as the last line.")


@app.callback(invoke_without_command=True)
def _listed(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command(name: str) -> Callable[..., None]:
    def command(as_json: AsJson = False, quick: Quick = False) -> None:
        try:
            with requires_ray(f"bench {name}"):
                measured = measure(name, quick=quick)
        except FetchError as error:
            typer.echo(f"skipped: {error}")
            raise typer.Exit(SKIPPED) from None
        measured.show(quick=quick, as_json=as_json)

    return command


for _name, _benchmark in BENCHMARKS.items():
    _keys = ", ".join((*_benchmark.keys, *COMMON_KEYS))
    app.command(_name, help=f"{_benchmark.about}\n\nKeys of the JSON object: {_keys}.", short_help=_benchmark.about)(
        _command(_name)
    )
