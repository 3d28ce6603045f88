"""``raycloud signals``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Certificates, Token, print_json

app = typer.Typer(help="Store the signals of a teacher about a data set in files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("fetch")
def fetch(
    teacher: Annotated[str, typer.Option(help="Address of the teacher, wss://host/v1/signals.")],
    tokenizer: Annotated[str, typer.Option(help="A model with the teacher's tokenizer; its weights are not read.")],
    data: Annotated[str, typer.Option(help="A built-in set, a JSONL, JSON or Parquet file, or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the signals; signals that it has are kept.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides, such as signal.kind=hidden temperatures=[1,2]."),
    ] = None,
    token: Token = None,
    certificates: Certificates = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a remote teacher's signals for this device's data once, for all later training."""
    from contextlib import ExitStack

    from raycloud.link.websocket import check_cloud

    check_cloud(teacher, certificates)  # before torch is loaded, which takes seconds
    from raycloud.distill.signals.remote.fetch import FetchRecipe
    from raycloud.distill.signals.remote.fetch import fetch as fetch_signals
    from raycloud.link.meter import Meter
    from raycloud.report.console import ProgressBars, console, progress_bars

    values = {"teacher": teacher, "tokenizer": tokenizer, "data": {"source": data}, "output": str(out)}
    recipe = FetchRecipe.parse(values, overrides or (), source="signals fetch")
    meter = Meter()
    with ExitStack() as stack:
        shown: list[ProgressBars] = []

        def show_progress(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(progress_bars(total)))
            shown[0].move("samples", done, f"{meter.total / 1e6:,.1f} MB")

        signals = fetch_signals(
            recipe, token=token, certificates=certificates, meter=meter, on_progress=show_progress, notify=console.print
        )
    console.print(f"{out}: {len(signals)} samples; {meter.total / 1e6:,.1f} MB sent over the link")
    print_json(as_json, {"out": str(out), "samples": len(signals), "link_bytes": meter.total})
