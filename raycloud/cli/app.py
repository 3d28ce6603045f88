"""``raycloud <verb>``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from raycloud import __version__
from raycloud.cli import (
    bench,
    distill,
    doctor,
    edge,
    evaluate,
    fetch,
    privacy,
    report,
    runs,
    schema,
    search,
    signals,
    split,
    split_tune,
    tune_teacher,
    validate,
)
from raycloud.errors import RaycloudError

app = typer.Typer(
    help="Get a large language model from your cloud to your edges, and keep it good there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("tune-teacher")(tune_teacher.tune_teacher)
app.command("distill")(distill.distill)
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
app.add_typer(split.app, name="split")
app.add_typer(signals.app, name="signals")
app.add_typer(edge.app, name="edge")
app.add_typer(bench.app, name="bench")


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(before: Sequence[str] = ()) -> None:
    """Run the command line; errors a user can act on end it with one line and their exit code.

    Args:
        before: words put before those the process was called with.
    """
    try:
        app([*before, *sys.argv[1:]], prog_name="raycloud")
    except RaycloudError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        typer.echo(f"error: {error.filename or 'input/output'}: {error.strerror or error}", err=True)
        sys.exit(2)
