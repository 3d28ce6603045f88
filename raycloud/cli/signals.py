"""``raycloud signals``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="What a teacher says about a data set, kept in files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command("fetch")
def fetch(
    teacher: Annotated[str, typer.Option(help="Where the teacher answers, wss://host/v1/signals.")],
    tokenizer: Annotated[str, typer.Option(help="A model with the teacher's tokenizer; its weights are not read.")],
    data: Annotated[str, typer.Option(help="A built-in set, a JSONL or Parquet file, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to fill; what is there already is kept.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="More, such as signal.kind=hidden temperatures=[1,2] data.format=alpaca.")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="RAYCLOUD_TOKEN", help="What the teacher asks edges for.")] = None,
    certificates: Annotated[
        str | None, typer.Option(help="A file of certificates to trust instead of the system's.")
    ] = None,
) -> None:
    """Have a teacher on the wire say what it thinks of this device's data, once, for all training to come."""
    from contextlib import ExitStack

    from raycloud.distill.signal_link.fetch import FetchRecipe
    from raycloud.distill.signal_link.fetch import fetch as fetch_signals
    from raycloud.link.meter import Meter
    from raycloud.report.console import Bars, bars, console

    values = {"teacher": teacher, "tokenizer": tokenizer, "data": {"source": data}, "output": str(out)}
    recipe = FetchRecipe.parse(values, overrides or (), source="signals fetch")
    meter = Meter()
    with ExitStack() as stack:
        shown: list[Bars] = []

        def moved(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(bars(total)))
            shown[0].move("samples", done, f"{meter.total / 1e6:,.1f} MB")

        signals = fetch_signals(
            recipe, token=token, certificates=certificates, meter=meter, moved=moved, notify=console.print
        )
    console.print(f"{out}: {len(signals)} samples; {meter.total / 1e6:,.1f} MB crossed the link")
