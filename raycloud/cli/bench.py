"""``raycloud bench``."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Measure: every benchmark prints a table and, with --json, one JSON object as its last line.")

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object.")]


@app.callback(invoke_without_command=True)
def _listed(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("distill-step")
def distill_step(as_json: Json = False) -> None:
    """One forward-KL step: the dense formulation against ours."""
    from raycloud.benchmarks.distill_step import run

    run(as_json)
