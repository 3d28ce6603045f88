"""Verbs of ``raycloud`` and their common options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from raycloud import __version__
from raycloud.cli import (
    bench,
    doctor,
    edge,
    evaluate,
    fetch,
    job,
    privacy,
    report,
    runs,
    schema,
    search,
    signals,
    split,
    split_tune,
    validate,
    versions,
)
from raycloud.jobs.registry import JOBS

app = typer.Typer(
    help="Get a large language model from your cloud to your edges, and keep it good there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _job in JOBS.values():
    if _job.help:
        app.command(_job.verb)(job.command(_job))
app.command("split-tune")(split_tune.split_tune)
app.command("search")(search.search)
app.command("doctor")(doctor.doctor)
app.command("validate")(validate.validate)
app.command("schema")(schema.schema)
app.command("fetch")(fetch.fetch)
app.command("evaluate")(evaluate.evaluate)
app.command("privacy")(privacy.privacy)
app.command("runs")(runs.runs)
app.command("report")(report.report)
app.add_typer(versions.app, name="versions")
app.add_typer(split.app, name="split")
app.add_typer(signals.app, name="signals")
app.add_typer(edge.app, name="edge")
app.add_typer(bench.app, name="bench")


@dataclass
class RootOptions:
    """Options given before the verb, which the handler of errors reads."""

    debug: bool = False


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", envvar="RAYCLOUD_DEBUG", help="Show the traceback of an error."),
) -> None:
    if context.obj is not None:
        context.obj.debug = debug


def run(arguments: Sequence[str], options: RootOptions) -> int:
    """Run a command line and return its exit status.

    Args:
        arguments: arguments, without the name of the program.
        options: set to the options given before the verb.
    """
    command = typer.main.get_command(app)
    _hide_flag_types(command)
    status = command.main(args=list(arguments), prog_name="raycloud", standalone_mode=False, obj=options)
    return status if isinstance(status, int) else 0


def _hide_flag_types(command: Any) -> None:
    """Hide the type of flags, which take no value, in the help of a command and its subcommands."""
    context = typer.Context(command)
    for parameter in command.get_params(context):
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for below in getattr(command, "commands", {}).values():
        _hide_flag_types(below)
