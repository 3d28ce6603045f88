"""``raycloud bench``."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, needing_ray

app = typer.Typer(help="Measure: every benchmark prints a table and, with --json, one JSON object as its last line.")


@app.callback(invoke_without_command=True)
def _listed(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _run(name: str, as_json: bool, **options: bool) -> None:
    with needing_ray(f"bench {name.replace('_', '-')}"):
        benchmark = import_module(f"raycloud.benchmarks.{name}")
    benchmark.run(as_json, **options)


@app.command("distill-step")
def distill_step(as_json: AsJson = False) -> None:
    """One forward-KL step: the dense formulation against ours."""
    _run("distill_step", as_json)


@app.command("codecs")
def codecs(as_json: AsJson = False) -> None:
    """What each codec of the link costs a real model in bytes and in perplexity."""
    _run("codecs", as_json)


@app.command("split-exact")
def split_exact(as_json: AsJson = False) -> None:
    """Whether a model cut in three says what the whole one says, at every pair of cuts."""
    _run("split_exact", as_json)


@app.command("split-speed")
def split_speed(as_json: AsJson = False) -> None:
    """Tokens per second of a cut model, in one process and over Serve's WebSocket, against the whole one."""
    _run("split_speed", as_json)


@app.command("split-wire")
def split_wire(as_json: AsJson = False) -> None:
    """What crosses the link: bytes against the formula, and a search for ids and text in a whole session."""
    _run("split_wire", as_json)


@app.command("split-faults")
def split_faults(as_json: AsJson = False) -> None:
    """Bad days: killed replicas, cut sockets, damaged frames, slow readers; nothing may come out wrong."""
    _run("split_faults", as_json)


@app.command("objectives")
def objectives(as_json: AsJson = False) -> None:
    """Every distillation objective beside its dense formulation: time, memory, difference."""
    _run("objectives", as_json)


@app.command("alignment")
def alignment(as_json: AsJson = False) -> None:
    """Two tokenisations of the same texts: byte offsets against time warping and against rapidfuzz."""
    _run("alignment", as_json)


@app.command("signals")
def signals(as_json: AsJson = False) -> None:
    """What each kind of teacher signal costs in bytes, and the gradient a student gets from it."""
    _run("signals", as_json)


@app.command("scale")
def scale(
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="Four students at most, to see that it works.")] = False,
) -> None:
    """What one more edge costs the cloud, with up to 64 students of one teacher, and what 10,000 would."""
    _run("scale", as_json, quick=quick)


@app.command("split-pipeline")
def split_pipeline(as_json: AsJson = False) -> None:
    """A step of split fine-tuning over a slow link: edge, link and cloud one after the other, and at once."""
    _run("split_pipeline", as_json)


@app.command("split-tune")
def split_tune(
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="One split and one seed.")] = False,
) -> None:
    """Accuracy of split fine-tuning against what crosses the link, beside the unsplit model and the published cut."""
    _run("split_tune", as_json, quick=quick)
