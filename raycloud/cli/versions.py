"""``raycloud versions``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raycloud.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from raycloud.rounds.versions import VersionRecord, VersionStore

app = typer.Typer(help="Show the versions of a run's weights, or go back to one.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The result directory.")]
Number = Annotated[int, typer.Argument(metavar="N", help="The number of the version.", min=0)]
OfCohort = Annotated[str | None, typer.Option("--cohort", help="The cohort, if the run has several.")]


@app.command("list")
def list_versions(folder: Folder, as_json: AsJson = False) -> None:
    """List the versions of a run: one for each round that made new weights, the start and rollbacks."""
    from raycloud.jobs.versions import histories_in
    from raycloud.report.numbers import kilobytes
    from raycloud.report.table import print_table

    plain = []
    for name, history in histories_in(folder).items():
        records = history.records()
        print_table(
            ["version", "note", "edges", "figures", "round", "samples", "kB"],
            [
                [
                    str(one.version),
                    one.note,
                    ", ".join(one.members),
                    _figures(one),
                    "" if one.round is None else str(one.round),
                    "" if one.samples is None else str(one.samples),
                    kilobytes(history.nbytes(one.version)),
                ]
                for one in records
            ],
            title=name or None,
            texts=4,
        )
        plain += [_plain(name, history, one) for one in records]
    print_json(as_json, {"versions": plain})


@app.command("show")
def show(folder: Folder, version: Number, cohort: OfCohort = None, as_json: AsJson = False) -> None:
    """Show the record of a version, and which tensors it changed."""
    from raycloud.jobs.versions import history_of
    from raycloud.report.console import console
    from raycloud.report.numbers import kilobytes

    name, history = history_of(folder, cohort)
    record, changed = history.record(version), history.changed(version)
    for key, value in {
        "version": str(record.version),
        "parent": "none: it holds all tensors" if record.parent is None else str(record.parent),
        "round": "none" if record.round is None else str(record.round),
        "edges": ", ".join(record.members) or "none",
        "samples": "not counted" if record.samples is None else str(record.samples),
        "time": record.time,
        "note": record.note or "none",
        "figures": _figures(record) or "none",
        "digest": record.digest,
        "tensors": f"{len(record.tensors)}, of which {len(changed)} are stored here",
        "kB": kilobytes(history.nbytes(version)),
    }.items():
        console.print(f"{key:8} {value}")
    print_json(as_json, {**_plain(name, history, record), "tensors": record.tensors, "changed": changed})


@app.command("rollback")
def rollback(folder: Folder, version: Number, cohort: OfCohort = None, as_json: AsJson = False) -> None:
    """Write the trained model as it was at a version; the history goes on with a version equal to it."""
    from raycloud.jobs.versions import history_of
    from raycloud.jobs.versions import rollback as roll_back
    from raycloud.report.console import console

    record = roll_back(folder, version, cohort)
    console.print(
        f"{folder}: the model has the weights of version {version}, which is version {record.version} now; "
        "summary and report are still of the run's end"
    )
    print_json(as_json, _plain(*history_of(folder, cohort), record))


def _figures(record: VersionRecord) -> str:
    return ", ".join(f"{name} {figure:.4g}" for name, figure in record.figures.items())


def _plain(cohort: str, history: VersionStore, record: VersionRecord) -> dict[str, Any]:
    """Return a record as plain JSON, with its cohort and the bytes that it stores, without the list of tensors."""
    return {
        "cohort": cohort or None,
        **record.model_dump(exclude={"tensors"}),
        "stored_bytes": history.nbytes(record.version),
    }
